"""`still-agent demo`: a long conversation in few slots, killed and resumed, then asked.

Only the display is here: what is said and asked is in `evaluation/trajectory.py`, the processes
are in `evaluation/reader.py` and `evaluation/journey.py`. This process loads no torch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from still_agent.cli.options import AsJson, Codec, Compactor, Horizon, Model, Schedule, Slots

if TYPE_CHECKING:
    from still_agent.evaluation.journey import Journey
    from still_agent.evaluation.reader import Event, Reading

KILL_AT = 0.6  # share of the conversation
AGES = ("oldest ¼", "2nd ¼", "3rd ¼", "newest ¼")  # of the conversation


def demo(
    facts: Annotated[
        str, typer.Option(help="Facts asked at the end; more counts after a comma run too.")
    ] = "40",
    decoys: Annotated[
        int | None, typer.Option(help="Facts told and never asked (default: a quarter)")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="About how long (default: the book once)")
    ] = None,
    slots: Slots = 1024,
    schedule: Schedule = "rolling",
    horizon: Horizon = None,
    model: Model = "reference",
    compactor: Compactor = None,
    codec: Codec = None,
    seed: Annotated[int, typer.Option(help="Another script.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the store, the plot, the log.")] = Path(
        "still-demo"
    ),
    as_json: AsJson = False,
) -> None:
    """A conversation of 60,000 tokens in 1,024 slots: killed, resumed, then asked."""
    from still_agent.evaluation.journey import journey
    from still_agent.evaluation.reader import Reading
    from still_agent.evaluation.sawtooth import draw
    from still_agent.evaluation.trajectory import Script

    console = Console(stderr=True)
    counts = _counts(facts)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    log, plot = out / "reader.log", out / "sawtooth.png"
    log.unlink(missing_ok=True)
    readings = [
        Reading(
            store=str(_fresh(out / f"conversation-{count}.db")),
            script=Script(facts=count, decoys=decoys, tokens=tokens, seed=seed),
            model=model, compactor=compactor, slots=slots, schedule=schedule, horizon=horizon,
            codec=codec,
        )
        for count in counts
    ]  # fmt: skip
    journeys = []
    for index, reading in enumerate(readings):
        with Gauges(console, reading) as gauges:
            found = journey(reading, log, gauges.watch, kill_at=None if index else KILL_AT)
        journeys.append(found)
    main = journeys[0]
    draw(main.samples, slots, plot, resumed_at=main.resumed_at)
    seconds = time.perf_counter() - started
    if as_json:
        runs = [j.summary() for j in journeys]
        typer.echo(json.dumps({"runs": runs, "seconds": seconds, "plot": str(plot)}, indent=1))
        return
    _report(Console(), journeys)
    console.print(f"the sawtooth: {escape(str(plot))}    the whole demo: {seconds:.0f} s")


class Gauges:
    """Two live bars: logical tokens that grow, slots that do not; and what happens, above them."""

    def __init__(self, console: Console, reading: Reading) -> None:
        self.console = console
        self.asked = 0
        self.reading = reading
        self.bars = Progress(
            TextColumn("{task.description:>14}"), BarColumn(bar_width=40),
            TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self.tokens = self.bars.add_task("logical tokens", total=1.0, shown="0")
        self.slots = self.bars.add_task("slots held", total=reading.slots, shown="0")
        self.compactions = 0

    def __enter__(self) -> Gauges:
        facts, told = self.reading.script.facts, self.reading.script.told
        self.say(f"[bold]{facts} facts[/] that will be asked and {told - facts} decoys, in a book")
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def watch(self, event: Event) -> None:
        """Show one event of the reader."""
        kind = event["kind"]
        if kind in ("turn", "compaction", "read"):
            self._move(event)
        if kind == "opened" and event["resumed"]:
            self.say(
                f"[green]a new process resumed[/] in {event['open_seconds'] * 1000:.0f} ms: "
                f"{event['tokens']:,} tokens reused in {event['slots']:,} slots"
            )
            self.say("now the same history is read again, only to compare the time ...")
        elif kind == "compared":
            self.say(
                f"first token after a resume {event['first_token_seconds'] * 1000:.0f} ms, "
                f"after reading again {event['reread_first_token_seconds']:.1f} s"
            )
        elif kind == "killed":
            self.say(
                f"[red]SIGKILL[/] in mid-turn at {event['tokens']:,} tokens "
                f"(exit status {event['status']})"
            )
        elif kind == "read":
            self.say(f"read to the end: {event['tokens']:,} tokens; now the questions")
        elif kind == "answer":
            self.asked += 1
            self.bars.update(
                self.tokens, description="questions", shown=f"{self.asked}",
                completed=self.asked / self.reading.script.facts,
            )  # fmt: skip

    def _move(self, event: Event) -> None:
        self.compactions += event["kind"] == "compaction"
        self.bars.update(self.tokens, completed=event["done"], shown=f"{event['tokens']:,}")
        shown = f"{event['slots']:,} of {self.reading.slots:,}, {self.compactions} compactions"
        self.bars.update(self.slots, completed=event["slots"], shown=shown)


def _report(console: Console, journeys: list[Journey]) -> None:
    main = journeys[0].summary()
    for title, rows in (
        ("The conversation", _conversation_rows(main)),
        ("Killed and resumed", _resume_rows(main)),
    ):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows:
            table.add_row(name, value)
        if rows:
            console.print(table)
    table = Table(title="Recall, questions in held-out phrasings, and by age", title_justify="left")
    for name in ("facts", "decoys", "recall", "corrected", *AGES):
        table.add_column(name, justify="right")
    for found in (j.summary() for j in journeys):
        ages = [_percent(age["recall"]) for age in found["recall_by_age"]]
        table.add_row(
            str(found["facts"]), str(found["decoys"]), _percent(found["recall"]),
            _percent(found["recall_of_corrected"]), *ages,
        )  # fmt: skip
    console.print(table)


def _conversation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    held, full = found["held_bytes"], found["full_bytes"]
    return [
        ("tokens", f"{found['tokens']:,}"),
        ("slots held, at most", f"{found['most_slots']:,} of {found['budget']:,}"),
        ("compactions", f"{found['compactions']:,} ({found['schedule']})"),
        ("bytes held", f"{held / 2**20:.1f} MiB"),
        ("bytes of a full cache", f"{full / 2**20:.1f} MiB ({full / held:.0f} × as much)"),
        ("reading", f"{found['seconds_reading']:.0f} s"),
    ]


def _resume_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "reused_tokens" not in found:
        return []
    rows = [
        ("killed in mid-turn at token", f"{found['killed_at_tokens']:,}"),
        ("tokens reused", f"{found['reused_tokens']:,}"),
        ("tokens read again (the turn that was cut)", f"{found['recomputed_tokens']:,}"),
        ("session opened in", f"{found['open_seconds'] * 1000:.0f} ms"),
    ]
    if "reread_first_token_seconds" in found:
        resumed, again = found["first_token_seconds"], found["reread_first_token_seconds"]
        rows += [
            ("time to first token, resumed", f"{resumed * 1000:.0f} ms"),
            ("time to first token, history read again", f"{again:.1f} s"),
            ("resume is faster by", f"{again / resumed:.0f} ×"),
        ]
    return rows


def _counts(text: str) -> list[int]:
    from still_memory.errors import InputError

    parts = text.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"--facts takes counts such as 40 or 40,80,160; got {text!r}")
    return [int(p) for p in parts]


def _fresh(store: Path) -> Path:
    """The path, with what an earlier demo left there gone: the demo owns its folder's stores."""
    for suffix in ("", "-wal", "-shm"):
        store.with_name(store.name + suffix).unlink(missing_ok=True)
    return store


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
