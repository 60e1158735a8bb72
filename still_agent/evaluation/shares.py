"""Any compactor with unequal layers: what Still gets from its shares, its rivals may have, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from still_agent.text import file_text
from still_memory.compactors import Compactor
from still_memory.errors import InputError
from still_memory.identity import CompactorIdentity
from still_memory.shares import ByRatio, Counts, Shares, at_ratio, dealt, most
from still_memory.span import Span


@dataclass(frozen=True)
class SharedOut:
    """`inner`, but slots are dealt out by `shares`."""

    inner: Compactor
    shares: Shares | ByRatio

    @property
    def identity(self) -> CompactorIdentity:
        return self.inner.identity

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        if isinstance(slots, int):
            tokens = spans[-1].end - spans[0].start
            slots = dealt(slots, at_ratio(self.shares, tokens / slots), most(spans, longest))
        return self.inner.compact(spans, slots)


def shares_of(file: Path) -> Shares:
    """The shares of `[layer][kv_head]` that a JSON file lists; InputError if it lists none."""
    try:
        return tuple(tuple(map(float, layer)) for layer in json.loads(file_text(file)))
    except (ValueError, TypeError) as e:
        raise InputError(f"{file} holds no list of numbers for each layer: {e}") from e
