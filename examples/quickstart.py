"""A conversation in 1,024 slots: tell, read, ask.

Run it with `python examples/quickstart.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from still_agent import Agent, Budget


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Agent.load("reference", store=Path(folder) / "memory.db", budget=Budget(slots=1024)) as me,
        me.session("alice", system="You are brief.") as chat,
    ):
        print(chat.send("My sister Ana lives in Porto.").text)
        chat.read("It was a long and quiet afternoon, and nobody came to the door. " * 20)
        for piece in chat.stream("Where does my sister live?"):
            print(piece, end="", flush=True)
        print()
        print(chat.last_reply.usage)
        print(chat.stats)


if __name__ == "__main__":
    main()
