"""What a client may take, each an option of `still-agent serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class Limits:
    """Sizes, numbers and seconds; see each option's help."""

    body_bytes: Annotated[
        int, typer.Option(min=1, help="The largest request body (413 past it).")
    ] = 8 * 2**20
    message_chars: Annotated[
        int, typer.Option(min=1, help="The longest message, in characters (400).")
    ] = 200_000
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens that a request may ask for (400).")
    ] = 4096
    concurrency: Annotated[
        int, typer.Option(min=1, help="Turns computed at once, each in a thread of its own.")
    ] = 32
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait for a turn to end (429 past it).")
    ] = 64
    waiting_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds that one of them waits (503 after it).")
    ] = 60.0
    turn_s: Annotated[
        float, typer.Option(min=0.01, help="Seconds of one turn; it is undone after it (504).")
    ] = 300.0
    reader_s: Annotated[
        float, typer.Option(min=0.01, help="Seconds for a reader that does not read.")
    ] = 30.0
    header_s: Annotated[
        float, typer.Option(min=0.01, help="Seconds for a request's headers to arrive.")
    ] = 10.0
    body_s: Annotated[
        float, typer.Option(min=0.01, help="Seconds for a request's body to arrive (408).")
    ] = 30.0
    idle_s: Annotated[
        int, typer.Option(min=1, help="Seconds that a connection stays open between requests.")
    ] = 30
    connections: Annotated[int, typer.Option(min=1, help="Connections at once (503 past it).")] = (
        512  # each is an open file, and a process mostly has 1,024 of them
    )
    open_sessions: Annotated[
        int, typer.Option(min=0, help="Sessions of a tenant that keep their live cache.")
    ] = 32
    grace_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running turns have at a shutdown.")
    ] = 20.0
