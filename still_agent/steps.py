"""Which compactions a turn took, as the ledger keeps them.

Where a compaction falls follows from the ledger and from the parts: how the tokens came in, the
slots held before, the budget and its schedule. The budget and the compactor are not of the ledger,
and may change whenever a store is opened. So a turn in which something was compacted logs both,
and every boundary: a turn that is taken in again is held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import JsonValue

from still_agent.budget import Budget
from still_agent.events import Compaction, OnCompaction
from still_memory.codec import EXACT

Log = dict[str, JsonValue]
KEYS = ("compactions", "steps", "compactor", "budget", "codec")


class Steps:
    """Hears of each compaction of a state, notes it, and passes it on.

    compactor: gives the address of the compactor in use.
    """

    def __init__(
        self,
        budget: Budget,
        compactor: Callable[[], str],
        on_compaction: OnCompaction | None,
        codec: str = EXACT,
    ) -> None:
        self._budget, self._compactor, self._observer = budget, compactor, on_compaction
        self._rounding: Log = {} if codec == EXACT else {"codec": codec}
        self._taken: list[JsonValue] = []
        self.watcher: OnCompaction | None = None  # of this one state

    def __call__(self, event: Compaction) -> None:
        self._taken.append(
            [
                event.tokens_start,
                event.tokens_end,
                event.slots_before,
                event.slots_after,
                event.level,
            ]
        )
        for observer in (self._observer, self.watcher):
            if observer is not None:
                observer(event)

    def begin(self) -> None:
        """A turn begins: what an earlier one left, perhaps undone, is not of it."""
        self._taken = []

    def log(self) -> Log:
        """What the turn's usage says of its compactions; without any, only that.

        And of the codec, where it rounds: that shapes what a turn leaves behind also without any.
        """
        told: Log = {"compactions": len(self._taken), **self._rounding}
        if self._taken:
            told |= {"steps": list(self._taken), **self.parts()}
        return told

    def parts(self) -> Log:
        """What decides the steps, beside the model and the ledger."""
        return {
            "compactor": self._compactor(),
            "budget": self._budget.model_dump(mode="json", exclude_none=True),
            **self._rounding,
        }


def differences(logged: Mapping[str, JsonValue], now: Log) -> set[str]:
    """Which of `KEYS` the ledger has otherwise. What it does not hold, it cannot contradict.

    Turns from before boundaries were logged have their count alone. One that names no codec is
    of the exact one.
    """
    told = {"codec": EXACT, **logged} if "compactions" in logged else logged
    given: Log = {"codec": EXACT, **now}
    return {key for key in KEYS if key in told and not _agrees(told[key], given.get(key))}


def _agrees(logged: JsonValue, now: JsonValue) -> bool:
    if isinstance(logged, dict) and isinstance(now, dict):  # a later version may tell more
        return all(now.get(key) == value for key, value in logged.items())
    return logged == now
