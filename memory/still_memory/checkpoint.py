"""A checkpoint: the whole state of a conversation after a turn, as spans put in order.

An entry says which tokens of a span stand in the state and where its slots are placed; the
span says nothing of either, so that one span serves many checkpoints. Entries join without a
gap: pinned prefix, memory, raw tail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from still_memory.errors import InputError
from still_memory.span import Span

Share = Literal["pinned", "memory", "tail"]
SHARES: tuple[Share, ...] = ("pinned", "memory", "tail")


@dataclass(frozen=True, eq=False)
class Entry:
    """Tokens `[low, high)` of a span, its slots placed densely from position `base` on.

    A raw span may be partly consumed; a compact one stands whole. `level` is the tier of a
    compact span.
    """

    span: Span
    low: int
    high: int
    base: int
    share: Share
    level: int = 0

    def __post_init__(self) -> None:
        span = self.span
        whole = (self.low, self.high) == (span.start, span.end)
        if not (span.start <= self.low < self.high <= span.end and (whole or span.raw)):
            raise InputError(f"tokens [{self.low}, {self.high}) cannot stand for {span}")
        if self.base < 0 or self.level < 0 or self.share not in SHARES:
            raise InputError(
                f"an entry needs base >= 0, level >= 0 and a share of {', '.join(SHARES)}; got "
                f"base {self.base}, level {self.level}, share {self.share!r}"
            )

    @property
    def tokens(self) -> int:
        return self.high - self.low

    @property
    def slots(self) -> int:
        """Slots that stand, in the mean layer: what the entry takes of a budget."""
        return self.tokens if self.span.raw else self.span.slots

    @property
    def positions(self) -> int:
        """Positions that they take: slots of the largest layer."""
        return self.tokens if self.span.raw else len(self.span)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Entries in order, contiguous in tokens from 0 to `length`, and the next-token state."""

    entries: tuple[Entry, ...]
    length: int  # logical tokens
    extra: dict[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at, share = 0, 0
        for entry in self.entries:
            rank = SHARES.index(entry.share)
            if entry.low != at or rank < share:
                raise InputError(
                    f"entries must join in the order {', '.join(SHARES)}: after token {at} came "
                    f"a {entry.share} entry of [{entry.low}, {entry.high})"
                )
            at, share = entry.high, rank
        if at != self.length:
            raise InputError(f"entries end at token {at}, and the checkpoint says {self.length}")

    @property
    def slots(self) -> int:
        """Slots held, in the mean layer of each entry."""
        return sum(entry.slots for entry in self.entries)

    @property
    def positions(self) -> int:
        """Positions taken, which is where the next token stands."""
        return sum(entry.positions for entry in self.entries)
