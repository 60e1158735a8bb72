"""Numbers rounded to few bits, as KIVI rounds a cache (arXiv 2402.02750).

Each group of numbers has its own smallest and largest, and an even grid of 2 ** bits steps from
one to the other. Keys are grouped channel by channel over slots, for some channels are large in
all of them; values slot by slot over channels. This is the only arithmetic there is: what a store
reads back, what a session computes with and what an evaluation rounds are the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # numbers that share a grid, as in the paper
_SMALLEST = 1e-12  # step: a group of equal numbers has none of its own


class Grid(NamedTuple):
    """Numbers `(H, n, d)`, each as the number of its step from the smallest of its group.

    low and high, in the numbers' own dtype, have `groups_of` as many along the axis that is
    grouped. float64 is rounded as float32.
    """

    steps: Tensor  # (H, n, d) uint8
    low: Tensor
    high: Tensor


def groups_of(count: int) -> int:
    """How many groups so many numbers make."""
    return -(-count // GROUP)


def quantised(x: Tensor, bits: int, dim: int) -> Grid:
    """x `(H, n, d)` on grids of GROUP numbers along `dim`. Finite if x is, but for the extremes."""
    n = x.shape[dim]
    moved = x.float().movedim(dim, -1)
    # no zeros in the last group: they would widen it
    groups = _grouped(moved, moved[..., -1:])
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = ((groups - low) / _step(low, high, bits)).round()
    codes = steps.flatten(-2)[..., :n].movedim(-1, dim).byte()
    return Grid(codes, *(edge[..., 0].movedim(-1, dim).to(x.dtype) for edge in (low, high)))


def numbers(grid: Grid, bits: int, dim: int) -> Tensor:
    """The rounded numbers `(H, n, d)`, in the dtype of the grid's edges."""
    n = grid.steps.shape[dim]
    moved = grid.steps.movedim(dim, -1).float()
    low, high = (edge.float().movedim(dim, -1)[..., None] for edge in grid[1:])
    placed = _grouped(moved, moved[..., -1:]) * _step(low, high, bits) + low
    return placed.flatten(-2)[..., :n].movedim(-1, dim).to(grid.low.dtype)


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """x `(H, n, d)` with each number on its grid, in the dtype it had."""
    return numbers(quantised(x, bits, dim), bits, dim) if x.numel() else x


def _step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST)


def _grouped(x: Tensor, edge: Tensor) -> Tensor:
    """x `(..., n)` as `(..., groups, GROUP)`, the last group filled up with `edge`."""
    n = x.shape[-1]
    padded = F.pad(x, (0, -n % GROUP))
    padded[..., n:] = edge
    return padded.unflatten(-1, (-1, GROUP))
