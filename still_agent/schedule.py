"""What to compact next, decided from lengths alone.

A schedule is asked when the budget is full, and answers with one `Plan`; it is asked again
until there is room. It never sees a tensor, so its promises are checked over millions of
tokens in a moment: the budget holds, no token is lost or taken twice, every plan frees slots.

rolling   memory and the next chunk become memory again. Memory is filled with raw tokens
          first; after that a token goes through T / chunk rounds.
tiered    a chunk becomes a small span, `fan_in` spans of a level become one of the next, as
          in a log-structured merge tree, but lazily: only when memory's share is full, and
          lowest level first, so that memory is used whole and all ages keep an even ratio.
          When nothing can move up, the two oldest spans merge in place. About log(T) rounds.
append    each chunk becomes a span of its own, once (Still, arXiv 2606.07878), at the ratio
          that `horizon` tokens need; past that, BudgetError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from still_memory.errors import BudgetError

if TYPE_CHECKING:  # so that a command line may name schedules without loading pydantic
    from still_agent.budget import Budget, Shares

ScheduleName = Literal["rolling", "tiered", "append"]


@dataclass(frozen=True)
class Held:
    """A span of memory, as far as a schedule looks at it."""

    slots: int
    level: int


@dataclass(frozen=True)
class Plan:
    """Memory's spans `[low, high)` and the `tokens` oldest raw ones become one span."""

    low: int
    high: int
    tokens: int  # not 0 only if `high` is the end of memory
    slots: int
    level: int


class Schedule(Protocol):
    def plan(self, memory: Sequence[Held], tail: int) -> Plan:
        """The next compaction, given memory's spans, oldest first, and the tail's tokens."""
        ...


def schedule_for(budget: Budget, pinned: int, window: int | None = None) -> Schedule:
    """The schedule of `budget` beside a pinned prefix of `pinned` tokens; see `Budget.shares`."""
    shares = budget.shares(pinned, window)
    if budget.schedule == "rolling":
        return Rolling(shares)
    if budget.schedule == "tiered":
        return Tiered(shares, budget.fan_in)
    return Append(shares)


@dataclass(frozen=True)
class Rolling:
    shares: Shares

    def plan(self, memory: Sequence[Held], tail: int) -> Plan:
        shares = self.shares
        used = sum(held.slots for held in memory)
        # The first time memory is empty, and takes its own share of raw tokens with the chunk.
        wanted = shares.memory + shares.chunk - used
        tokens = max(0, min(wanted, tail - shares.lookahead))
        return Plan(0, len(memory), tokens, shares.memory, level=0)


@dataclass(frozen=True)
class Tiered:
    shares: Shares
    fan_in: int

    def plan(self, memory: Sequence[Held], tail: int) -> Plan:
        shares, count = self.shares, len(memory)
        if sum(held.slots for held in memory) + shares.span <= shares.memory:
            return Plan(count, count, shares.chunk, shares.span, level=0)
        full = [low for low in range(count - self.fan_in + 1) if self._alike(memory, low)]
        if full:
            low = min(full, key=lambda at: memory[at].level)
            return Plan(low, low + self.fan_in, 0, shares.span, memory[low].level + 1)
        if count < 2 or memory[0].slots + memory[1].slots <= shares.span:
            # Saved under another schedule or budget: all of it becomes one span.
            tokens = max(0, min(shares.chunk, tail - shares.lookahead))
            return Plan(0, count, tokens, shares.memory, level=0)
        a, b = memory[:2]
        slots = max(shares.span, a.slots + b.slots - shares.span)
        return Plan(0, 2, 0, slots, max(a.level, b.level))

    def _alike(self, memory: Sequence[Held], low: int) -> bool:
        group, span = memory[low : low + self.fan_in], self.shares.span
        even = all(h.level == group[0].level and h.slots <= span for h in group)
        return even and sum(h.slots for h in group) > span


@dataclass(frozen=True)
class Append:
    shares: Shares

    def plan(self, memory: Sequence[Held], tail: int) -> Plan:
        shares, count = self.shares, len(memory)
        if sum(held.slots for held in memory) + shares.span > shares.memory:
            raise BudgetError(
                'the schedule "append" has reached the end of its horizon: its memory of '
                f"{shares.memory} slots is full. Plan for more with a larger horizon (and slots), "
                'or load the agent with the schedule "tiered", which has no end'
            )
        return Plan(count, count, shares.chunk, shares.span, level=0)
