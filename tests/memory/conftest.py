"""Spans, checkpoints and stores to test with; factories, so that hypothesis may use them too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.identity import ModelIdentity
from still_memory.span import Slots, Span, raw_slots
from still_memory.store import MemoryStore

HEADS, WIDTH, LAYERS = 2, 8, 2


@pytest.fixture(scope="session")
def model() -> ModelIdentity:
    return ModelIdentity(
        name="tiny", weights="w", config="c", tokenizer="t", template="x", dtype="float32"
    )


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def raw_span() -> Callable[..., Span]:
    """Tokens `[start, end)` as raw slots of random content."""

    def make(start: int, end: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Span:
        shape = (HEADS, end - start, WIDTH)
        layers = tuple(
            raw_slots(
                _random(seed + 2 * layer, *shape).to(dtype),
                _random(seed + 2 * layer + 1, *shape).to(dtype),
                start,
            )
            for layer in range(LAYERS)
        )
        return Span(start, end, layers, rotated_at=start, ids=tuple(range(start, end)))

    return make


@pytest.fixture(scope="session")
def compact_span() -> Callable[..., Span]:
    """`[start, end)` in `slots` slots, one fewer in the last layer; bias and salience."""

    def make(start: int, end: int, slots: int, seed: int = 0, rounds: int = 1) -> Span:
        layers = []
        for layer in range(LAYERS):
            n = slots - (layer == LAYERS - 1)
            positions = torch.linspace(start, end - 1, n).expand(HEADS, n)
            bias = _random(seed + 100 + layer, HEADS, n)
            bias[0, -1] = -torch.inf
            keys, values = _random(seed + layer, 2, HEADS, n, WIDTH)  # views of one storage
            layers.append(Slots(keys, values, positions, bias, _random(seed + 200, HEADS, n)))
        return Span(start, end, tuple(layers), None, rounds, "compactor's address")

    return make


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[..., Checkpoint]:
    """Spans laid out one after another: compact ones as memory, raw ones as tail."""

    def make(spans: Sequence[Span], **extra: object) -> Checkpoint:
        entries, base = [], 0
        for span in spans:
            share = "tail" if span.raw else "memory"
            entries.append(Entry(span, span.start, span.end, base, share, span.rounds))
            base += entries[-1].slots
        return Checkpoint(tuple(entries), spans[-1].end if spans else 0, extra)

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[Checkpoint, Checkpoint], bool]:
    """Whether two checkpoints are equal, every tensor bit for bit."""

    def spans_equal(a: Span, b: Span) -> bool:
        mine, theirs = ([s.tensors() for s in span.layers] for span in (a, b))
        return (
            (a.start, a.end, a.rotated_at, a.rounds, a.compactor, a.ids)
            == (b.start, b.end, b.rotated_at, b.rounds, b.compactor, b.ids)
            and len(mine) == len(theirs)
            and all(
                x.keys() == y.keys()
                and all(
                    x[n].dtype == y[n].dtype
                    and x[n].shape == y[n].shape
                    and x[n].reshape(-1).view(torch.uint8).equal(y[n].reshape(-1).view(torch.uint8))
                    for n in x
                )
                for x, y in zip(mine, theirs, strict=True)
            )
        )

    def equal(a: Checkpoint, b: Checkpoint) -> bool:
        def place(e: Entry) -> tuple[object, ...]:
            return e.low, e.high, e.base, e.share, e.level

        return (a.length, a.extra, len(a.entries)) == (b.length, b.extra, len(b.entries)) and all(
            place(x) == place(y) and spans_equal(x.span, y.span)
            for x, y in zip(a.entries, b.entries, strict=True)
        )

    return equal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def open_store(path: Path) -> Iterator[Callable[..., MemoryStore]]:
    """Opens stores, and closes each when the test is over."""
    opened: list[MemoryStore] = []

    def make(at: Path = path, **options: object) -> MemoryStore:
        opened.append(MemoryStore(at, **options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., MemoryStore]) -> MemoryStore:
    return open_store()


@pytest.fixture
def in_child() -> Iterator[Callable[[Callable[[], str]], Callable[[], str]]]:
    """Runs a function in a forked process; the call it returns waits for what it answered.

    The answer is the function's return value, or the name and message of what it raised.
    """
    running: list[int] = []

    def start(work: Callable[[], str]) -> Callable[[], str]:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                answer = work()
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(into, answer.encode())
            os._exit(0)
        os.close(into)
        running.append(pid)

        def wait() -> str:
            with open(out, "rb") as pipe:
                answer = pipe.read().decode()
            os.waitpid(pid, 0)
            running.remove(pid)
            return answer

        return wait

    yield start
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
