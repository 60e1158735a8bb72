"""Chance: a random sample of all that was ever told, the floor of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from still_memory.compactors.selection import Selection
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class RandomCompactor(Selection):
    """Every token draws a number once and for all, and the highest stay.

    So after any number of rounds what is left is a uniform sample of the whole history
    (reservoir sampling, Vitter 1985).
    """

    seed: int = 0

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="random", config=f"seed={self.seed}")

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        return [self._draws(slots.positions) for slots in layers]

    def _draws(self, positions: Tensor) -> Tensor:
        x = positions.long() * 2654435761 + self.seed * 40503  # an integer hash, twice mixed
        for _ in range(2):
            x = ((x >> 16) ^ x) * 73244475 & 0xFFFFFFFF
        return ((x >> 16) ^ x).float()
