"""Servers on free ports: in a thread of this process with the model loaded once, or a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import openai
import pytest

from still_agent import Agent, Budget
from still_agent.server.app import make_app
from still_agent.server.keys import Keys
from still_agent.server.limits import Limits
from still_agent.server.service import Service
from still_agent.server.serving import Server, listen
from still_memory.store import MemoryStore

ROOT = Path(__file__).parent.parent.parent
SLOTS = 512


def counting(numbers: int) -> dict[str, Any]:
    """A format whose reply takes about two tokens a number, whatever the model would rather say."""
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "array", "items": digit, "minItems": numbers, "maxItems": numbers}
    return {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}


LONG = counting(400)


@dataclass
class Served:
    """A server that runs."""

    url: str
    service: Service
    store: Path

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=60, **options)

    @property
    def agent(self) -> Agent:
        return self.service.agents.first

    def texts(self, session: str) -> list[str]:
        return [turn.text for turn in self.agent.store.history(session)]


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def loaded() -> Iterator[Agent]:
    with Agent.load("reference", budget=Budget(slots=SLOTS)) as agent:
        yield agent


@contextmanager
def serving(loaded: Agent, store: Path, keys: Keys | None, limits: Limits) -> Iterator[Served]:
    def load(**options: Any) -> Agent:
        memory = MemoryStore(store)
        return Agent(loaded.model, loaded.compactor, memory, budget=loaded.budget, **options)

    service = Service.of(load, limits, keys)
    with listen("127.0.0.1", 0) as listener:
        server = Server(service, make_app(service))
        thread = threading.Thread(target=server.answer, args=(listener,))
        thread.start()
        until(lambda: server.started)
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, store)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def serve(loaded: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`serve(keys, **limits)`; what is begun ends with the module."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def begin(keys: Keys | None = None, **limits: Any) -> Served:
            store = tmp_path_factory.mktemp("served") / "s.db"
            limits.setdefault("grace_s", 1.0)
            return stack.enter_context(serving(loaded, store, keys, Limits(**limits)))

        yield begin


@pytest.fixture(scope="module")
def server(serve: Serve) -> Served:
    """One without keys, as `still-agent serve` begins it."""
    return serve()


class Process:
    """`still-agent serve` as its user starts it."""

    def __init__(self, store: Path, *options: str, port: int = 0) -> None:
        paths = [str(ROOT), str(ROOT / "memory")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "still_agent", "serve", "--store", str(store),
             "--slots", str(SLOTS), "--port", str(port), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.log: list[str] = []
        threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True).start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http://" in line, line + "".join(self.log)
        self.url = line.split(" at ")[1].split("/v1")[0]

    def _read(self, stream: IO[str]) -> None:
        self.log.extend(stream)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def until(ready: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something; fail if it does not come."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.01)


def connected(url: str) -> socket.socket:
    """A bare connection, to speak badly on."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)
