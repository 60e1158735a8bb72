"""`still-agent store`: is the file whole, what takes its space, and what may go. Loads no model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from still_agent.cli.options import DEFAULT_STORE, AsJson, StorePath
from still_agent.cli.sessions import existing_store, print_json, printable

if TYPE_CHECKING:
    from still_memory.check import OnProgress
    from still_memory.findings import Report
    from still_memory.prune import Pruned

app = typer.Typer(
    help="Check a store for damage, show what takes its space, prune it, and scrub it.",
    no_args_is_help=True,
)

_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = {
    "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
SHOWN = 50  # findings on a terminal; --json has them all


@app.command()
def check(store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Find and name damage, reading everything and changing nothing; status 1 if there is any."""
    from still_memory.check import check_store

    with _progress() as tell:
        report = check_store(store, on_progress=tell)
    if as_json:
        findings = [{**asdict(f), "remedy": f.remedy, "text": str(f)} for f in report.findings]
        print_json({**asdict(report), "damaged": report.damaged, "findings": findings})
    else:
        _tell(report)
    if report.damaged:
        raise typer.Exit(1)


@app.command()
def rekey(store: StorePath = DEFAULT_STORE) -> None:
    """Put an encrypted store under another key: STILL_AGENT_NEW_KEY, instead of STILL_AGENT_KEY.

    The file is written anew, so that nothing in it opens with the old key; earlier copies of it
    still do. Where another process reads it meanwhile, `store scrub` has to be run once more.
    """
    import os

    from still_memory.errors import EncryptionError

    if not (key := os.environ.get("STILL_AGENT_NEW_KEY")):
        raise EncryptionError("there is no new key: put it into STILL_AGENT_NEW_KEY")
    with closing(existing_store(store)) as memory:
        memory.rekey(key)
    typer.echo(f"{store} opens with the new key alone")


