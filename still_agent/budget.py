"""The most slots a session may hold, and how they are shared.

    [ pinned prefix | memory | raw tail ]

The three together never pass `slots`. The pinned prefix takes what it needs. The tail holds at
least one chunk, which the next compaction takes, and the look-ahead, which it must not touch;
whatever memory does not use yet is the tail's too. The defaults give memory 5/8, a chunk 1/4
and the look-ahead 1/16: a large chunk means few rounds, and rounds are what wears memory out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field, model_validator

from still_agent.schedule import ScheduleName
from still_agent.settings import Settings
from still_memory.errors import BudgetError, StillError


@dataclass(frozen=True)
class Shares:
    """A budget laid out for one pinned prefix, in slots (a raw token takes one)."""

    memory: int
    chunk: int
    lookahead: int
    span: int  # of one span that a compaction writes


LEVELS = 5  # tiers that memory has room for before the oldest spans merge in place


class Budget(Settings):
    """How much a session may hold.

    slots: the most slots held at any time, pinned prefix included.
    memory: slots of compacted memory; by default 5/8 of `slots`, less what a long pinned
        prefix needs.
    chunk: raw tokens that one compaction takes in; by default `slots // 4`.
    lookahead: newest tokens that are never compacted; by default `slots // 16`.
    schedule: "rolling" (memory and a chunk become memory again), "tiered" (spans merge by
        `fan_in`, a token goes through about log(T) compactions), or "append" (each chunk is
        compacted once, at the ratio that a conversation of `horizon` tokens needs).

    Raises BudgetError for shares that do not fit.
    """

    error: ClassVar[type[StillError]] = BudgetError

    slots: int = Field(default=1024, ge=16)
    memory: int | None = Field(default=None, ge=2)
    chunk: int | None = Field(default=None, ge=2)
    lookahead: int | None = Field(default=None, ge=0)
    schedule: ScheduleName = "rolling"
    horizon: int | None = Field(default=None, ge=1)
    fan_in: int = Field(default=4, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.schedule == "append" and self.horizon is None:
            raise ValueError(
                'the schedule "append" plans its ratio for a declared length: give '
                'horizon=<tokens>, or choose "rolling" or "tiered", which have no end'
            )
        if self.schedule != "append" and self.horizon is not None:
            raise ValueError(f'horizon belongs to the schedule "append", not {self.schedule!r}')
        self.shares(pinned=0)
        return self

    def shares(self, pinned: int, window: int | None = None) -> Shares:
        """The shares beside a pinned prefix of `pinned` tokens; errors name what fits `window`."""
        chunk = self.chunk or self.slots // 4
        lookahead = self.slots // 16 if self.lookahead is None else self.lookahead
        room = self.slots - pinned - chunk - lookahead
        memory = self.memory or min(self.slots * 5 // 8, room)
        if room < max(memory, 2):
            raise BudgetError(
                f"{self.slots} slots cannot hold a pinned prefix of {pinned} tokens, a chunk of "
                f"{chunk}, a look-ahead of {lookahead} and a memory of {max(memory, 2)}: "
                + self._remedy(pinned, window)
            )
        return Shares(memory, chunk, lookahead, self._span(memory, chunk))

    def _remedy(self, pinned: int, window: int | None) -> str:
        least = self.least(pinned)
        if window is None or least <= window:
            return f"give slots={least} or more, pin less, or make one of them smaller"
        fits = (fewer for fewer in range(pinned - 1, -1, -1) if self.least(fewer) <= window)
        if (most := next(fits, None)) is None:
            return f"make one of them smaller, for the model was trained for {window} in all"
        return (
            f"pin {most} tokens or fewer and give slots={window}, which is what the model was "
            "trained for, or make one of them smaller"
        )

    def least(self, pinned: int) -> int:
        """The fewest slots that hold these shares, as all larger numbers do.

        Shares left to us grow with the slots, by whole slots, so a number may fit and the next not.
        """
        slots = 16
        while (needed := self._needed(slots, pinned)) > slots:
            slots = needed
        slots += 16
        while slots > 16 and self._needed(slots - 1, pinned) < slots:
            slots -= 1
        return slots

    def _needed(self, slots: int, pinned: int) -> int:
        """What a budget of `slots` must hold at least."""
        chunk = self.chunk or slots // 4
        lookahead = slots // 16 if self.lookahead is None else self.lookahead
        return pinned + chunk + lookahead + (self.memory or 2)

    def _span(self, memory: int, chunk: int) -> int:
        if self.schedule == "rolling":
            return memory
        spans = LEVELS * self.fan_in
        if self.horizon is not None:
            raw = self.slots - memory  # tokens that need no compaction, pinned ones included
            spans = max(1, -(-(self.horizon - raw) // chunk))
            if spans > memory:
                raise BudgetError(
                    f"a memory of {memory} slots cannot hold {spans} chunks, which "
                    f"horizon={self.horizon} takes: give horizon={raw + memory * chunk} or less, "
                    "more slots, or a larger chunk"
                )
        return max(1, min(memory // spans, chunk // 2))

    def require_window(self, window: int) -> None:
        """Raise BudgetError if a slot would stand past the positions a model was trained for."""
        if self.slots > window:
            raise BudgetError(
                f"a budget of {self.slots} slots needs as many positions, and the model was "
                f"trained for {window}: give slots={window} or fewer"
            )
