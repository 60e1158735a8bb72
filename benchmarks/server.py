"""Many clients at once on one server: time to the first token, tokens a second, nothing mixed up.

Each client has a conversation of its own with facts of its own, sent whole each time and streamed.
The same conversations are then held one after the other on a second store, without a server; every
reply must be the same, to the letter. The store holds other sessions as well, to see that they cost
nothing. Client threads share the machine with the server, whose threads share one model: all of
it counts.

    python benchmarks/server.py --clients 32 --sessions 10000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from still_agent import Agent, Budget
from still_agent.messages import Message
from still_memory.store import MemoryStore

NAMES = ("Ana", "Max", "Eva", "Tom", "Ida", "Ben", "Mia", "Leo")
CITIES = ("Porto", "Rome", "Oslo", "Cairo", "Lima", "Bern", "Seoul", "Quito")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--sessions", type=int, default=0, help="others in the store")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def said(client: int, turn: int) -> str:
    """What a client says, which no other says."""
    name, city = NAMES[client % len(NAMES)], CITIES[(client // len(NAMES) + turn) % len(CITIES)]
    if turn % 2:
        return f"Where does my sister {name} live?"
    return f"I am client {client}, and this is message {turn}. My sister {name} lives in {city}."


@dataclass
class Client:
    """One conversation, and what was measured in it."""

    number: int
    url: str
    replies: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text
    tokens: int = 0
    failed: str = ""

    def talk(self, turns: int) -> None:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=600)
        messages: list[Any] = []
        try:
            for turn in range(turns):
                messages.append({"role": "user", "content": said(self.number, turn)})
                self.replies.append(self._reply(client, messages))
                messages.append({"role": "assistant", "content": self.replies[-1]})
        except Exception as error:
            self.failed = repr(error)

    def _reply(self, client: openai.OpenAI, messages: list[Any]) -> str:
        began, text = time.perf_counter(), ""
        for chunk in client.chat.completions.create(
            model="reference",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"session_id": f"client {self.number}"},
        ):
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece and not text:
                self.first.append(time.perf_counter() - began)
            text += piece or ""
            self.tokens += chunk.usage.completion_tokens if chunk.usage else 0
        return text


def fill(model: str, slots: int, store: Path, sessions: int) -> None:
    """Put sessions of a few tokens into the store."""
    with Agent.load(model, store=store, budget=Budget(slots=slots)) as agent:
        agent.session("other 0").read("My sister Ana lives in Porto.")
    memory = MemoryStore(store, synchronous="NORMAL")
    head = memory.head("other 0")
    assert head is not None
    state = memory.load(head)
    for number in range(1, sessions):
        memory.fork(head, f"other {number}", state)
    memory.close()


def alone(model: str, slots: int, clients: int, turns: int) -> list[list[str]]:
    """The same conversations, one after the other."""
    found = []
    with Agent.load(model, budget=Budget(slots=slots)) as agent:
        for client in range(clients):
            messages: list[Message] = []
            for turn in range(turns):
                messages.append(Message("user", said(client, turn)))
                reply = agent.answer(messages, session=f"client {client}").finish()
                messages.append(Message("assistant", reply.text))
            found.append([m.text for m in messages[1::2]])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th of a hundred, in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1000, 1), "p95_ms": round(cuts[94] * 1000, 1)}


def listing(url: str) -> dict[str, float]:
    """A page of the sessions, read again and again."""
    seconds = []
    with httpx.Client(base_url=url) as http:
        for _ in range(10):
            began = time.perf_counter()
            http.get("/v1/sessions", params={"limit": 20}).raise_for_status()
            seconds.append(time.perf_counter() - began)
    return spread(seconds)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "s.db"
        if args.sessions:
            fill(args.model, args.slots, store, args.sessions)
        command = [sys.executable, "-m", "still_agent", "serve", "--model", args.model,
                   "--name", "reference", "--store", str(store), "--port", "0",
                   "--slots", str(args.slots), "--concurrency", str(args.clients),
                   "--open-sessions", str(args.clients)]  # fmt: skip
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as served:
            try:
                assert served.stdout is not None
                url = served.stdout.readline().split(" at ")[1].split("/v1")[0]
                clients = [Client(number, url) for number in range(args.clients)]
                threads = [
                    threading.Thread(target=client.talk, args=(args.turns,)) for client in clients
                ]
                began = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = time.perf_counter() - began
                listed = listing(url)
            finally:
                served.terminate()
        replies = alone(args.model, args.slots, args.clients, args.turns)
    tokens = sum(client.tokens for client in clients)
    return {
        "clients": args.clients,
        "turns": args.clients * args.turns,
        "other_sessions": args.sessions,
        "seconds": round(seconds, 2),
        "first_token": spread([value for client in clients for value in client.first]),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "list_of_sessions": listed,
        "failed": [client.failed for client in clients if client.failed],
        "lost": sum(args.turns - len(client.replies) for client in clients),
        "otherwise_than_alone": sum(
            a != b
            for client, told in zip(clients, replies, strict=True)
            for a, b in zip(client.replies, told, strict=False)
        ),
    }


if __name__ == "__main__":
    args = arguments()
    figures = measure(args)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:>22} {value}")
    assert not figures["lost"] and not figures["failed"], "requests were lost"
    assert not figures["otherwise_than_alone"], "replies differ from those given alone"
