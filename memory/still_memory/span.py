"""Spans: runs of the conversation as KV slots.

A span stands for tokens `[start, end)`. A raw span has one slot a token; a compact one has
fewer. Spans are never changed. A span keeps its keys as they were first produced: a raw
span's carry the rotation of the positions they were computed at, a compactor's own keys carry
none. Where a slot is *placed* belongs to the entry that places it, never to the span.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """One layer's slots.

    A slot whose bias is minus infinity is empty: heads of one layer may hold different
    numbers of slots, padded to the largest head.
    """

    keys: Tensor  # (H_kv, S, d)
    values: Tensor  # (H_kv, S, d)
    positions: Tensor  # (H_kv, S) float32: the token each slot stands at, as a logical position
    bias: Tensor | None = None  # (H_kv, S) float32, added to the attention logit
    salience: Tensor | None = None  # (H_kv, S) float32, a compactor's own note of a slot's worth

    def __len__(self) -> int:
        return self.keys.shape[1]

    def cut(self, low: int, high: int) -> Slots:
        """A view of slots `[low, high)`."""
        return Slots(**{name: t[:, low:high] for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens `[start, end)` as slots, for every layer that keeps a whole cache."""

    start: int
    end: int
    layers: tuple[Slots, ...]
    rotated_at: int | None  # raw: slot i is rotated at position rotated_at + i; None: not rotated
    rounds: int = 0  # compactions behind the oldest token in it; 0 is raw
    compactor: str | None = None  # address of the compactor that wrote it
    ids: tuple[int, ...] | None = None  # raw: the tokens themselves, where they are known
    codec: str | None = None  # that its numbers are settled in (see `codec`); None: not yet
    coded: tuple[bytes, ...] = ()  # where that has rounded them, the bytes of each layer

    def __len__(self) -> int:
        """Positions that its slots take where they are placed: those of the largest layer."""
        return max(len(s) for s in self.layers)

    @property
    def slots(self) -> int:
        """Slots held in the mean layer, rounded up: what it takes of a budget."""
        return -(-sum(len(s) for s in self.layers) // max(len(self.layers), 1))

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def raw(self) -> bool:
        return self.rounds == 0

    @property
    def nbytes(self) -> int:
        tensors = (t for s in self.layers for t in s.tensors().values())
        return sum(t.nbytes for t in tensors) + sum(map(len, self.coded))

    def cut(self, low: int, high: int) -> Span:
        """Tokens `[low, high)` of a raw span, as views."""
        if not (self.raw and self.start <= low < high <= self.end):
            raise ValueError(f"cannot cut [{low}, {high}) out of {self}")
        a, b = low - self.start, high - self.start
        return replace(
            self,
            start=low,
            end=high,
            layers=tuple(s.cut(a, b) for s in self.layers),
            rotated_at=None if self.rotated_at is None else self.rotated_at + a,
            ids=None if self.ids is None else self.ids[a:b],
            codec=None,
            coded=(),
        )

    def __str__(self) -> str:
        kind = "raw" if self.raw else f"compact, round {self.rounds}"
        return f"Span[{self.start}, {self.end}) {kind}, {self.slots} slots"


def raw_slots(keys: Tensor, values: Tensor, start: int) -> Slots:
    """Slots of freshly computed keys and values, each `(H_kv, n, d)`, from token `start` on."""
    heads, n, _ = keys.shape
    positions = torch.arange(start, start + n, dtype=torch.float32, device=keys.device)
    return Slots(keys, values, positions.expand(heads, n))
