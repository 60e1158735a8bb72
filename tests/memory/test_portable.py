"""A session travels as one file, and a file that lies brings nothing in."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import stat
import struct
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.errors import (
    ConflictError,
    DamageError,
    InputError,
    StillError,
    StoreError,
    UnknownSessionError,
)
from still_memory.identity import ModelIdentity
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Same = Callable[[Checkpoint, Checkpoint], bool]

WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


@pytest.fixture
def state(raw_span: Callable[..., Span], compact_span: Callable[..., Span]) -> Checkpoint:
    pinned, memory, tail = raw_span(0, 4), compact_span(4, 20, 5), raw_span(18, 30, 9)
    return Checkpoint(
        (
            Entry(pinned, 0, 4, 0, "pinned"),
            Entry(memory, 4, 20, 4, "memory", 2),
            Entry(tail, 20, 25, 9, "tail"),
            Entry(tail, 25, 30, 14, "tail"),
        ),
        30,
        {"next": [0.1, None]},
    )


@pytest.fixture
def filled(store: MemoryStore, model: ModelIdentity, state: Checkpoint) -> MemoryStore:
    turns = [
        NewTurn("system", "Be brief.", [1]),
        NewTurn("user", "naïve \0 \U0001f9e0 </s>", [0, 2**32 - 1], {"compactions": 3}, WHEN),
    ]
    settings = {"system": "Be brief."}
    store.create("ålice", model, checkpoint=state, turns=turns, settings=settings)
    return store


@pytest.fixture
def file(filled: MemoryStore, tmp_path: Path) -> Path:
    path = tmp_path / "alice.still"
    Portable.of(filled, "ålice").write(path)
    return path


@pytest.fixture
def elsewhere(open_store: Opens, tmp_path: Path) -> MemoryStore:
    return open_store(tmp_path / "elsewhere.db")


def frames(path: Path) -> list[bytes]:
    data, found = path.read_bytes()[16:-32], []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        found.append(data[8 : 8 + size])
        data = data[8 + size :]
    return found


def forge(path: Path, parts: list[bytes], sizes: dict[int, int] | None = None) -> None:
    """A file whose digest is right, whatever it says."""
    data = b"still session 1\n" + b"".join(
        struct.pack("<Q", (sizes or {}).get(n, len(part))) + part for n, part in enumerate(parts)
    )
    path.write_bytes(data + hashlib.sha256(data).digest())


def test_a_session_travels_bit_for_bit(
    filled: MemoryStore, file: Path, elsewhere: MemoryStore, same: Same, state: Checkpoint,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = Portable.read(file)
    head = found.save(elsewhere, model=found.model)
    assert elsewhere.head("ålice") == head and same(elsewhere.load(head), state)
    assert head.settings == {"system": "Be brief."} and (head.turns, head.tokens) == (2, 30)

    def told(store: MemoryStore) -> list[Any]:
        turns = store.history("ålice")
        return [(t.role, t.text, t.tokens, t.usage, t.created, t.number) for t in turns]

    assert told(elsewhere) == told(filled)
    Portable.of(elsewhere, "ålice").write(again := tmp_path / "again.still")
    assert again.read_bytes() == file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_name_that_is_taken_needs_another(file: Path, filled: MemoryStore, same: Same) -> None:
    found = Portable.read(file)
    with pytest.raises(ConflictError, match="choose another name"):
        found.save(filled)
    spans = filled.stats().spans
    head = found.save(filled, "bob", found.model)
    assert same(filled.load(head), found.checkpoint)
    assert filled.stats().spans == spans  # they have the address that they had


def test_what_cannot_be_exported_leaves_no_file(filled: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(UnknownSessionError):
        Portable.of(filled, "nobody")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for path in (taken, tmp_path, tmp_path / "no" / "folder", "a\0b"):
        with pytest.raises(InputError):
            Portable.of(filled, "ålice").write(path)
    assert taken.read_text() == "mine"
    broken = Portable.of(filled, "ålice")
    object.__setattr__(broken, "turns", [None])
    with pytest.raises(AttributeError):
        broken.write(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other"
    for content in (b"", b"hello", b"SQLite format 3\0" * 99, pickle.dumps({"a": 1})):
        other.write_bytes(content)
        with pytest.raises(InputError, match="not an exported session"):
            Portable.read(other)
    other.write_bytes(file.read_bytes().replace(b"session 1\n", b"session 9\n"))
    with pytest.raises(StoreError, match="another version"):
        Portable.read(other)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing", "a\0b"):
        with pytest.raises(InputError):
            Portable.read(path)


def test_a_truncated_or_longer_file_is_refused(file: Path) -> None:
    good = file.read_bytes()
    for size in [*range(16, 200), *range(200, len(good), 211), *range(len(good) - 70, len(good))]:
        file.write_bytes(good[:size])
        with pytest.raises(DamageError):
            Portable.read(file)
    for more in (b"\0", good):
        file.write_bytes(good + more)
        with pytest.raises(DamageError):
            Portable.read(file)


def test_no_flipped_bit_gets_through(file: Path) -> None:
    good = file.read_bytes()
    chance = random.Random(0)
    for at in [*range(1200), *(chance.randrange(len(good)) for _ in range(600))]:
        bad = bytearray(good)
        bad[at] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(StillError):
            Portable.read(file)


def changed(key: str, value: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The header with one thing changed; `key` is a path into it."""

    def change(parts: list[bytes]) -> list[bytes]:
        header = json.loads(parts[0])
        at, *rest = key.split(".")[::-1]
        where: Any = header
        for step in rest[::-1]:
            where = where[int(step) if isinstance(where, list) else step]
        where[int(at) if isinstance(where, list) else at] = value
        return [json.dumps(header).encode(), *parts[1:]]

    return change


