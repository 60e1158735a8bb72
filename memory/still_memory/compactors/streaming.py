"""StreamingLLM: the first slots, which soak up attention, and the newest (arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from still_memory.compactors.selection import Selection
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class StreamingCompactor(Selection):
    """Keeps the `sinks` oldest slots and fills up with the newest."""

    sinks: int = 4

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="streaming", config=f"sinks={self.sinks}")

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        return [self._age(slots) for slots in layers]

    def _age(self, slots: Slots) -> Tensor:
        order = torch.arange(len(slots), dtype=torch.float32, device=slots.keys.device)
        order[: self.sinks] += len(slots)
        return order.expand_as(slots.positions)
