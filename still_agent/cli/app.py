"""`still-agent`: one command a module, and typed errors as one line."""

from __future__ import annotations

import sys

import typer

from still_agent.cli import chat, demo, evaluate, serve, sessions, store

app = typer.Typer(
    name="still-agent",
    help="Conversations that never fill their memory, and resume at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat.chat)
app.command()(demo.demo)
app.command()(serve.serve)
app.add_typer(sessions.app, name="sessions")
app.add_typer(store.app, name="store")
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    """Run the command line; a StillError ends it with status 1 and its message."""
    try:
        app()
    except Exception as error:
        from still_memory.errors import StillError

        if not isinstance(error, StillError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
