"""`still-agent sessions`: what a store holds. No model is loaded."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from still_agent.cli.options import DEFAULT_STORE, AsJson, StorePath

if TYPE_CHECKING:
    from still_memory.store import MemoryStore

app = typer.Typer(help="List, show and delete the sessions of a store.", no_args_is_help=True)


@app.command("list")
def list_sessions(store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the sessions, with their tokens, slots and bytes."""
    with closing(_existing(store)) as memory:
        found = memory.sessions()
    if as_json:
        _print_json([
            {
                "name": s.name, "model": s.model, "turns": s.turns, "tokens": s.tokens,
                "slots": s.slots, "bytes": s.bytes,
                "created": s.created.isoformat(), "updated": s.updated.isoformat(),
            }
            for s in found
        ])  # fmt: skip
        return
    table = Table(box=None, header_style="bold")
    for name in ("session", "model"):
        table.add_column(name)
    for name in ("turns", "tokens", "slots", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("updated")
    for s in found:
        counts = (f"{n:,}" for n in (s.turns, s.tokens, s.slots, s.bytes))
        table.add_row(Text(s.name), Text(s.model), *counts, f"{s.updated:%Y-%m-%d %H:%M}")
    Console().print(table)


@app.command()
def show(name: str, store: StorePath = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Print a session's turns: who said what, and when."""
    with closing(_existing(store)) as memory:
        turns = memory.history(name)
    if as_json:
        _print_json([
            {
                "id": t.id, "parent": t.parent, "role": t.role, "text": t.text,
                "tokens": len(t.tokens), "created": t.created.isoformat(), "usage": t.usage,
            }
            for t in turns
        ])  # fmt: skip
        return
    console = Console()
    for t in turns:
        console.print(
            Text.assemble((f"{t.role} ", "bold"), (f"{t.created:%Y-%m-%d %H:%M}  ", "dim"), t.text)
        )


@app.command()
def delete(
    name: str,
    store: StorePath = DEFAULT_STORE,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a session: its turns, its memory, its text."""
    with closing(_existing(store)) as memory:
        if not (yes or as_json):
            typer.confirm(f"Delete the session {name!r} with all its text?", abort=True)
        memory.delete(name)
    if as_json:
        _print_json({"deleted": name})
    else:
        Console().print(f"deleted {name!r}", markup=False)


def _existing(path: Path) -> MemoryStore:
    """The store at `path`; looking into a store never makes one."""
    from still_memory.errors import StoreError
    from still_memory.store import MemoryStore

    if not path.exists():
        raise StoreError(
            f"there is no store at {path}; name one with --store, or make one with "
            f"`still-agent chat --store {path}`"
        )
    return MemoryStore(path)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1))
