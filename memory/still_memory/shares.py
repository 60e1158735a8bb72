"""How a number of slots is dealt out to layers and heads.

Layers need memory unequally: in the reference model one layer looks up what was said, and the
others do well with very little. So a compactor may name shares, measured once for its model, and
each layer of what it writes gets its part. What a budget calls n slots is n in the mean layer: the
bytes of all layers together are the same, whatever the shares. The largest layer then takes more
positions than the mean one, which is why the window of the model limits how unequal they can be.

Heads of one layer stand in one tensor, padded to the largest; shares of heads within a layer say
which slots are worth having, and save no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from still_memory.errors import CompactorError
from still_memory.span import Span

Shares = tuple[tuple[float, ...], ...]  # [layer][kv_head], in any unit; () is the same for all
ByRatio = Mapping[float, Shares]  # for some numbers of tokens a slot
Counts = Sequence[Sequence[int]]  # slots of each [layer][kv_head]


def even(slots: int, most: Sequence[int], heads: int) -> Counts:
    """`slots` for each layer, but no more than its `most`."""
    return [[min(slots, n)] * heads for n in most]


def at_ratio(shares: Shares | ByRatio, ratio: float) -> Shares:
    """The shares for `ratio` tokens a slot: those of the nearest ratios, mixed by its logarithm.

    Beyond the lowest and the highest, theirs. Each layer's part of all counts, whatever the units.
    """
    if not isinstance(shares, Mapping):
        return shares
    below = max((r for r in shares if r <= ratio), default=min(shares))
    above = min((r for r in shares if r >= ratio), default=max(shares))
    if below >= above:
        return shares[above if ratio < below else below]
    weight = math.log(ratio / below) / math.log(above / below)
    low, high = _parts(shares[below]), _parts(shares[above])
    return tuple(
        tuple(a + (b - a) * weight for a, b in zip(*layers, strict=True))
        for layers in zip(low, high, strict=True)
    )


def _parts(shares: Shares) -> Shares:
    """`shares` in the unit in which the largest heads of all layers are 1 together."""
    total = sum(map(max, shares))
    return tuple(tuple(share / total for share in layer) for layer in shares)


def dealt(slots: int, shares: Shares, most: Sequence[int]) -> Counts:
    """`slots` for the mean layer, dealt out by `shares`; no layer gets more than its `most`.

    What a layer has no use for goes to the others. Each head gets one slot at least. Raises
    CompactorError for shares of another model, and for those that are no shares: below zero, not
    finite, or all zero.
    """
    wanted = [max(layer, default=-1.0) for layer in shares]
    sound = all(math.isfinite(share) and share >= 0 for layer in shares for share in layer)
    if len(shares) != len(most) or not sound or not max(wanted) > 0 <= min(wanted):
        raise CompactorError(
            f"shares {shares} do not fit {len(most)} layers: give one number a KV head in each, "
            "none below zero and not all zero"
        )
    given = [1] * len(wanted)  # the one that each gets is dealt first, so that no sum is passed
    left = (slots - 1) * len(wanted)
    open_ = {n for n, share in enumerate(wanted) if share > 0 and most[n] > 1}
    while open_ and left > 0:
        unit = left / sum(wanted[n] for n in open_)
        full = {n for n in open_ if given[n] + unit * wanted[n] >= most[n]}
        for n in full or open_:
            more = min(most[n] - given[n], int(unit * wanted[n]))
            given[n] += more
            left -= more
        open_ = open_ - full if full else set()
    return [
        [max(1, round(count * share / max(layer))) if share else 1 for share in layer]
        for count, layer in zip(given, shares, strict=True)
    ]


def most(spans: Sequence[Span], longest: int | None) -> list[int]:
    """The most that each layer can get: what it has in `spans`, and `longest`."""
    held = [sum(map(len, layer)) for layer in zip(*(s.layers for s in spans), strict=True)]
    return [n if longest is None else min(n, longest) for n in held]


def counted(slots: int | Counts, layers: int, heads: int) -> Tensor:
    """Slots of each head as a tensor (L, H_kv), from one number for all or from one for each.

    Raises CompactorError for fewer than one slot, and for numbers of another model's heads.
    """
    each = [[slots] * heads] * layers if isinstance(slots, int) else slots
    if [len(layer) for layer in each] != [heads] * layers:
        raise CompactorError(
            f"slots for {[len(layer) for layer in each]} heads do not fit {layers} layers of "
            f"{heads}: give one number a KV head"
        )
    counts = torch.tensor([[int(n) for n in layer] for layer in each])
    if int(counts.min()) < 1:
        raise CompactorError("cannot keep fewer than one slot a head: ask for one or more")
    return counts


def best(worth: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The slots with the highest `worth` (..., H, S) in their order, `counts` (..., H) of a head.

    Returns indices (..., H, t), t of the largest head, and which of them are beyond a head's count;
    these stand at the end.
    """
    total = worth.shape[-1]
    ranked = worth.topk(min(int(counts.max()), total), dim=-1).indices
    beyond = torch.arange(ranked.shape[-1], device=worth.device) >= counts[..., None]
    order = (ranked + total * beyond).sort(dim=-1).values
    return order % total, order >= total