def told(**what: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The first turn with something changed."""
    return lambda parts: [
        parts[0], json.dumps({**json.loads(parts[1]), **what}).encode(), *parts[2:]
    ]  # fmt: skip


HOSTILE = {
    "no header": lambda parts: parts[1:],
    "an empty header": lambda parts: [b"", *parts[1:]],
    "a header that is not JSON": lambda parts: [b"{", *parts[1:]],
    "a header that is a pickle": lambda parts: [pickle.dumps(print), *parts[1:]],
    "a deep header": lambda parts: [b"[" * 10**6, *parts[1:]],
    "deep settings": changed("settings", {"x": json.loads('{"a":' * 600 + "1" + "}" * 600)}),
    "an unknown field": changed("path", "/etc/passwd"),
    "more turns": changed("turns", 3),
    "fewer turns": changed("turns", 1),
    "endless turns": changed("turns", 2**52),
    "a negative count": changed("turns", -1),
    "a count that is a float": changed("turns", 2.0),
    "a count that is true": changed("turns", True),
    "an endless integer": changed("tokens", 10**400),
    "another length": changed("tokens", 31),
    "no name": changed("name", ""),
    "a long name": changed("name", "x" * 513),
    "a name of another type": changed("name", ["x"]),
    "a name that is no text": changed("name", "\ud800"),
    "settings that are a list": changed("settings", []),
    "an infinite setting": changed("settings", {"x": float("inf")}),
    "an extra that is no number": changed("extra", {"x": float("nan")}),
    "no model": changed("model", {}),
    "endless layers": changed("spans.0.layers", 10**9),
    "no layer": changed("spans.0.layers", 0),
    "a layer more": changed("spans.0.layers", 3),
    "a span that ends before it starts": changed("spans.0.end", 0),
    "a raw span of other tokens": changed("spans.0.end", 5),
    "a span of endless tokens": changed("spans.1.end", 2**53),
    "a rotation past any window": changed("spans.0.rotated_at", 2**60),
    "negative rounds": changed("spans.0.rounds", -1),
    "ids of other tokens": changed("spans.0.ids", [1]),
    "ids past any vocabulary": changed("spans.0.ids", [2**32] * 4),
    "ids of a compact span": changed("spans.1.ids", [1] * 16),
    "an entry of no span": changed("entries.0.0", 9),
    "an entry of a span from the end": changed("entries.0.0", -1),
    "an entry of another span": changed("entries.0.0", 1),
    "an entry past its span": changed("entries.3.2", 31),
    "a gap": changed("entries.3.1", 26),
    "a share that there is not": changed("entries.0.4", "heap"),
    "an endless base": changed("entries.0.3", 2**70),
    "a turn that is not JSON": lambda parts: [parts[0], b"\x80\x04.", *parts[2:]],
    "a turn with more": told(parent=7),
    "a turn with tokens that are none": told(tokens=[-1]),
    "a turn with tokens of text": told(tokens="abcd"),
    "a turn that is no text": told(text="\udc00"),
    "a turn without a time zone": told(created="2026-01-01T00:00:00"),
    "a turn at no time": told(created="now'); drop table turns;--"),
    "a turn before all time": told(created="0001-01-01T00:00:00+14:00"),
    "usage that is no number": told(usage={"x": float("nan")}),
    "a layer that is a pickle": lambda parts: [*parts[:-1], pickle.dumps([1])],
    "an empty layer": lambda parts: [*parts[:-1], b""],
    "layers in another order": lambda parts: [*parts[:-3], parts[-1], parts[-2], parts[-3]],
    "a layer of endless slots": lambda parts: [
        *parts[:-1], parts[-1].replace(b"[2,12,8]", b"[2,%d,8]" % 2**31)
    ],
    "one layer fewer": lambda parts: parts[:-1],
    "one layer more": lambda parts: [*parts, parts[-1]],
}  # fmt: skip


@pytest.mark.parametrize("forgery", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_forged_file_brings_nothing_in(
    forgery: Callable[[list[bytes]], list[bytes]], file: Path, elsewhere: MemoryStore
) -> None:
    before = elsewhere.stats()
    forge(file, forgery(frames(file)))
    with pytest.raises(DamageError) as told:
        Portable.read(file).save(elsewhere)
    assert len(str(told.value)) < 600
    assert elsewhere.stats() == before and elsewhere.sessions() == []


@pytest.mark.parametrize("size", [2**20, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("frame", [0, 1, 5])
def test_a_length_is_not_believed(size: int, frame: int, file: Path) -> None:
    forge(file, frames(file), {frame: size})
    tracemalloc.start()
    try:
        with pytest.raises(DamageError, match=r"too early|are allowed"):
            Portable.read(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_long_only_in_name_takes_no_memory(file: Path) -> None:
    data = file.read_bytes()
    begin = data.index(b"\n") + 1
    header = begin + 8 + struct.unpack("<Q", data[begin : begin + 8])[0]
    with file.open("r+b") as held:
        held.truncate(header)
        held.seek(header)
        held.write(struct.pack("<Q", 2**40))
        held.truncate(2**41)  # holes: no disk is taken
    tracemalloc.start()
    with pytest.raises(DamageError, match="allowed"):
        Portable.read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_forgery_that_is_true_to_form_is_read(file: Path) -> None:
    """So it is the forgeries that are refused, and not the forger's tool."""
    good = file.read_bytes()
    forge(file, frames(file))
    assert file.read_bytes() == good
    forge(file, changed("name", "bob")(frames(file)))
    assert Portable.read(file).name == "bob"
