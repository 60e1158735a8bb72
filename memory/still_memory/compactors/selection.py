"""Compactors that keep some slots as they are and drop the rest.

They need no training and work with any model at once: the floor that a learned compactor is
measured against. A method says which slots of a layer to keep; each head may keep others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts, best, counted
from still_memory.span import Slots, Span


class Selection(ABC):
    """Keeps the slots with the highest scores, in their order."""

    remembers: ClassVar[bool] = False  # whether a kept slot carries its score to the next round

    @property
    @abstractmethod
    def identity(self) -> CompactorIdentity: ...

    @abstractmethod
    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        """How much each slot deserves to stay, `(H_kv, S)` a layer in fp32.

        `layers` are the slots of `spans`, end to end.
        """

    def newest(self, count: int) -> int:
        """How many of `count` slots go to the newest ones, whatever their scores."""
        return 0

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        if not spans:
            raise CompactorError("there is no span to compact: give one or more")
        layers = [join(layer) for layer in zip(*(span.layers for span in spans), strict=True)]
        counts = counted(slots, len(layers), len(layers[0].keys)).to(layers[0].keys.device)
        scores = self.scores(spans, layers)
        return Span(
            start=spans[0].start,
            end=spans[-1].end,
            layers=tuple(self._kept(*each) for each in zip(layers, scores, counts, strict=True)),
            rotated_at=None,
            rounds=1 + max(span.rounds for span in spans),
            compactor=self.identity.address,
        )

    def _kept(self, slots: Slots, scores: Tensor, counts: Tensor) -> Slots:
        if self.remembers:
            slots = replace(slots, salience=scores)
        if len(slots) <= int(counts.min()):
            return slots
        if newest := self.newest(int(counts.min())):
            scores = scores.clone()
            scores[:, -newest:] = torch.inf
        if slots.bias is not None:  # an empty slot goes first
            scores = scores.masked_fill(slots.bias == -torch.inf, -torch.inf)
        kept, beyond = best(scores, counts)  # (H_kv, t)
        row = torch.arange(len(kept), device=kept.device)[:, None]
        short = Slots(**{name: tensor[row, kept] for name, tensor in slots.tensors().items()})
        if not beyond.any():
            return short
        bias = torch.zeros_like(short.positions) if short.bias is None else short.bias
        return replace(short, bias=bias.masked_fill(beyond, -torch.inf))


def remembered(spans: Sequence[Span], layer: int, compactor: str) -> Tensor:
    """The scores `(H_kv, S)` that slots carry from the compactor of this address; NaN elsewhere."""
    return torch.cat(
        [
            torch.full_like(s.positions, torch.nan)
            if s.salience is None or span.compactor != compactor
            else s.salience
            for span, s in ((span, span.layers[layer]) for span in spans)
        ],
        dim=1,
    )


def ranked_in_the_middle(scores: Tensor) -> Tensor:
    """`scores` with their median in place of NaN: slots of which nothing is known."""
    return scores.where(~scores.isnan(), scores.nanmedian().nan_to_num())


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
