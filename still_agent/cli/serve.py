"""`still-agent serve`: an OpenAI-compatible server. See docs/server.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from still_agent.cli.options import DEFAULT_STORE, Parts, StorePath, with_options, with_parts
from still_agent.server.limits import Limits


@with_options(Limits, "limits")
@with_parts
def serve(
    parts: Parts,
    limits: Limits,
    store: StorePath = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="The address; past loopback it needs keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="A TOML file: tenant = [SHA-256 of keys].")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Print a new key and its line, and end.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model (default: its own name).")
    ] = None,
) -> None:
    """Serve the model to OpenAI's clients; each conversation is a session of the store."""
    if new_key is not None:
        from still_agent.server.keys import new_key as make

        key, line = make(new_key)
        typer.echo(f"The key, which is shown this once:\n{key}\nIts line in the file of --keys:")
        typer.echo(line)
        return
    from still_memory.errors import InputError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("serving needs its extra: pip install 'still-agent[server]'") from None
    from still_agent.server import logs
    from still_agent.server.guard import is_loopback
    from still_agent.server.keys import Keys

    known = None if keys is None else Keys.read(keys)
    if known is None and not is_loopback(host):
        raise InputError(
            f"{host!r} can be reached by others, and there are no keys: give --keys FILE "
            "(--new-key TENANT prints a key and its line), or serve 127.0.0.1"
        )
    from still_agent.server.serving import listen
    from still_agent.server.serving import serve as run

    try:
        listener = listen(host, port)
    except OSError as error:
        raise InputError(f"cannot serve {host}:{port}: {error.strerror}; try --port 0") from None
    logs.setup()
    from still_agent.server.app import make_app
    from still_agent.server.service import Service

    with listener:
        service = Service.of(partial(parts.load, store), limits, known, name)
        where = f"[{host}]" if ":" in host else host
        address = f"http://{where}:{listener.getsockname()[1]}"
        typer.echo(f"{service.model} at {address}/v1, with {store}; a page at {address}/")
        run(service, make_app(service), listener)
