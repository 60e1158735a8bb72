"""`still-agent chat`: talk, and watch the slots.

Under each reply stands the budget as a bar: pinned prefix, memory, raw tail, what is free. A
compaction is told when it happens, in the middle of a reply too. A mistake costs a line and
never the session; Ctrl-C in mid-reply undoes the turn.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from still_agent.cli.options import (
    DEFAULT_STORE,
    Parts,
    StorePath,
    Tenant,
    with_parts,
)

if TYPE_CHECKING:
    from still_agent import Compaction, Session, Stats

BAR = 40  # characters
SHARES = (("pinned", "magenta"), ("memory", "cyan"), ("tail", "green"))
HELP = "/read FILE takes a text in, /stats shows the figures, /quit or Ctrl-D ends"


@with_parts
def chat(
    parts: Parts,
    session: Annotated[str, typer.Option("-s", "--session", help="Made or resumed.")] = "default",
    system: Annotated[str | None, typer.Option(help="The system prompt, pinned.")] = None,
    store: StorePath = DEFAULT_STORE,
    tenant: Tenant = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest reply.")] = 256,
) -> None:
    """Talk to a model in a session that is saved after every turn."""
    from still_memory.errors import ConflictError, StillError, UnknownSessionError

    console = Console(highlight=False)
    from still_agent import Sampling

    with parts.load(
        store,
        tenant=tenant,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens),
        on_compaction=lambda event: console.print(told(event), style="yellow"),
    ) as agent:
        known = any(info.name == session for info in agent.sessions())
        talk = agent.session(session, system=system)
        if known:
            tokens = f"{talk.stats.logical_tokens:,}"
            console.print(f"resumed {session!r} at {tokens} tokens", markup=False)
        console.print(HELP, style="dim")
        for line in _lines(console):
            turns = talk.stats.turns
            try:
                _obey(console, talk, line, parts.slots)
            except (ConflictError, UnknownSessionError):
                talk = agent.session(session, system=system)  # what the other writer left
                console.print("another process has written or deleted this session: it is opened "
                              "anew, and what you said is undone; say it again",
                              style="red")  # fmt: skip
            except StillError as error:
                console.print(f"error: {error}", style="red", markup=False)
            except KeyboardInterrupt:
                read = talk.stats.turns - turns
                kept = f"; {read} parts read before it are kept" if read else ""
                console.print(f"stopped: the turn is undone{kept}", style="yellow")


def bar(stats: Stats, budget: int) -> Text:
    """The budget in one line: what holds how many of its slots."""
    line, held = Text(), 0
    for share, colour in SHARES:
        slots = getattr(stats, share)
        low, high = (round(BAR * n / budget) for n in (held, held + slots))
        line.append("█" * (high - low), colour)
        held += slots
    line.append("░" * (BAR - len(line)), "dim")
    line.append(f" {held:,} of {budget:,} slots (")
    for share, colour in SHARES:
        line.append(f"{share} {getattr(stats, share):,}", colour)
        line.append(", " if share != "tail" else ")")
    return line.append(f", {stats.logical_tokens:,} tokens")


def told(event: Compaction) -> str:
    """One line for a compaction."""
    return (
        f"compacted tokens {event.tokens_start:,} to {event.tokens_end:,}: {event.slots_before:,} "
        f"slots became {event.slots_after:,} (round {event.rounds}, {event.seconds * 1000:.0f} ms)"
    )


def _lines(console: Console) -> Iterator[str]:
    """What the user types, until /quit or the end of input."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no UTF-8 costs its line only
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = console.input("[bold]> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line:
            yield line


def _obey(console: Console, talk: Session, line: str, budget: int) -> None:
    if line == "/stats":
        for name, value in asdict(talk.stats).items():
            console.print(f"{name:>14} {value:,}")
    elif line.startswith("/read "):
        from still_agent.text import file_text

        talk.read(file_text(line.removeprefix("/read ").strip()))
        console.print(bar(talk.stats, budget))
    elif line.startswith("/"):
        console.print(HELP, style="dim")
    else:
        reply = Text()
        with (
            Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live,
            talk.stream(line) as pieces,
        ):
            for piece in pieces:
                reply.append(piece)
                live.update(Group(reply, bar(talk.stats, budget)))
            live.update(Group(reply, bar(talk.stats, budget)))