@app.command()
def stats(store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Show what takes the space, by kind and by session."""
    from still_memory.tenants import label

    with closing(existing_store(store)) as memory:
        space = memory.space(all_tenants=True)
    if as_json:
        print_json(asdict(space))
        return
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold")
    table.add_column("what")
    for name in ("bytes", "of the file"):
        table.add_column(name, justify="right")
    for name, size in (
        (f"{space.spans:,} spans", space.span_bytes),
        (f"  of which {space.shared_spans:,} shared by sessions", space.shared_span_bytes),
        (f"{space.turns:,} turns", space.turn_bytes),
        ("full-text index", space.index_bytes),
        (f"{space.checkpoints:,} checkpoints", space.checkpoint_bytes),
        (f"{space.graph_states:,} states of graphs", space.graph_bytes),
        ("rows, and unused parts of pages", space.other_bytes),
        ("free pages", space.free_bytes),
        ("the file", space.file_bytes),
    ):
        table.add_row(name, f"{size:,}", f"{size / max(space.file_bytes, 1):.1%}")
    console.print(table)
    console.print(f"and {space.log_bytes:,} bytes of the log beside it\n")
    table = Table(box=None, header_style="bold")
    table.add_column("session")
    for name in ("turns", "checkpoints", "spans", "of which shared", "text"):
        table.add_column(name, justify="right")
    for s in space.sessions[:SHOWN]:
        sizes = s.turns, s.checkpoints, s.span_bytes, s.shared_span_bytes, s.turn_bytes
        table.add_row(Text(printable(label(s.tenant, s.name))), *(f"{n:,}" for n in sizes))
    console.print(table)
    if len(space.sessions) > SHOWN:
        console.print(f"... {len(space.sessions) - SHOWN:,} more, with --json")
    if not space.gives_back:
        console.print(
            "Free pages of this file are used again, and not given back to the disk. To change "
            f'that, close every agent and run: sqlite3 {store} "pragma auto_vacuum = incremental; '
            'vacuum"',
            markup=False, soft_wrap=True,
        )  # fmt: skip


@app.command()
def prune(
    store: StorePath = DEFAULT_STORE,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints that each session keeps.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(help="Delete sessions without a turn for so long: 90m, 12h, 30d, 8w."),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Delete until the file is no larger: 500MB, 2GB, 1GiB; oldest first."),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant's sessions (default: everyone's).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take out old checkpoints and sessions, in steps so short that no turn waits for long.

    Without limits it only collects what a stopped prune has left, and gives back free pages.
    """
    from still_memory.retention import Retention

    retention = Retention(
        keep_last,
        None if older_than is None else timedelta(seconds=_measured(older_than, _TIMES)),
        None if max_bytes is None else int(_measured(max_bytes, _SIZES)),
    )
    every = tenant is None
    with closing(existing_store(store, tenant or "")) as memory:
        if not (dry_run or yes or as_json):
            planned = memory.prune(retention, dry_run=True, all_tenants=every)
            if planned.sessions:
                _tell_pruned(planned)
                many = len(planned.sessions)
                typer.confirm(f"Delete {many:,} sessions with all their text?", abort=True)
        with Console(stderr=True).status("pruning"):
            pruned = memory.prune(retention, dry_run=dry_run, all_tenants=every)
    if as_json:
        print_json({**asdict(pruned), "sessions": pruned.sessions})
    else:
        _tell_pruned(pruned)


@app.command()
def reindex(store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Build the full-text index anew from the turns, where a check found it damaged."""
    with closing(existing_store(store)) as memory:
        memory.reindex()
        encrypted = memory.encrypted
    said = f"the index of {store} holds the words of its turns"
    if encrypted:
        said = f"{store} is encrypted, so it has no index; searches read the turns themselves"
    if as_json:
        print_json({"reindexed": str(store)})
    else:
        Console().print(said, markup=False)


@app.command()
def scrub(store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Leave no byte in the file of what was deleted from it: it is written anew."""
    told = Console(stderr=True).status("writing the file anew")
    with closing(existing_store(store)) as memory, told:
        memory.scrub()
    if as_json:
        print_json({"scrubbed": str(store), "bytes": store.stat().st_size})
    else:
        Console().print(f"{store} holds what its sessions hold, and nothing else", markup=False)


def _tell_pruned(pruned: Pruned) -> None:
    from still_memory.tenants import label

    console = Console(highlight=False, soft_wrap=True)
    would = "would go" if pruned.dry_run else "gone"
    for drop in pruned.drops[:SHOWN]:
        name = label(drop.tenant, repr(drop.session))
        what = f"session {name}" if drop.whole else f"older states of {name}"
        last = f", last used {drop.updated[:16]}" if drop.whole else ""
        console.print(
            printable(
                f"{what}: {drop.checkpoints:,} checkpoints, {drop.turns:,} turns, about "
                f"{drop.bytes:,} bytes{last}"
            ),
            markup=False,
        )
    if len(pruned.drops) > SHOWN:
        console.print(f"... {len(pruned.drops) - SHOWN:,} more, with --json")
    about = "about " if pruned.dry_run else ""
    console.print(
        f"{len(pruned.sessions):,} sessions and {sum(d.checkpoints for d in pruned.drops):,} "
        f"checkpoints {would}: {pruned.file_bytes:,} bytes, then {about}"
        f"{pruned.file_bytes_after:,}"
    )


def _measured(text: str, units: Mapping[str, float]) -> float:
    """A number with one of these units."""
    from still_memory.errors import InputError

    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", text.strip())
    unit = None if found is None else units.get(found[2].lower())
    if found is None or unit is None:
        known = ", ".join(unit for unit in units if unit)
        raise InputError(f"{text!r} is not a number with one of the units {known}")
    return float(found[1]) * unit


def _tell(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for finding in report.findings[:SHOWN]:
        console.print(printable(str(finding)), markup=False)
    if len(report.findings) > SHOWN:
        console.print(f"... {len(report.findings) - SHOWN:,} more, with --json")
    for remedy in dict.fromkeys(finding.remedy for finding in report.findings):
        console.print(f"What to do: {remedy}.", markup=False)
    for name, turns in report.unharmed.items():
        kept = ", ".join(map(str, turns))
        said = (
            f"unharmed states are kept after turns {kept}: `still-agent sessions rewind` and "
            "`fork --at` go there"
            if turns
            else "no unharmed state is kept"
        )
        console.print(printable(f"Session {name!r}: {said}."), markup=False)
    if not report.complete:
        console.print("So much is damaged that the check has stopped.")
    console.print(
        f"{report.sessions:,} sessions, {report.turns:,} turns, {report.checkpoints:,} "
        f"checkpoints, {report.spans:,} spans ({report.span_bytes:,} bytes), "
        f"{report.graph_states:,} states of graphs: "
        f"{'damaged' if report.damaged else 'no damage'}"
    )


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A line on stderr, where that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading {task.description}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("the schema", total=None)
        shown = ""

        def tell(what: str, done: int, of: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bar.reset(task, description=what, total=of or None)
            bar.update(task, completed=done)

        yield tell
