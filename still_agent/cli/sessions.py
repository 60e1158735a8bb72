"""`still-agent sessions`: what a store holds. No model is loaded, but to read turns again."""

from __future__ import annotations

import json
import unicodedata
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from still_agent.cli.options import (
    DEFAULT_STORE,
    AsJson,
    Parts,
    StorePath,
    Tenant,
    with_parts,
)
from still_agent.cli.progress import reading

if TYPE_CHECKING:
    from still_agent.agent import Agent
    from still_agent.replay import Restored
    from still_memory.records import Head
    from still_memory.store import MemoryStore
    from still_memory.taint import Taint

app = typer.Typer(
    help="List, show, search, fork, rewind, rebuild, export, import and delete the sessions of a "
    "store, and forget their turns.",
    no_args_is_help=True,
)

Replay = Annotated[
    bool, typer.Option("--replay", help="Load the model and read the turns again, where needed.")
]


def printable(text: str) -> str:
    """Text without control characters: an imported one must not command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


@app.command("list")
def list_sessions(
    store: StorePath = DEFAULT_STORE, tenant: Tenant = "", as_json: AsJson = False
) -> None:
    """List the sessions, with their tokens, slots and bytes."""
    with closing(existing_store(store, tenant)) as memory:
        found = memory.sessions()
    if as_json:
        print_json([
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
        table.add_row(
            Text(printable(s.name)),
            Text(printable(s.model)),
            *counts,
            f"{s.updated:%Y-%m-%d %H:%M}",
        )
    Console().print(table)


@app.command()
def show(
    name: str, store: StorePath = DEFAULT_STORE, tenant: Tenant = "", as_json: AsJson = False
) -> None:
    """Print a session's turns: who said what, and when."""
    with closing(existing_store(store, tenant)) as memory:
        turns = memory.history(name)
    if as_json:
        print_json([
            {
                "number": t.number, "id": t.id, "parent": t.parent, "role": t.role, "text": t.text,
                "tokens": len(t.tokens), "created": t.created.isoformat(), "usage": t.usage,
            }
            for t in turns
        ])  # fmt: skip
        return
    console = Console()
    for t in turns:
        console.print(
            Text.assemble(
                (f"{t.number:>4} ", "dim"), (f"{printable(t.role)} ", "bold"),
                (f"{t.created:%Y-%m-%d %H:%M}  ", "dim"), printable(t.text),
            )
        )  # fmt: skip


