"""Uniform stride: evenly spaced tokens of all that was ever told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from still_memory.compactors.selection import Selection
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span

BITS = 24  # fp32 tells positions apart up to here


@dataclass(frozen=True)
class StrideCompactor(Selection):
    """Tokens rank by their position with its bits reversed (van der Corput 1935).

    The first n in that order are spread evenly for every n, and the first n / 2 are among them:
    so the slots stay even after any number of rounds.
    """

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="stride", config="")

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        return [self._ranks(slots.positions) for slots in layers]

    def _ranks(self, positions: Tensor) -> Tensor:
        bits = torch.arange(BITS, device=positions.device)
        on = (positions.long()[..., None] >> bits) & 1
        return -(on << (BITS - 1 - bits)).sum(-1).float()
