"""States and stores that scripts and tests can make without pytest, and make again to compare."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import torch

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.identity import ModelIdentity
from still_memory.portable import UNVERIFIED
from still_memory.records import NewTurn
from still_memory.span import Slots, Span, raw_slots
from still_memory.store import MemoryStore

MODEL = ModelIdentity(
    name="tiny", weights="w", config="c", tokenizer="t", template="x", dtype="float32"
)


def raw_span(
    start: int, end: int, seed: int, *, layers: int = 2, heads: int = 1, width: int = 4
) -> Span:
    """Tokens `[start, end)` as raw slots of random content."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        keys, values = torch.randn(2, heads, end - start, width, generator=chance)
        made.append(raw_slots(keys, values, start))
    ids = tuple((seed + n) % 4096 for n in range(start, end))
    return Span(start, end, tuple(made), rotated_at=start, ids=ids)


def compact_span(
    start: int, end: int, slots: int, seed: int, *, layers: int = 2, heads: int = 1, width: int = 4
) -> Span:
    """`[start, end)` in fewer slots, with bias and salience."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        keys, values = torch.randn(2, heads, slots, width, generator=chance)
        bias, salience = torch.randn(2, heads, slots, generator=chance)
        positions = torch.linspace(start, end - 1, slots).expand(heads, slots)
        made.append(Slots(keys, values, positions, bias, salience))
    return Span(start, end, tuple(made), None, 1, "compactor's address")


def state(seed: int, length: int = 30) -> Checkpoint:
    """Pinned, memory and tail; another seed is another state. The pinned part is always one."""
    pinned, memory = raw_span(0, 4, 0), compact_span(4, length - 10, 3, seed)
    tail = raw_span(length - 10, length, seed)
    entries = (
        Entry(pinned, 0, 4, 0, "pinned"),
        Entry(memory, 4, length - 10, 4, "memory", 1),
        Entry(tail, length - 10, length, 7, "tail"),
    )
    return Checkpoint(entries, length, {"seed": seed})


def mark(checkpoint: Checkpoint) -> str:
    """A digest of a whole state: where each span stands, and every byte of every tensor.

    That an import was verified by nobody yet is no part of it.
    """
    extra = sorted((k, v) for k, v in checkpoint.extra.items() if k != UNVERIFIED)
    seen = hashlib.sha256(repr((checkpoint.length, extra)).encode())
    for e in checkpoint.entries:
        s = e.span
        seen.update(repr((e.low, e.high, e.base, e.share, e.level)).encode())
        seen.update(repr((s.start, s.end, s.rotated_at, s.rounds, s.compactor, s.ids)).encode())
        for slots in s.layers:
            for name, tensor in slots.tensors().items():
                seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                seen.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def told(store: MemoryStore, name: str) -> list[tuple[object, ...]]:
    """The turns of a session, without the ids that one store gave them."""
    return [(t.number, t.role, t.text, t.tokens, t.usage) for t in store.history(name)]


def fill(store: MemoryStore, names: Sequence[str], turns: int) -> None:
    """Sessions of so many turns, committed one by one."""
    for place, name in enumerate(names):
        head = store.create(
            name, MODEL, checkpoint=state(100 * place), turns=[], settings={"system": name}
        )
        for n in range(turns):
            turn = NewTurn("user", f"{name} says heron {n}", [n, place], {"n": n})
            head = store.commit(head, state(100 * place + n + 1), [turn])


def check_file(path: Path) -> None:
    """AssertionError for a file that SQLite itself finds fault with."""
    conn = sqlite3.connect(path)
    try:
        assert conn.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert conn.execute("pragma foreign_key_check").fetchall() == []
    finally:
        conn.close()
