"""A session outlives its process: the second agent knows what the first was told.

Run it with `python examples/resume.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from still_agent import Agent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "memory.db"
        with Agent.load("reference", store=store) as agent, agent.session("alice") as chat:
            chat.send("Remember that Brenda's locker code is 4417.")

        with Agent.load("reference", store=store) as agent, agent.session("alice") as chat:
            reply = chat.send("What is Brenda's locker code?")
            print(reply.text)
            print(f"{reply.usage.reused_tokens} tokens were already there")
            print(f"{reply.usage.prefilled_tokens} tokens were read for this turn")
            for turn in chat.history():
                print(f"  {turn.role}: {turn.text}")


if __name__ == "__main__":
    main()
