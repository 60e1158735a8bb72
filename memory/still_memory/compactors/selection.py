"""Compactors that keep some slots as they are and drop the rest.

They need no training and work with any model at once: the floor that a learned compactor is
measured against. A method says which slots of a layer to keep; each head may keep others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


class Selection(ABC):
    """Keeps the slots with the highest scores, in their order."""

    @property
    @abstractmethod
    def identity(self) -> CompactorIdentity: ...

    @abstractmethod
    def scores(self, slots: Slots) -> Tensor:
        """How much each slot of a layer deserves to stay, `(H_kv, S)` in fp32."""

    def compact(self, spans: Sequence[Span], slots: int) -> Span:
        if not spans or slots < 1:
            raise CompactorError(f"cannot keep {slots} slots of {len(spans)} spans: give one each")
        layers = zip(*(span.layers for span in spans), strict=True)
        return Span(
            start=spans[0].start,
            end=spans[-1].end,
            layers=tuple(self._kept(join(layer), slots) for layer in layers),
            rotated_at=None,
            rounds=1 + max(span.rounds for span in spans),
            compactor=self.identity.address,
        )

    def _kept(self, slots: Slots, count: int) -> Slots:
        if len(slots) <= count:
            return slots
        scores = self.scores(slots)  # (H_kv, S)
        if slots.bias is not None:  # an empty slot goes first
            scores = scores.masked_fill(slots.bias == -torch.inf, -torch.inf)
        kept = scores.topk(count, dim=1).indices.sort(dim=1).values  # (H_kv, count)
        row = torch.arange(len(kept), device=kept.device)[:, None]
        return Slots(**{name: tensor[row, kept] for name, tensor in slots.tensors().items()})


def join(parts: Sequence[Slots]) -> Slots:
    """One layer's slots of contiguous spans, end to end."""
    optional = {
        name: torch.cat(
            [p.tensors().get(name, torch.zeros_like(p.positions)) for p in parts], dim=1
        )
        for name in ("bias", "salience")
        if any(name in p.tensors() for p in parts)
    }
    return Slots(
        torch.cat([p.keys for p in parts], dim=1),
        torch.cat([p.values for p in parts], dim=1),
        torch.cat([p.positions for p in parts], dim=1),
        **optional,
    )
