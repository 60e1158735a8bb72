"""Standings as tables that fit a terminal of 80 columns: one a cell, its best method first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from still_agent.evaluation.iteration import Iterated
from still_agent.evaluation.methods import ENDS
from still_agent.evaluation.standings import Interval, Lead, Standing

Cell = tuple[str, int, float, int]  # tasks, length, ratio, rounds


def show(console: Console, found: Mapping[str, Sequence[Standing]], leads: Sequence[Lead]) -> None:
    """`found`: standings by measure; the first measure is shown with its intervals, and sorts."""
    (score, main), *others = found.items()
    beside = {name: {_key(s): s.score for s in some} for name, some in others}
    lead = {(x.tasks, x.length, x.ratio, x.rounds): x for x in leads}
    for cell, rows in _cells(main):
        table = Table(title=Text(_title(cell), "bold"), title_justify="left", box=None)
        for name in ("method", score, "95 %", *beside, "of full", "seconds"):
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for s in sorted(rows, key=lambda s: -s.score):
            table.add_row(
                s.method, f"{s.score:.3f}", _range(s.interval),
                *(f"{scores[_key(s)]:.3f}" for scores in beside.values()),
                "-" if s.share_of_full is None else f"{s.share_of_full:.0%}", f"{s.seconds:.2f}",
            )  # fmt: skip
        console.print(table)
        if x := lead.get(cell):
            low, high = x.interval
            said = f"Still {x.lead:+.3f} ({low:+.2f} to {high:+.2f}) over {x.rival}"
            console.print(said, highlight=False, markup=False)
        console.print()


def show_iteration(console: Console, found: Sequence[Iterated]) -> None:
    """A table for each method: its score by chunks, and what that is of its score after one."""
    groups: dict[tuple[str, int, str, float], list[Iterated]] = {}
    for x in found:
        groups.setdefault((x.tasks, x.length, x.method, x.ratio), []).append(x)
    for (tasks, length, method, ratio), some in groups.items():
        where = f"{tasks}, {length} tokens" if length else tasks
        title = Text(f"{where}, {ratio:g}x: {method} by number of chunks", "bold")
        table = Table(title=title, title_justify="left", box=None)
        for name in ("chunks", "schedule", "score", "95 %", "of one chunk", "95 %", "rounds",
                     "slots"):  # fmt: skip
            table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
        for x in sorted(some, key=lambda x: x.chunks):
            table.add_row(
                str(x.chunks), x.schedule, f"{x.score:.3f}", _range(x.interval),
                "-" if x.kept is None else f"{x.kept:.0%}",
                "-" if x.kept_interval is None else _range(x.kept_interval),
                f"{x.compactions:.3g}", f"{x.slots:.0f}",
            )  # fmt: skip
        console.print(table)
        console.print()


def _range(interval: Interval) -> str:
    low, high = interval
    return f"{low:.2f}–{high:.2f}"


def _cells(standings: Sequence[Standing]) -> Iterator[tuple[Cell, list[Standing]]]:
    """Each cell's standings, with those that no ratio changes."""
    ends = [s for s in standings if s.method in ENDS]
    cells = {(s.tasks, s.length, s.ratio, s.rounds) for s in standings if s.method not in ENDS}
    for cell in sorted(cells or {(s.tasks, s.length, s.ratio, s.rounds) for s in ends}):
        yield cell, [
            s for s in standings
            if (s.tasks, s.length) == cell[:2] and (s in ends or (s.ratio, s.rounds) == cell[2:])
        ]  # fmt: skip


def _title(cell: Cell) -> str:
    tasks, length, ratio, rounds = cell
    where = f"{tasks}, {length} tokens" if length else tasks
    return f"{where}, {ratio:g}x, {rounds} round{'s' * (rounds > 1)}"


def _key(s: Standing) -> tuple[Cell, str]:
    return (s.tasks, s.length, s.ratio, s.rounds), s.method
