"""`still-agent eval`: what each way of shortening a cache keeps, on your model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from still_agent.cli.options import AsJson, Compactor, Device, Dtype, Model, with_options

if TYPE_CHECKING:
    from still_agent.evaluation.bench import Bench, Report
    from still_agent.evaluation.methods import Cells
    from still_agent.evaluation.rows import Row

app = typer.Typer(help="Measure what a compact cache still knows.", no_args_is_help=True)
T = TypeVar("T", int, float, str)
QUICK = "niah_single_2,niah_multikey_2,vt,cwe,exact,edited,bindings,chat"

Out = Annotated[Path, typer.Option(help="Folder of rows and plot; goes on if begun.")]

console = Console(stderr=True)


@dataclass(frozen=True)
class Measured:
    """What is measured, whatever it is asked about, as options."""

    model: Model = "reference"
    compactor: Compactor = None
    methods: Annotated[str, typer.Option(help="Names after commas, or all.")] = "all"
    ratios: Annotated[str, typer.Option(help="Tokens a slot.")] = "8"
    rounds: Annotated[str, typer.Option(help="Chunks that a context is read in.")] = "1"
    schedules: Annotated[
        str, typer.Option(help="What is compacted after each: rolling, tiered, append.")
    ] = "rolling"
    reasoning: Annotated[
        int, typer.Option(min=0, help="Tokens of it before a reply; they are not scored.")
    ] = 0
    self_study: Annotated[
        str | None, typer.Option(help="For cartridges: requests, turns (reference), passages.")
    ] = None
    conversations: Annotated[int, typer.Option(help="Of a cartridge's self-study.")] = 16
    steps: Annotated[int, typer.Option(help="Of a cartridge's training.")] = 120
    device: Device = None
    dtype: Dtype = None

    def cells(self) -> Cells:
        """Which methods, at which ratios and after how many rounds."""
        from still_agent.evaluation import methods as known

        methods = known.METHODS if self.methods == "all" else _split(self.methods, str)
        if self.methods == "all" and self.model != "reference" and self.compactor is None:
            console.print("No --compactor is given for this model: Still is left out.",
                          style="yellow")  # fmt: skip
            methods = tuple(method for method in methods if not known.own(method))
        schedules = _split(self.schedules, str)
        known.require_schedules(schedules)
        asked = (
            known.scheduled(method, schedule)
            for method in methods
            for schedule in (schedules if known.blind(method) else ("rolling",))
        )
        rounds = _split(self.rounds, int)
        return known.Cells(tuple(dict.fromkeys(asked)), _split(self.ratios, float), rounds)

    def bench(self) -> Bench:
        """The model, loaded, and how its cartridges are trained."""
        from still_agent.evaluation.bench import Bench
        from still_agent.evaluation.self_study import Study
        from still_agent.models.loading import load_model

        way = self.self_study or ("turns" if self.model == "reference" else "requests")
        study = Study(way, self.conversations, self.steps)
        with console.status("loading"):
            model = load_model(self.model, device=self.device, dtype=self.dtype)
        return Bench(model, self.compactor, self.model, study, reasoning=self.reasoning)


with_measured = with_options(Measured, "what")


@app.command()
@with_measured
def ruler(
    what: Measured,
    tasks: Annotated[str, typer.Option(help="Names after commas, or all, or quick.")] = "quick",
    lengths: Annotated[str, typer.Option(help="Tokens of a context.")] = "1024",
    samples: Annotated[int, typer.Option(help="Contexts of each task and seed.")] = 2,
    seeds: Annotated[str, typer.Option(help="Numbers after commas.")] = "0,1,2",
    qa_1: Annotated[Path | None, typer.Option("--qa-1", help="A file in SQuAD's format.")] = None,
    qa_2: Annotated[Path | None, typer.Option("--qa-2", help="One in HotpotQA's.")] = None,
    shares: Annotated[Path | None, typer.Option(help="Of layers, for NAME+shares (JSON).")] = None,
    haystack: Annotated[Path | None, typer.Option(help="A plain text (default: a novel).")] = None,
    out: Out = Path("still-eval"),
    as_json: AsJson = False,
) -> None:
    """RULER's thirteen tasks and four of our own, for any methods, ratios, lengths and rounds."""
    from still_agent.cli.tables import show, show_iteration
    from still_agent.evaluation.dialogues import Prose
    from still_agent.evaluation.grid import Grid, measure
    from still_agent.evaluation.iteration import iteration
    from still_agent.evaluation.ruler import TASKS, asking_of
    from still_agent.evaluation.shares import shares_of
    from still_agent.evaluation.standings import draw, leads, standings, summary
    from still_agent.evaluation.trajectory import book
    from still_agent.text import file_text

    grid = Grid(
        **vars(what.cells()),
        tasks=tuple(TASKS) if tasks == "all" else _split(QUICK if tasks == "quick" else tasks, str),
        lengths=_split(lengths, int), samples=samples, seeds=_split(seeds, int),
    )  # fmt: skip
    files = {"qa_1": qa_1, "qa_2": qa_2}
    known = TASKS | {name: asking_of(file) for name, file in files.items() if file is not None}
    prose = Prose([book() if haystack is None else file_text(haystack)])
    shared = () if shares is None else shares_of(shares)
    bench = what.bench()
    bench.shares = shared
    _begin(out)
    with _reported(bench) as report:
        rows = measure(bench, grid, prose, out / "rows.jsonl", report, known)
    draw(rows, out / "grid.png")
    if as_json:
        found = {**summary(rows), "iteration": [asdict(x) for x in iteration(rows)]}
        typer.echo(json.dumps(found, indent=1))
    else:
        show(Console(), {"score": standings(rows)}, leads(rows))
        show_iteration(Console(), iteration(rows))
        console.print(f"rows and plot: {out}", markup=False)


