"""SIGKILL while many clients stream: every turn whose end was read is in the store.

    python -m tests.attacks.answered --clients 50 --kills 5

Each client has a conversation of its own, sent whole each time, and reads its replies to their last
event; those that it has read so are answered. The server is killed at any moment, and started
again on the same store: every answered turn must be there, in its order, and each conversation must
go on with what was answered in it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from still_memory.store import MemoryStore


class Stream:
    """One client's conversation."""

    def __init__(self, url: str, name: str) -> None:
        self.name, self._url = name, url
        self.session, self.known = name, 0  # where the newest reply was saved
        self.messages: list[Any] = [{"role": "system", "content": f"You speak with {name}."}]
        self.answered: list[tuple[str, str]] = []
        self.cut = 0  # replies of which a part was read

    def talk(self) -> None:
        """Say one thing after the other, until the server is gone."""
        while self.say():
            pass

    def go_on(self, url: str) -> bool:
        """Say one more thing, to the server at `url`; whether all that was answered was known.

        Where a turn more was saved, whose end was not read any more, this goes on in a branch.
        """
        self._url = url
        return self.say() and self.known == 2 * len(self.answered) - 1

    def say(self) -> bool:
        """One message and its reply; whether the reply came to its end."""
        number = len(self.answered)
        said = f"{self.name} says for the {number}th time: the sea was grey and long."
        told = [*self.messages, {"role": "user", "content": said}]
        text, finished = "", False
        client = openai.OpenAI(
            base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=120
        )
        try:
            for chunk in client.chat.completions.create(
                model="reference",
                messages=told,
                stream=True,
                max_tokens=40,
                extra_body={"session_id": self.name},
            ):
                choice = chunk.choices[0]
                text += choice.delta.content or ""
                if choice.finish_reason:
                    finished = True
                    assert chunk.model_extra is not None
                    still = chunk.model_extra["still"]
                    self.known, self.session = still["known"], still["session"]
        except Exception:  # the server is gone: httpx and openai tell of it in many ways
            self.cut += bool(text)
        if finished:
            self.answered.append((said, text))
            self.messages = [*told, {"role": "assistant", "content": text}]
        return finished


def lost(store: Path, streams: Sequence[Stream]) -> list[str]:
    """What was answered and is not in the store as it was answered, or is there with more."""
    memory = MemoryStore(store)
    try:
        found = []
        for stream in streams:
            if not stream.answered:
                continue
            turns = [t.text for t in memory.history(stream.session)][1:]
            told = [text for pair in stream.answered for text in pair]
            more = len(turns) - len(told)  # a turn that was saved, and its end not read any more
            if turns[: len(told)] != told or more not in (0, 2):
                found.append(stream.name)
        return found
    finally:
        memory.close()


def main() -> None:
    from tests.server.conftest import Process

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "s.db"
        streams = [Stream("", f"user {n}") for n in range(args.clients)]
        for kill in range(args.kills):
            with Process(store, "--concurrency", str(args.clients)) as served:
                gone_on = [False] * len(streams)

                def live(n: int, url: str = served.url, gone_on: list[bool] = gone_on) -> None:
                    gone_on[n] = streams[n].go_on(url)
                    streams[n].talk()

                threads = [threading.Thread(target=live, args=(n,)) for n in range(len(streams))]
                for thread in threads:
                    thread.start()
                while not all(gone_on) and any(t.is_alive() for t in threads):
                    time.sleep(0.05)
                time.sleep(chance.uniform(0.5, 8.0))
                served.process.send_signal(signal.SIGKILL)
                for thread in threads:
                    thread.join()
            told = {
                "kill": kill + 1,
                "answered": sum(len(s.answered) for s in streams),
                "streams cut": sum(s.cut for s in streams),
                "lost": lost(store, streams),
                "not gone on": [s.name for s, ok in zip(streams, gone_on, strict=True) if not ok],
            }
            print(json.dumps(told), flush=True)
            assert not told["lost"] and not told["not gone on"], "answered turns were lost"


if __name__ == "__main__":
    main()
