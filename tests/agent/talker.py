"""A process that talks until it is killed: `talker.py MODEL_FOLDER STORE`.

It tells each turn's number on stdout as soon as `send` has returned.
"""

from __future__ import annotations

import sys
from itertools import count

from still_agent import Agent, Budget


def message(turn: int) -> str:
    return f"Message {turn}: the wind rose. The sea was grey and long. Nobody spoke."


BUDGET = Budget(slots=64)
MAX_TOKENS = 12

if __name__ == "__main__":
    folder, store = sys.argv[1:]
    agent = Agent.load(folder, store=store, budget=BUDGET, compactor="streaming", device="cpu")
    chat = agent.session("x", system="Brief.")
    for turn in count():
        chat.send(message(turn), max_tokens=MAX_TOKENS)
        print(turn, flush=True)
