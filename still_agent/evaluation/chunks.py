"""A context taken in chunk by chunk, and compacted after each as a session's schedule would.

However many the chunks, as many slots are there at the end for all that was read, and no token
is left raw: only the schedule and the rounds differ from one compaction of the whole.

rolling   memory and the chunk become memory again, once they are more than it holds.
append    a chunk becomes a span, once, with its part of the slots.
tiered    the same while that makes no more than `SPANS` spans; from there on each is of the size of
          which so many fill memory, and they merge by `FAN_IN`, as a session's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from still_agent.budget import LEVELS, Shares
from still_agent.rolling import RollingState
from still_agent.schedule import Plan, ScheduleName, Tiered

FAN_IN = 2  # a few dozen slots make no more than ten spans worth the name
SPANS = LEVELS * FAN_IN


@dataclass(frozen=True)
class Chunks:
    """`tokens` tokens in `count` even chunks, to be remembered in `slots` slots."""

    tokens: int
    count: int
    slots: int

    def __iter__(self) -> Iterator[slice]:
        """The tokens of each."""
        ends = (self.tokens * n // self.count for n in range(self.count + 1))
        return (slice(*both) for both in pairwise(ends))

    @property
    def size(self) -> int:
        """Tokens of the largest."""
        return -(-self.tokens // self.count)

    def compact(self, state: RollingState, schedule: ScheduleName) -> None:
        """What `schedule` does once `state` has read a chunk."""
        if schedule == "rolling":
            state.compact(self.slots)
        elif schedule == "append" or self.count <= SPANS:
            self._append(state)
        else:
            span = max(1, min(self.slots // SPANS, self.size // 2))
            tiered = Tiered(Shares(self.slots, self.size, lookahead=0, span=span), FAN_IN)
            while tail := state.shares["tail"]:
                self._carry_out(state, tiered.plan(state.memory, tail))

    def _append(self, state: RollingState) -> None:
        """What the chunks so far have not used of their parts is the next one's."""
        memory, tail = state.memory, state.shares["tail"]
        part = self.slots * state.length // self.tokens - sum(held.slots for held in memory)
        if part:  # a chunk worth less than a slot waits for the next one
            self._carry_out(state, Plan(len(memory), len(memory), tail, part, level=0))

    def _carry_out(self, state: RollingState, plan: Plan) -> None:
        """All spans together may take the positions that a chunk leaves of the window."""
        most = state.model.window - self.size
        state.carry_out(plan, max(plan.slots, plan.slots * most // self.slots))