@app.command()
def search(
    name: str,
    words: str,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    limit: Annotated[int, typer.Option(min=1, help="The most turns to print.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Find the turns in which these words were said, newest first."""
    with closing(existing_store(store, tenant)) as memory:
        matches = memory.search(_head(memory, name), words, limit)
    if as_json:
        print_json([{**asdict(m), "created": m.created.isoformat()} for m in matches])
        return
    console = Console()
    for m in matches:
        console.print(
            Text.assemble(
                (f"{m.number:>4} ", "dim"), (f"{printable(m.role)} ", "bold"),
                (f"{m.created:%Y-%m-%d %H:%M}  ", "dim"), printable(m.excerpt),
            )
        )  # fmt: skip


@app.command()
@with_parts
def fork(
    parts: Parts,
    name: str,
    new: str,
    at: Annotated[int | None, typer.Option(help="The last turn to share (default: all).")] = None,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    replay: Replay = False,
    as_json: AsJson = False,
) -> None:
    """Begin a session that shares another's turns up to one of them."""
    with closing(existing_store(store, tenant)) as memory:
        kept = _kept(memory, name, at, replay)
        if kept is not None:
            memory.fork(kept[1], new, memory.load(kept[0]))
    restored = None
    if kept is None:
        with parts.load(store, tenant=tenant) as agent, reading(f"reading {name!r} again") as show:
            restored = agent.session(name).fork(new, at, on_replay=show).restored
    _tell_branch(new, store, tenant, restored, as_json)


@app.command()
@with_parts
def rewind(
    parts: Parts,
    name: str,
    at: Annotated[int, typer.Argument(help="The last turn to keep, as `show` numbers them.")],
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    replay: Replay = False,
    as_json: AsJson = False,
) -> None:
    """Take a session back to where it stood after a turn."""
    with closing(existing_store(store, tenant)) as memory:
        kept = _kept(memory, name, at, replay)
        if kept is not None:
            memory.commit(kept[1], memory.load(kept[0]), [])
    restored = None
    if kept is None:
        with parts.load(store, tenant=tenant) as agent, reading(f"reading {name!r} again") as show:
            chat = agent.session(name)
            chat.rewind(at, on_replay=show)
            restored = chat.restored
    _tell_branch(name, store, tenant, restored, as_json)


@app.command()
@with_parts
def rebuild(
    parts: Parts,
    name: str,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    as_json: AsJson = False,
) -> None:
    """Compute a session's memory anew from its text: for another model or budget, or if damaged.

    The old memory stands until the new one does. Stopped, the same command goes on.
    """
    with closing(existing_store(store, tenant)) as memory:
        memory.ledger(name)  # before a model is loaded for it
    with parts.load(store, tenant=tenant) as agent:
        restored = _rebuilt(agent, name)
    _tell_branch(name, store, tenant, restored, as_json)


@app.command("export")
def export_session(
    name: str,
    file: Path,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    plain: Annotated[
        bool, typer.Option("--plain", help="Also out of an encrypted store: not sealed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a session as one new file, to be imported on another machine.

    Out of an encrypted store the file is sealed with the key in STILL_AGENT_KEY, which opens it
    again.
    """
    from still_memory.portable import Portable

    with closing(existing_store(store, tenant)) as memory:
        Portable.of(memory, name).write(file, None if plain else memory.secret)
    if as_json:
        print_json({"exported": name, "file": str(file), "bytes": file.stat().st_size})
    else:
        told = f"exported {name!r} to {file}: {file.stat().st_size:,} bytes, the whole conversation"
        Console().print(told, markup=False, highlight=False)


@app.command("import")
@with_parts
def import_session(
    parts: Parts,
    file: Path,
    name: Annotated[str | None, typer.Option(help="Another name than it has.")] = None,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    replay: Annotated[
        bool, typer.Option("--replay", help="Load a model, and read the turns again for it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take in a session from an exported file; the model that made it will resume it.

    No model looks at the file unless --replay has one take in its turns: so its model goes by a
    digest, and its token ids are checked when the session is first opened.
    """
    from still_memory.portable import Portable
    from still_memory.store import MemoryStore

    found = Portable.read(file)  # before a store is made for it
    with MemoryStore(store, tenant=tenant) as memory:
        head = found.save(memory, name)
    told = f"imported {head.session!r}: {head.turns:,} turns, {head.tokens:,} tokens"
    if replay:
        with parts.load(store, tenant=tenant) as agent:
            restored = _rebuilt(agent, head.session)
        return _tell_branch(head.session, store, tenant, restored, as_json)
    if as_json:
        print_json({
            "imported": head.session, "turns": head.turns, "tokens": head.tokens, "verified": False
        })  # fmt: skip
    else:
        console = Console(highlight=False)
        console.print(told, markup=False)
        console.print("its model and token ids are checked when it is first opened", style="dim")


@app.command()
@with_parts
def forget(
    parts: Parts,
    name: str,
    turns: Annotated[list[int], typer.Argument(help="As `show` numbers them.")],
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    later: Annotated[
        Literal["refuse", "keep", "forget"],
        typer.Option(help="What becomes of the turns said after them."),
    ] = "refuse",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what has them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take turns out of the store for good, forks included, with all that was computed from them.

    The memory of each session that had them is computed anew without them. Whatever was said later
    may quote them: it is listed and nothing is done, unless --later says what becomes of it.
    """
    with closing(existing_store(store, tenant)) as memory:
        tainted = memory.tainted(_rows(memory, name, turns))
    if dry_run:
        return _tell_tainted(tainted, as_json)
    if not (yes or as_json or later == "refuse"):
        _tell_tainted(tainted, as_json)
        typer.confirm("Forget them, and compute the memory of these sessions anew?", abort=True)
    with parts.load(store, tenant=tenant) as agent, reading(f"reading {name!r} again") as show:
        agent.session(name).forget(*turns, later=later, on_replay=show)
    if as_json:
        _tell_tainted(tainted, as_json)
    else:
        names = ", ".join(repr(printable(taint.session)) for taint in tainted)
        told = f"forgotten in {names}, and computed anew without it"
        Console().print(f"{told}; the bytes are gone from {store}", markup=False)


@app.command()
def delete(
    name: str,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    erase: Annotated[
        bool, typer.Option("--erase", help="Leave no byte of it, or of what was deleted before.")
    ] = False,
    forks: Annotated[
        Literal["refuse", "keep", "delete"] | None,
        typer.Option(help="What becomes of sessions that share its turns (default: keep; with "
                     "--erase, refuse)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Delete a session: its turns, its memory, its text."""
    with closing(existing_store(store, tenant)) as memory:
        if not (yes or as_json):
            also = ", and those that share its turns," if forks == "delete" else ""
            typer.confirm(f"Delete the session {name!r}{also} with all its text?", abort=True)
        deleted = memory.delete(name, erase=erase, forks=forks or ("refuse" if erase else "keep"))
        if erase:
            memory.scrub()
    if as_json:
        print_json({"deleted": name, **asdict(deleted)})
        return
    console = Console(highlight=False)
    console.print(f"deleted {', '.join(map(repr, deleted.sessions))}", markup=False)
    for taint in deleted.shared:
        console.print(printable(f"what it shared stays: {taint}"), markup=False)
    for thread in deleted.graphs:
        told = f"the states of the graph of thread {thread!r} went with it"
        console.print(printable(told), markup=False)


def _rows(memory: MemoryStore, name: str, turns: list[int]) -> list[int]:
    """The ids of a session's turns."""
    from still_memory.errors import InputError

    rows = {turn.number: turn.id for turn in memory.history(memory.ledger(name))}
    if missing := [n for n in turns if n not in rows]:
        raise InputError(
            f"session {name!r} has {len(rows)} turns, and none with the number "
            f"{', '.join(map(str, missing))}; `show` numbers them"
        )
    return [rows[n] for n in turns]


def _tell_tainted(tainted: list[Taint], as_json: bool) -> None:
    if as_json:
        print_json([asdict(taint) for taint in tainted])
        return
    console = Console(highlight=False, soft_wrap=True)
    for taint in tainted:
        console.print(printable(str(taint)), markup=False)


def _kept(memory: MemoryStore, name: str, at: int | None, replay: bool) -> tuple[Head, Head] | None:
    """Where the session stood at that turn, if it is kept, and its head put there.

    None where turns must be, and may be, replayed.
    """
    from still_memory.errors import InputError

    head = _head(memory, name)
    known = memory.kept(head)
    for kept in known:
        if kept.turns == (head.turns if at is None else at):
            return kept, replace(head, turn=kept.turn, turns=kept.turns)
    if not replay:
        turns = ", ".join(str(kept.turns) for kept in known)
        raise InputError(
            f"of the {head.turns} turns of session {name!r} the states after {turns} are kept, and "
            f"not after {at}: choose one of them, or repeat this with --replay, and with the "
            "--model, --compactor and --slots that the session has had"
        )
    return None


def _head(memory: MemoryStore, name: str) -> Head:
    from still_memory.errors import UnknownSessionError

    head = memory.head(name)
    if head is None:
        raise UnknownSessionError(f"the store holds no session {name!r}; `list` shows them")
    return head


def _rebuilt(agent: Agent, name: str) -> Restored | None:
    try:
        with reading(f"rebuilding {name!r}") as show:
            return agent.rebuild(name, on_progress=show).restored
    except KeyboardInterrupt:
        told = "stopped: the old memory stands, and the same command goes on from here"
        Console(stderr=True).print(told, style="yellow")
        raise typer.Exit(130) from None


def _tell_branch(
    name: str, store: Path, tenant: str, restored: Restored | None, as_json: bool
) -> None:
    with closing(existing_store(store, tenant)) as memory:
        (info,) = (info for info in memory.sessions() if info.name == name)
    if as_json:
        replayed = {}
        if restored is not None:
            replayed = {**asdict(restored), "faithful": restored.faithful}
        print_json({"session": name, "turns": info.turns, "tokens": info.tokens, **replayed})
        return
    console = Console(highlight=False)
    console.print(f"{name!r} stands after turn {info.turns}", markup=False)
    if restored is not None:
        told = "as logged" if restored.faithful else f"other: {', '.join(restored.differs)}"
        console.print(f"{restored.replayed_tokens:,} tokens were read again, {told}")


def existing_store(path: Path, tenant: str = "") -> MemoryStore:
    """The store at `path`; looking into a store never makes one."""
    from still_memory.errors import StoreError
    from still_memory.store import MemoryStore

    if not path.exists():
        raise StoreError(
            f"there is no store at {path}; name one with --store, or make one with "
            f"`still-agent chat --store {path}`"
        )
    return MemoryStore(path, tenant=tenant)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1))
