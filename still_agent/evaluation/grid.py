"""A grid of measurements: task x length x seed x method x ratio x rounds, one row a context.

Every method gets the same contexts, the same slots and the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from still_agent.evaluation.bench import ROOM, Bench, Item, Report
from still_agent.evaluation.dialogues import Dialogue, Prose, Question
from still_agent.evaluation.methods import Cells, require_known, require_positive
from still_agent.evaluation.rows import PLACE, Row
from still_agent.evaluation.ruler import TASKS, Task, score, sized
from still_memory.errors import InputError


@dataclass(frozen=True)
class Grid(Cells):
    """What to measure.

    Raises InputError for a name that is none and for numbers that make no sense.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024,)
    samples: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_known("task", self.tasks, tuple(TASKS))
        require_positive("length", self.lengths)
        require_positive("number of samples", (self.samples,))
        if not self.seeds:
            raise InputError("no seed is given: give one or more")
        for length in self.lengths:
            self.require_slots(length)


def measure(
    bench: Bench, grid: Grid, prose: Prose, out: Path, report: Report,
    tasks: Mapping[str, Task] = TASKS,
) -> list[Row]:  # fmt: skip
    """All rows of `grid`, those that `out` holds already included.

    Raises InputError if `out` is of another model or cannot be read, or if a length does not fit
    the model's window.
    """
    model, room = bench.model, ROOM + bench.reasoning
    if (longest := max(grid.lengths)) + room > model.window:
        less = "" if room == ROOM else ", or grant less reasoning"
        raise InputError(
            f"a context of {longest} tokens and its question do not fit the window of "
            f"{model.window} that {model.name!r} was trained for: ask for "
            f"{max(model.window - room, 0)} or fewer{less}"
        )

    def item(name: str, length: int, seed: int, sample: int) -> Item:
        place = dict(zip(PLACE, (name, length, seed, sample), strict=True))
        task, drawn = tasks[name], f"{name} {seed} {sample}"
        talk = partial(sized, task, drawn, length, prose, model.tokenizer)
        return Item(place, talk, partial(_scores, part=task.part))

    places = product(grid.tasks, grid.lengths, grid.seeds, range(grid.samples))
    about = {"haystack": prose.digest, **{n: tasks[n].data for n in grid.tasks if tasks[n].data}}
    return bench.measure(grid, [item(*place) for place in places], out, report, about)


def _scores(talk: Dialogue, replies: Sequence[str], *, part: bool) -> Row:
    asked = zip(talk.exam, replies, strict=True)
    return {"scores": [0.0 if outdated(q, said) else score(said, q.expected, part=part)
                       for q, said in asked]}  # fmt: skip


def outdated(question: Question, reply: str) -> bool:
    """Whether the reply gives a value that was corrected."""
    fact = question.fact
    return fact is not None and fact.corrected and any(v in reply for v in fact.values[:-1])