@app.command()
@with_measured
def summary(
    what: Measured,
    data: Annotated[Path, typer.Option(help="JSON Lines in LongBench's or HELMET's format.")],
    samples: Annotated[int | None, typer.Option(min=1, help="Lines (default: all).")] = None,
    request: Annotated[str | None, typer.Option(help="For lines that have none.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a summary.")] = 256,
    judge: Annotated[
        str | None, typer.Option(help="module:function that prefers one of two summaries.")
    ] = None,
    out: Out = Path("still-summaries"),
    as_json: AsJson = False,
) -> None:
    """Summaries of your documents, scored by ROUGE and, if you have one, by a judge."""
    from still_agent.cli.tables import show
    from still_agent.evaluation import standings as found
    from still_agent.evaluation.judge import judge_of, judged, wins
    from still_agent.evaluation.rouge import MEASURES
    from still_agent.evaluation.rows import header
    from still_agent.evaluation.summaries import REQUEST, documents, summarise

    cells = what.cells()
    documented = documents(data, request or REQUEST)[:samples]
    preferred = judge_of(judge) if judge else None
    bench = what.bench()
    _begin(out)
    file = out / "rows.jsonl"
    with _reported(bench) as report:
        rows = summarise(bench, cells, documented, file, report, longest=max_tokens)
    verdicts = []
    if preferred is not None:
        with console.status("judging"):
            about = {"judge": judge, **header(file)}
            asked = judged(preferred, rows, documented, out / "verdicts.jsonl", about)
        verdicts = wins(asked)
    found.draw(rows, out / "summaries.png")
    by_measure = {name: [{**row, "scores": [row[name]]} for row in rows] for name in MEASURES}
    if as_json:
        held = {name: found.summary(some) for name, some in by_measure.items()}
        typer.echo(json.dumps({**held, "wins": [asdict(won) for won in verdicts]}, indent=1))
        return
    shown = Console()
    columns = {name: found.standings(by_measure[name]) for name in reversed(MEASURES)}
    show(shown, columns, found.leads(rows))
    for won in verdicts:
        low, high = won.interval
        shown.print(
            f"{won.tasks}, {won.ratio:g}x, {won.rounds} rounds: {won.method} wins {won.rate:.0%} "
            f"({low:.0%} to {high:.0%}) against {won.rival}",
            highlight=False,
            markup=False,
        )
    console.print(f"rows and plot: {out}", markup=False)


def _begin(out: Path) -> None:
    """Make the folder. InputError if it cannot be."""
    from still_memory.errors import InputError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}; name another") from None


@contextmanager
def _reported(bench: Bench) -> Iterator[Report]:
    """A bar while a bench measures, and while it fits slots."""
    columns = (TextColumn("{task.description:>34}"), BarColumn(bar_width=20), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0)

        def report(row: Row, done: float) -> None:
            what = f"{row['task']} {row['method']} {row['ratio']:g}x"
            progress.update(bar, completed=done, description=what)

        def watch(step: int, steps: int) -> None:
            progress.update(bar, description=f"fitting slots, step {step} of {steps}")

        bench.watch = watch
        yield report
        progress.update(bar, completed=1.0, description="done")


def _split(text: str, kind: type[T]) -> tuple[T, ...]:
    """What stands between commas. InputError for what is no number where one is meant."""
    from still_memory.errors import InputError

    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{text!r} is not a list of numbers: give some such as 8,16,32") from None
