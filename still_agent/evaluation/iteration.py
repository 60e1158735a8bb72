"""What is left after many rounds: each number of chunks against the same context compacted once."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from still_agent.evaluation.methods import blind, compactor_of, schedule_of
from still_agent.evaluation.rows import PLACE, Row, key
from still_agent.evaluation.standings import RESAMPLES, Interval, families, interval
from still_agent.schedule import ScheduleName


@dataclass(frozen=True)
class Iterated:
    """One method under one schedule, over the contexts of some tasks, read in so many chunks."""

    tasks: str
    length: int  # 0: of any
    method: str
    ratio: float
    schedule: ScheduleName
    chunks: int
    compactions: float  # behind a context's most compacted token, mean
    slots: float  # held at the end, mean
    contexts: int
    score: float
    interval: Interval  # 95 %, over contexts
    kept: float | None  # of the score after one chunk, on the same contexts; None if that is 0
    kept_interval: Interval | None


def iteration(rows: Iterable[Row]) -> list[Iterated]:
    """In the order of the rows; nothing where no context was read in several chunks."""
    found = []
    for tasks, some in families(row for row in rows if blind(row["method"])).items():
        cells: dict[tuple[int, str, float], dict[int, list[Row]]] = defaultdict(dict)
        for row in some:
            cell = cells[row["length"], row["method"], row["ratio"]]
            cell.setdefault(row["rounds"], []).append(row)
        for (length, method, ratio), by_chunks in cells.items():
            if len(by_chunks) == 1:
                continue
            once = {key(row, PLACE): mean(row["scores"]) for row in by_chunks.get(1, ())}
            for chunks, measured in sorted(by_chunks.items()):
                scores = [mean(row["scores"]) for row in measured]
                pairs = [
                    (score, once[key(row, PLACE)])
                    for row, score in zip(measured, scores, strict=True)
                    if key(row, PLACE) in once
                ]
                found.append(
                    Iterated(
                        tasks, length, compactor_of(method), ratio, schedule_of(method), chunks,
                        mean(row["compactions"] for row in measured),
                        mean(row["slots"] for row in measured),
                        len(scores), mean(scores), interval(scores), *_kept(pairs),
                    )
                )  # fmt: skip
    return found


def _kept(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, Interval | None]:
    """The ratio of sums, and 95 % of it by bootstrap over contexts; the same every time."""
    if not sum(once for _, once in pairs):
        return None, None
    rng = random.Random(0)
    drawn = (rng.choices(pairs, k=len(pairs)) for _ in range(RESAMPLES))
    ratios = sorted(_ratio(some) for some in drawn if sum(once for _, once in some))
    edge = len(ratios) // 40
    return _ratio(pairs), (ratios[edge], ratios[-edge or -1])


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(score for score, _ in pairs) / sum(once for _, once in pairs)
