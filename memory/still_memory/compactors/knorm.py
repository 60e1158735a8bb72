"""KNorm: the slots whose keys have the smallest norms (arXiv 2406.11430).

A small key norm goes with much attention in models without QK norm. Qwen3 normalises its keys,
so all norms are nearly equal there and this is little better than chance: a floor, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from still_memory.compactors.selection import Selection
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class KNormCompactor(Selection):
    """Keeps the slots with the smallest key norms, each head its own."""

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="knorm", config="")

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        return [-slots.keys.float().norm(dim=-1) for slots in layers]
