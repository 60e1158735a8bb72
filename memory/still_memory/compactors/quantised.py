"""Any compactor, with keys and values rounded to few bits: KIVI's grids (arXiv 2402.02750).

Keys are rounded channel by channel over groups of slots, for some channels are large in all of
them; values slot by slot over groups of channels. Each group has its own smallest value and step.
What is kept in memory is the rounded numbers in the model's dtype, so this shows what rounding
costs; it saves no bytes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from still_memory.compactors.base import Compactor
from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts
from still_memory.span import Span

GROUP = 32  # numbers that share a smallest value and a step, as in the paper


@dataclass(frozen=True)
class QuantisedCompactor:
    """`inner`'s slots, each number one of 2 ** `bits` in its group."""

    inner: Compactor
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CompactorError(f"numbers of {self.bits} bits are no INT8 or INT4: give 4 or 8")

    @property
    def identity(self) -> CompactorIdentity:
        inner = self.inner.identity
        return inner.model_copy(update={"method": f"{inner.method}+int{self.bits}"})

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        mine, inner = self.identity.address, self.inner.identity.address
        # A compactor knows slots of its own by their address, rounded or not.
        own = [replace(s, compactor=inner) if s.compactor == mine else s for s in spans]
        span = self.inner.compact(own, slots, longest)
        layers = tuple(
            replace(layer, keys=rounded(layer.keys, self.bits, 1),
                    values=rounded(layer.values, self.bits, 2))
            for layer in span.layers
        )  # fmt: skip
        return replace(span, layers=layers, compactor=mine)


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """x (H, n, d) on an even grid of 2 ** `bits` steps for each GROUP numbers along `dim`."""
    n = x.shape[dim]
    if not n:
        return x
    moved = x.float().movedim(dim, -1)
    edge = moved[..., -1:]
    padded = F.pad(moved, (0, -n % GROUP))
    padded[..., n:] = edge  # no zeros: they would widen the last group
    groups = padded.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    grid = ((groups - low) / step).round() * step + low
    return grid.flatten(-2)[..., :n].movedim(-1, dim).to(x.dtype)
