"""Methods by name, and at which ratios and numbers of rounds each is measured.

Every compactor is blind: it sees no question before it compacts. Cartridges see none either, but
are trained on each context by itself, and so listed apart. The others are rulers: what they keep
says how much could be kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from still_agent.compactor import OWN
from still_agent.schedule import ScheduleName
from still_memory.compactors import TRAINING_FREE
from still_memory.errors import InputError

BLIND = (OWN, *TRAINING_FREE)
CARTRIDGES = "cartridges"
TOLD_OPTIMISED = "told-optimised"
ENDS = ("full", "none")  # what no ratio changes
RULERS = (
    *ENDS, "truncate", "summary", "told-selection", "told-attention-matching", TOLD_OPTIMISED,
)  # fmt: skip
METHODS = (*BLIND, *(f"{OWN}+int{bits}" for bits in (8, 4)), CARTRIDGES, *RULERS)
SCHEDULED = r"\+(tiered|append)(?=$|\+)"  # any blind method may be followed by it,
SHARED = r"\+shares(?=$|\+)"  # by this,
ROUNDED = r"\+int[48]$"  # and by this
FEWEST = 4  # slots
SHORTEST = 4  # tokens of a chunk


def rounded(method: str) -> bool:
    """Whether what it writes is rounded."""
    return re.search(ROUNDED, method) is not None


def shared(method: str) -> bool:
    """Whether its slots are dealt out to layers unequally."""
    return re.search(SHARED, method) is not None


def schedule_of(method: str) -> ScheduleName:
    """When it compacts what, where a context is read in chunks."""
    found = re.search(SCHEDULED, method)
    return cast("ScheduleName", found[1]) if found else "rolling"


def scheduled(method: str, schedule: str) -> str:
    """The name of a method under a schedule, unless it names one itself."""
    if schedule == "rolling" or schedule_of(method) != "rolling":
        return method
    name = plain(method)
    return f"{name}+{schedule}{method[len(name) :]}"


def compactor_of(method: str) -> str:
    """Its name without a schedule: what writes the slots."""
    return re.sub(SCHEDULED, "", method)


def plain(method: str) -> str:
    """Its name with nothing behind it."""
    return re.sub(SHARED, "", re.sub(ROUNDED, "", compactor_of(method)))


def own(method: str) -> bool:
    """Whether it is the model's own compactor, whatever stands behind its name."""
    return plain(method) == OWN


def trained(method: str) -> bool:
    """Whether it is the folder of a trained rival, whatever stands behind its name."""
    return plain(method) not in METHODS and Path(plain(method)).is_dir()


def blind(method: str) -> bool:
    """Whether it is a compactor that sees no question, whatever stands behind its name."""
    return plain(method) in BLIND or trained(method)


def slots_of(tokens: int, ratio: float) -> int:
    return max(FEWEST, int(tokens / ratio))


def require_known(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """InputError for a name that is none, and for no name at all."""
    if not given:
        raise InputError(f"no {what} is named: give some of {', '.join(known)}")
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            f"there is no {what} {unknown[0]!r}; the known ones are {', '.join(known)}"
        )


def require_positive(what: str, numbers: tuple[float, ...]) -> None:
    """InputError for numbers below 1, for what is no number, and for none at all."""
    if not numbers:
        raise InputError(f"no {what} is given: give one or more")
    if bad := [n for n in numbers if not 1 <= n < math.inf]:
        raise InputError(f"a {what} of {bad[0]} makes no sense: give 1 or more")


def require_schedules(given: tuple[str, ...]) -> None:
    """InputError for a schedule that is none."""
    require_known("schedule", given, get_args(ScheduleName))


@dataclass(frozen=True)
class Cells:
    """Which methods, at which ratios and after how many rounds.

    Raises InputError for a method that is none and for numbers that make no sense.
    """

    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = (8.0,)
    rounds: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        known = tuple(OWN if blind(method) else method for method in self.methods)
        require_known("method", known, METHODS)
        require_positive("ratio", self.ratios)
        require_positive("number of rounds", self.rounds)

    def cells(self, method: str) -> Iterator[tuple[float, int]]:
        """(ratio, rounds) at which `method` is measured; a ruler that has none, once."""
        if method in ENDS:
            yield 1.0, 1
            return
        for ratio in self.ratios:
            for rounds in self.rounds if blind(method) else (1,):
                yield ratio, rounds

    def require_slots(self, tokens: int) -> None:
        """InputError if a context of `tokens` tokens is too short for a ratio or for the rounds."""
        if self.ratios and max(self.ratios) > tokens / FEWEST:
            raise InputError(
                f"a ratio of {max(self.ratios):g} leaves {tokens} tokens fewer than {FEWEST} "
                "slots: ask for a lower one, or for longer contexts"
            )
        if max(self.rounds) > tokens / SHORTEST:
            raise InputError(
                f"{max(self.rounds)} rounds leave chunks of {tokens} tokens fewer than {SHORTEST}: "
                "ask for fewer, or for longer contexts"
            )
        appended = any(schedule_of(method) == "append" for method in self.methods)
        if appended and (few := slots_of(tokens, max(self.ratios))) < max(self.rounds):
            raise InputError(
                f"{max(self.rounds)} chunks that are appended take as many slots, and of {tokens} "
                f"tokens a ratio of {max(self.ratios):g} leaves {few}: ask for fewer rounds, for a "
                "lower ratio, or leave append out"
            )
