"""The sawtooth: tokens grow, slots go up and down below the budget. Drawn as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """The state at one moment of the reading, in seconds from its start."""

    seconds: float
    tokens: int
    slots: int
    compaction: bool = False


def draw(
    samples: Sequence[Sample], budget: int, path: Path, *, resumed_at: float | None = None
) -> None:
    """Logical tokens above, slots held below, on one time axis; `resumed_at` marks the kill."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    times = [s.seconds for s in samples]
    above.plot(times, [s.tokens for s in samples], color="tab:blue")
    above.set_ylabel("logical tokens")
    above.set_ylim(bottom=0)
    below.plot(times, [s.slots for s in samples], color="tab:green", linewidth=0.8)
    below.axhline(budget, color="tab:red", linestyle="--", label=f"budget, {budget:,} slots")
    compactions = [s for s in samples if s.compaction]
    below.plot(
        [s.seconds for s in compactions], [s.slots for s in compactions], ".", markersize=3,
        color="black", label=f"{len(compactions):,} compactions",
    )  # fmt: skip
    below.set_ylabel("slots held")
    below.set_ylim(0, budget * 1.15)
    below.set_xlabel("seconds of reading")
    if resumed_at is not None:
        for axes in (above, below):
            axes.axvline(resumed_at, color="tab:orange", label="killed and resumed")
    below.legend(loc="lower right", fontsize="small")
    figure.savefig(path)
