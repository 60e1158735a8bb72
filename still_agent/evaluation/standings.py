"""What rows say: means with intervals, Still's lead, plots."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from still_agent.compactor import OWN
from still_agent.evaluation.methods import CARTRIDGES, RULERS, rounded, schedule_of
from still_agent.evaluation.rows import Row
from still_agent.evaluation.ruler import TASKS

RESAMPLES = 1000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Standing:
    """One method at one length, ratio and number of rounds, over the contexts of some tasks."""

    tasks: str
    length: int  # 0: of any
    method: str
    ratio: float
    rounds: int
    contexts: int
    score: float
    interval: Interval  # 95 %, over contexts
    share_of_full: float | None
    seconds: float  # of reading and compacting, median


@dataclass(frozen=True)
class Lead:
    """Still's score less that of the strongest blind rival of the cell, on the same contexts.

    No rival here is trained on the context itself: cartridges are not among them.
    """

    tasks: str
    length: int
    ratio: float
    rounds: int
    rival: str
    lead: float
    interval: Interval


def families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by task, and over all tasks that a trained method has seen the like of, or has not.

    A user's data sets are no tasks: they are summed up where there are several.
    """
    found: dict[str, list[Row]] = defaultdict(list)
    data: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["length"] and (task := TASKS.get(row["task"])):
            found[row["task"]].append(row)
            found["all, trained" if task.trained else "all, never trained"].append(row)
        else:
            data[row["task"]].append(row)
    if len(data) > 1:
        found["all, data sets"] = [row for some in data.values() for row in some]
    return {**found, **data}


def standings(rows: Sequence[Row]) -> list[Standing]:
    found = []
    for tasks, some in families(rows).items():
        cells = _cells(some)
        for (length, method, ratio, rounds), scores in cells.items():
            values = list(scores.values())
            full = cells.get((length, "full", 1.0, 1))
            whole = mean(full.values()) if full else 0.0
            times = sorted(
                row["seconds"] for row in some
                if (row["length"], row["method"], row["ratio"], row["rounds"])
                == (length, method, ratio, rounds)
            )  # fmt: skip
            found.append(
                Standing(
                    tasks, length, method, ratio, rounds, len(values), mean(values),
                    interval(values), mean(values) / whole if whole else None,
                    times[len(times) // 2],
                )
            )  # fmt: skip
    return found


def is_rival(method: str) -> bool:
    """Whether Still is compared with it: blind, not trained on each context, not rounded, and
    under the same schedule.
    """
    listed = method in (OWN, CARTRIDGES, *RULERS)
    return not listed and not rounded(method) and schedule_of(method) == "rolling"


def leads(rows: Sequence[Row]) -> list[Lead]:
    found = []
    for tasks, some in families(rows).items():
        cells = _cells(some)
        for (length, method, ratio, rounds), mine in cells.items():
            if method != OWN:
                continue
            shared = {
                cell[1]: [(mine[place], theirs[place]) for place in mine.keys() & theirs]
                for cell, theirs in cells.items()
                if cell == (length, cell[1], ratio, rounds) and is_rival(cell[1])
            }
            rivals = {rival: pairs for rival, pairs in shared.items() if pairs}
            if not rivals:
                continue
            lead = {rival: [ours - theirs for ours, theirs in rivals[rival]] for rival in rivals}
            best = min(lead, key=lambda rival: mean(lead[rival]))
            found.append(
                Lead(tasks, length, ratio, rounds, best, mean(lead[best]), interval(lead[best]))
            )
    return found


def interval(values: Sequence[float]) -> Interval:
    """95 % of the mean, by bootstrap; the same every time."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """As JSON holds it."""
    return {
        "standings": [asdict(s) for s in standings(rows)],
        "leads": [asdict(lead) for lead in leads(rows)],
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Score against ratio, against seconds, against rounds: over all tasks, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = standings(rows)
    every = [s for s in found if s.tasks.startswith("all, ")] or found
    kinds = sorted({s.tasks for s in every})
    top = max(s.interval[1] for s in every) or 1.0
    figure = Figure(figsize=(14, 4.5 * len(kinds)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), 3, squeeze=False)
    axis: tuple[tuple[str, Callable[[Standing], float], Callable[[Standing], bool]], ...] = (
        ("ratio", lambda s: s.ratio, lambda s: s.rounds == 1),
        ("seconds to read and compact", lambda s: s.seconds, lambda s: s.rounds == 1),
        ("chunks", lambda s: s.rounds, lambda s: s.ratio == max(x.ratio for x in every)),
    )
    for kind, line in zip(kinds, panels, strict=True):
        mine = [s for s in every if s.tasks == kind]
        longest = max(s.length for s in mine)
        for axes, (name, x, taken) in zip(line, axis, strict=True):
            for method in dict.fromkeys(s.method for s in mine):
                some = [s for s in mine if s.method == method and s.length == longest and taken(s)]
                some.sort(key=x)
                low = [s.score - s.interval[0] for s in some]
                high = [s.interval[1] - s.score for s in some]
                axes.errorbar(
                    [x(s) for s in some], [s.score for s in some], yerr=[low, high], marker="o",
                    markersize=3, linewidth=2 if method == OWN else 0.9, label=method,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_ylim(-0.02 * top, 1.02 * top)
            axes.set_xlabel(name)
            where = f"{kind}, {longest} tokens" if longest else kind
            axes.set_title(where, fontsize="medium")
        line[0].set_ylabel("score")
        line[-1].legend(fontsize="x-small", ncols=2)
    figure.savefig(path)


def _cells(rows: Iterable[Row]) -> dict[tuple[int, str, float, int], dict[Any, float]]:
    """The score of each context, by (length, method, ratio, rounds)."""
    cells: dict[tuple[int, str, float, int], dict[Any, float]] = defaultdict(dict)
    for row in rows:
        cell = row["length"], row["method"], row["ratio"], row["rounds"]
        cells[cell][row["task"], row["seed"], row["sample"]] = mean(row["scores"])
    return cells
