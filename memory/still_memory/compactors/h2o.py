"""H2O: heavy hitters, the slots that have received most attention (arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from still_memory.compactors.looks import Looks, Reader, told
from still_memory.compactors.selection import Selection, remembered
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class H2OCompactor(Selection):
    """The paper's halves: `recent` of the slots go to the newest, the rest to heavy hitters.

    A slot's score is the attention it has received, from every query that could see it, on
    average: a sum alone would only tell how old it is. Kept slots keep theirs and add to it.
    """

    remembers: ClassVar[bool] = True
    reader: Reader = field(repr=False)
    recent: float = 0.5

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="h2o", config=f"recent={self.recent}")

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        compact, raw, ids = told(spans)
        looks = self.reader.look(compact, ids) if ids else [None] * len(layers)
        mine = self.identity.address
        begun = raw[0].start if raw else spans[-1].end
        return [
            self._received(look, slots, remembered(spans, n, mine), begun)
            for n, (look, slots) in enumerate(zip(looks, layers, strict=True))
        ]

    def newest(self, count: int) -> int:
        return int(self.recent * count)

    def _received(self, look: Looks | None, slots: Slots, before: Tensor, begun: int) -> Tensor:
        had = (begun - slots.positions).clamp(min=0).masked_fill(before.isnan(), 0.0)
        total, seen = before.nan_to_num(0.0) * had, had
        if look is not None:
            for weights in look.weights():
                total = total + weights.mean(1).sum(1)
            n, held = look.queries.shape[1], total.shape[1]
            seen = seen + torch.arange(held, 0, -1, device=seen.device).clamp(max=n)
        return total / seen.clamp(min=1)
