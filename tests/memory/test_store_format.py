"""docs/store-format.md is true: a store is read by it alone, without this package.

Nothing of `still_memory` reads here, and no torch: sqlite3, struct, hashlib, json, numpy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint, Entry
from still_memory.graphs_table import GraphState, Place
from still_memory.identity import ModelIdentity
from still_memory.migrations import migrations
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
PAGE = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text("utf-8")
STORES = Path(__file__).parent / "stores"
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@pytest.fixture
def state(raw_span: Callable[..., Span], compact_span: Callable[..., Span]) -> Checkpoint:
    compact, raw = compact_span(0, 20, 5), raw_span(20, 30, 9)
    entries = Entry(compact, 0, 20, 0, "memory", 1), Entry(raw, 20, 28, 5, "tail")
    return Checkpoint(entries, 28, {"next": [7, None, "ü"]})


@pytest.fixture
def store(open_store: Opens, model: ModelIdentity, state: Checkpoint) -> MemoryStore:
    store = open_store()
    head = store.create(
        "ålice",
        model,
        checkpoint=state,
        turns=[NewTurn("system", "Be brief.", [1, 2]), NewTurn("user", "Pörto", [2**32 - 1])],
        settings={"system": "Be brief."},
    )
    store.commit(head, state, [NewTurn("assistant", "Yes.", [9], {"n": 1.5})])
    return store


def digest(key: bytes, purpose: str, *parts: object) -> bytes:
    """As the page has it."""
    state = hashlib.blake2b(key=key, person=purpose.encode(), digest_size=32)
    for part in parts:
        data = part if isinstance(part, bytes) else f"{type(part).__name__} {part}".encode()
        state.update(struct.pack("<Q", len(data)) + data)
    return state.digest()


def tensors(data: bytes) -> dict[str, np.ndarray]:
    """One layer's, by the page."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and length <= 4096
    names = ("keys", "values", "positions", "bias", "salience")
    assert list(header) == [n for n in names if n in header or n in names[:3]]
    at, found = 0, {}
    for name, about in header.items():
        low, high = about["data_offsets"]
        assert low == at
        raw = data[8 + length + low : 8 + length + high]
        found[name] = np.frombuffer(raw, DTYPES[about["dtype"]]).reshape(about["shape"])
        at = high
    assert 8 + length + at == len(data)
    return found


def same_layers(ours: Span, theirs: list[bytes]) -> None:
    assert len(ours.layers) == len(theirs)
    for slots, data in zip(ours.layers, theirs, strict=True):
        found = tensors(data)
        assert found.keys() == slots.tensors().keys()
        for name, tensor in slots.tensors().items():
            np.testing.assert_array_equal(found[name], tensor.numpy())


def test_a_store_is_read_by_the_page_alone(store: MemoryStore, state: Checkpoint) -> None:
    store.close()  # so that all of it is in the one file
    conn = sqlite3.connect(store.path)
    conn.row_factory = sqlite3.Row

    def rows(query: str, *values: object) -> list[sqlite3.Row]:
        return conn.execute(query, values).fetchall()

    assert store.path.read_bytes()[68:72] == b"Stil"  # application_id, in SQLite's header
    ((key,),) = rows("select value from meta where name = 'key'")
    (model,) = rows("select * from models")
    identity = json.loads(model["identity"])
    assert list(identity) == ["name", "weights", "config", "tokenizer", "template", "dtype"]
    del identity["name"]
    nameless = json.dumps(identity, separators=(",", ":")).encode()
    assert model["address"] == hashlib.sha256(nameless).hexdigest()

    parent, above, told, said = None, b"", b"", []
    for turn in rows("select * from turns order by id"):
        parts = (turn[c] for c in ("role", "created", "usage", "tokens", "text"))
        told = digest(key, "still said", told, turn["role"], turn["text"])
        assert turn["said"] == told
        above = digest(key, "still turn", above, *parts, told)
        assert (turn["parent"], turn["digest"]) == (parent, above)
        parent = turn["id"]
        ids = list(struct.unpack(f"<{len(turn['tokens']) // 4}I", turn["tokens"]))
        said.append((turn["role"], turn["text"], ids, json.loads(turn["usage"])))
    assert said == [
        ("system", "Be brief.", [1, 2], {}),
        ("user", "Pörto", [2**32 - 1], {}),
        ("assistant", "Yes.", [9], {"n": 1.5}),
    ]

    (session,) = rows("select * from sessions")
    assert (session["name"], session["generation"]) == ("ålice", 2)
    (head,) = rows(
        "select * from checkpoints where session = ? and generation = ?",
        session["id"], session["generation"],
    )  # fmt: skip
    assert (head["turn"], head["turns"], head["tokens"]) == (parent, 3, 28)
    assert head["slots"] == 13 and json.loads(head["extra"]) == {"next": [7, None, "ü"]}
    sealed = (
        session["name"], head["generation"], model["address"], head["turns"], head["tokens"],
        above, session["settings"], head["slots"], head["bytes"], head["entries"], head["extra"],
    )  # fmt: skip
    assert head["digest"] == digest(key, "still checkpoint", *sealed)

    size = 0
    for entry, ours in zip(json.loads(head["entries"]), state.entries, strict=True):
        assert entry[1:] == [ours.low, ours.high, ours.base, ours.share, ours.level]
        (span,) = rows("select * from spans where address = ?", entry[0])
        assert rows(
            "select 1 from checkpoint_spans where checkpoint = ? and span = ?",
            head["id"], span["id"],
        )  # fmt: skip
        layers = rows("select * from span_layers where span = ? order by layer", span["id"])
        assert [row["layer"] for row in layers] == list(range(span["layers"]))
        marks = [digest(key, "still layer", row["data"]) for row in layers]
        assert [row["digest"] for row in layers] == marks
        about = [span[c] for c in ("start", "end", "rotated_at", "rounds", "compactor")]
        told = [] if span["ids"] is None else [span["ids"]]
        found = digest(key, "still span", model["address"], *about, *told, span["codec"], *marks)
        assert span["address"] == found.hex()
        assert about == [ours.span.start, ours.span.end, ours.span.rotated_at, ours.span.rounds,
                         ours.span.compactor]  # fmt: skip
        assert told == ([] if ours.span.ids is None else [struct.pack("<10I", *ours.span.ids)])
        held = sum(len(row["data"]) for row in layers) + len(span["ids"] or b"")
        assert held == span["bytes"]
        size += held
        same_layers(ours.span, [row["data"] for row in layers])
    assert size == head["bytes"]
    assert [r[0] for r in rows("select rowid from turn_words where turn_words match 'porto'")] == [
        2
    ]
    conn.close()


def test_an_exported_session_is_read_by_the_page_alone(
    store: MemoryStore, state: Checkpoint, tmp_path: Path
) -> None:
    Portable.of(store, "ålice").write(tmp_path / "x.still")
    data = (tmp_path / "x.still").read_bytes()
    assert data[:16] == b"still session 1\n"
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    frames, at = [], 16
    while at < len(data) - 32:
        (length,) = struct.unpack_from("<Q", data, at)
        frames.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(data) - 32
    header, *rest = frames
    told = json.loads(header)
    turns, layers = rest[: told["turns"]], rest[told["turns"] :]
    assert set(told) == {
        "name", "model", "settings", "turns", "tokens", "spans", "entries", "extra"
    }  # fmt: skip
    assert (told["name"], told["tokens"], told["extra"]) == ("ålice", 28, state.extra)
    assert [json.loads(t)["text"] for t in turns] == ["Be brief.", "Pörto", "Yes."]
    assert set(json.loads(turns[0])) == {"role", "text", "tokens", "created", "usage"}
    for about, ours in zip(told["spans"], (e.span for e in state.entries), strict=True):
        assert set(about) == {
            "start", "end", "rotated_at", "rounds", "compactor", "ids", "layers"
        }  # fmt: skip
        same_layers(ours, layers[: about["layers"]])
        del layers[: about["layers"]]
    assert not layers
    assert told["entries"] == [
        [n, e.low, e.high, e.base, e.share, e.level] for n, e in enumerate(state.entries)
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_layers_are_read_by_the_page_alone(
    bits: int, open_store: Opens, model: ModelIdentity, state: Checkpoint
) -> None:
    store = open_store(codec=f"int{bits}")
    head = store.create("x", model, checkpoint=state, turns=[], settings={})
    ours = store.load(head)
    with store._file.reading() as conn:
        rows = conn.execute(
            "select l.data, s.address, l.layer from span_layers l join spans s on s.id = l.span"
            " where s.codec = ?",
            (f"int{bits}",),
        ).fetchall()
        (chosen,) = conn.execute("select value from meta where name = 'codec'").fetchone()
    assert chosen == f"int{bits}".encode() and len(rows) == 4
    seen = []
    for data, _, _ in rows:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        told = ("positions", "bias", "salience", "keys_low", "keys_high", "values_low",
                "values_high", "keys", "values")  # fmt: skip
        assert list(header) == [name for name in told if name in header]
        found, at = {}, 0
        for name, about in header.items():
            low, high = about["data_offsets"]
            assert low == at
            raw = data[8 + length + low : 8 + length + high]
            kind = "u1" if name in ("keys", "values") else DTYPES[about["dtype"]]
            found[name] = np.frombuffer(raw, kind).reshape(about["shape"])
            at = high
        slots = found["positions"].shape[1]
        for name, axis in (("keys", 1), ("values", 2)):
            steps = found[name]
            if bits == 4:
                steps = np.stack([steps & 15, steps >> 4], 2).reshape(len(steps), -1, 8)[:, :slots]
            low, high = (
                np.repeat(found[f"{name}_{edge}"], 32, axis)[:, :slots, :8]
                for edge in ("low", "high")
            )
            width = (high - low) / np.float32(2**bits - 1)
            found[name] = steps * np.maximum(width, np.float32(1e-12)) + low
        seen.append(found)
    layers = [slots.tensors() for e in ours.entries for slots in e.span.layers]
    for theirs in layers:
        assert any(
            found.keys() >= theirs.keys()
            and all(np.array_equal(found[n], t.numpy()) for n, t in theirs.items())
            for found in seen
        )


def test_an_encrypted_store_is_opened_by_the_page_alone(
    open_store: Opens, model: ModelIdentity, state: Checkpoint
) -> None:
    mine = bytes(range(32))
    store = open_store(key=mine, tenant="acmé")
    turn = NewTurn("user", "Pörto", [7, 8], {"n": 1})
    store.create("ålice", model, checkpoint=state, turns=[turn], settings={"system": "Brief."})
    store.close()
    conn = sqlite3.connect(store.path)
    conn.row_factory = sqlite3.Row

    def derive(key: bytes, purpose: str, data: bytes = b"", size: int = 32) -> bytes:
        state = hashlib.blake2b(data, key=key, person=purpose.encode(), digest_size=size)
        return state.digest()

    ((name, sealed),) = conn.execute("select name, value from meta")
    assert name == "sealed key" and sealed[:1] == b"\x01"
    cipher = AESGCM(derive(mine, "still wrap"))
    key = cipher.decrypt(sealed[1:13], sealed[13:], b"\x01still store key")
    names = AESSIV(derive(key, "still names", size=64))
    tenant = conn.execute("select * from tenants where id = 2").fetchone()["name"]
    assert names.decrypt(base64.urlsafe_b64decode(tenant), [b"tenant"]).decode() == "acmé"
    its = digest(key, "still tenant", "acmé")
    sealing = derive(its, "still seal")

    def opened(data: bytes | str, *place: object) -> bytes:
        data = base64.b64decode(data) if isinstance(data, str) else data
        cipher = AESGCM(derive(sealing, "still message", data[:12]))
        return cipher.decrypt(data[12:24], data[24:], digest(sealing, "still place", *place))

    (session,) = conn.execute("select * from sessions")
    space = [b"session", tenant.encode()]
    assert names.decrypt(base64.urlsafe_b64decode(session["name"]), space).decode() == "ålice"
    assert json.loads(opened(session["settings"], "settings")) == {"system": "Brief."}
    (row,) = conn.execute("select * from turns")
    said = {c: opened(row[c], c, b"") for c in ("role", "usage", "tokens", "text")}
    assert said == {"role": b"user", "usage": b'{"n":1}', "text": "Pörto".encode(),
                    "tokens": struct.pack("<2I", 7, 8)}  # fmt: skip
    parts = (row[c] for c in ("role", "created", "usage", "tokens", "text"))
    assert row["said"] == digest(its, "still said", b"", "user", "Pörto")
    assert row["digest"] == digest(its, "still turn", b"", *parts, row["said"])
    (head,) = conn.execute("select * from checkpoints")
    assert json.loads(opened(head["extra"], "extra", "ålice", 1)) == state.extra
    entries = json.loads(opened(head["entries"], "entries", "ålice", 1))
    for entry, ours in zip(entries, state.entries, strict=True):
        span = conn.execute("select * from spans where address = ?", [entry[0]]).fetchone()
        if ours.span.ids is not None:
            packed = struct.pack("<10I", *ours.span.ids)
            assert opened(span["ids"], span["address"], "ids") == packed
        layers = conn.execute("select * from span_layers where span = ? order by layer",
                              [span["id"]]).fetchall()  # fmt: skip
        plain = [opened(r["data"], span["address"], r["layer"], "exact") for r in layers]
        marks = [opened(r["digest"], span["address"], r["layer"], "digest") for r in layers]
        assert marks == [digest(its, "still layer", d) for d in plain]
        same_layers(ours.span, plain)
    found = conn.execute("select rowid from turn_words where turn_words match 'p*'")
    assert found.fetchall() == []
    conn.close()


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "encrypted"])
def test_a_graphs_states_are_read_by_the_page_alone(sealed: bool, open_store: Opens) -> None:
    mine = bytes(range(32)) if sealed else None
    store = open_store(key=mine)
    place = Place("ålice", "süb:1", "id-2")
    values = {"1 messages": [b"", b"one", b"two"], "2 x": [b"three"]}
    store.graphs.put(GraphState(place, "id-1", "rün", b"about", b"body", values))
    store.graphs.put_writes(place, {"task 0": b"written"})
    store.close()
    conn = sqlite3.connect(store.path)
    conn.row_factory = sqlite3.Row
    (key,) = conn.execute("select value from meta where name like '%key'").fetchone()

    def derive(key: bytes, purpose: str, data: bytes = b"", size: int = 32) -> bytes:
        person = purpose.encode()
        return hashlib.blake2b(data, key=key, person=person, digest_size=size).digest()

    if mine is not None:
        cipher = AESGCM(derive(mine, "still wrap"))
        key = cipher.decrypt(key[1:13], key[13:], b"\x01still store key")

    def opened(data: bytes | str, *about: object) -> bytes:
        if not sealed:
            return data.encode() if isinstance(data, str) else data
        data = base64.b64decode(data) if isinstance(data, str) else data
        sealing = derive(key, "still seal")
        cipher = AESGCM(derive(sealing, "still message", data[:12]))
        return cipher.decrypt(data[12:24], data[24:], digest(sealing, "still place", *about))

    def name(stored: str, *space: str) -> str:
        if not sealed:
            return stored
        names, parts = AESSIV(derive(key, "still names", size=64)), [s.encode() for s in space]
        return names.decrypt(base64.urlsafe_b64decode(stored), parts).decode()

    (row,) = conn.execute("select * from graph_states")
    assert name(row["thread"], "session", "") == "ålice" and name(row["run"], "run", "") == "rün"
    assert name(row["space"], "space", "", row["thread"]) == "süb:1"
    assert (row["name"], row["parent"]) == ("id-2", "id-1")
    at = "ålice", "süb:1", "id-2"
    assert (opened(row["about"], "about", *at), opened(row["body"], "body", *at)) == (
        b"about", b"body"
    )  # fmt: skip
    told = "thread", "space", "name", "parent", "run", "holds", "about", "body"
    assert row["digest"] == digest(key, "still graph", *(row[c] for c in told))
    held = set()
    for value, address in json.loads(opened(row["holds"], "holds", *at)).items():
        last, pieces = bytes.fromhex(address), []
        piece = conn.execute("select * from graph_values where address = ?", [last]).fetchone()
        held.add(piece["id"])
        while piece is not None:
            query = "select * from graph_values where id = ?"
            above = conn.execute(query, [piece["parent"]]).fetchone()
            pieces.insert(0, opened(piece["data"], "value", piece["address"]))
            before = b"" if above is None else above["address"]
            assert piece["address"] == digest(key, "still value", before, pieces[0])
            piece = above
        assert pieces == values[value]
    assert held == {v for (v,) in conn.execute("select value from graph_holds where state = 1")}
    (row,) = conn.execute("select * from graph_writes")
    assert name(row["name"], "write", "", row["thread"]) == "task 0"
    assert opened(row["data"], "write", *at, "task 0") == b"written"
    told = "thread", "space", "state", "name", "data"
    assert row["digest"] == digest(key, "still write", *(row[c] for c in told))
    conn.close()


def documented() -> dict[str, set[str]]:
    """The tables of the page, and their columns."""
    tables: dict[str, set[str]] = {}
    table = ""
    for name, columns in re.findall(r"^\| (?:`(\w+)`)? ?\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.M):
        table = name or table
        tables.setdefault(table, set()).update(re.findall(r"`(\w+)`", columns))
    return tables


def test_the_page_names_every_table_and_column_and_no_others(store: MemoryStore) -> None:
    conn = sqlite3.connect(store.path)
    tables = [
        name
        for name, kind in conn.execute("select name, type from pragma_table_list")
        if kind in ("table", "virtual") and not name.startswith(("sqlite_", "_sqlite_"))
    ]
    real = {
        name: {row[0] for row in conn.execute("select name from pragma_table_info(?)", (name,))}
        for name in tables
    }
    indexes = {
        name
        for (name,) in conn.execute(
            "select name from sqlite_master where type = 'index' and sql not null"
        )
        if "_sqlite_" not in name
    }
    applied = [name for (name,) in conn.execute("select name from _sqlite_migrations order by id")]
    conn.close()
    assert documented() == real
    (line,) = (line for line in PAGE.splitlines() if line.startswith("Indexes:"))
    assert set(re.findall(r"`(\w+)`", line)) == indexes
    assert all(f"`{name}`" in PAGE for name in applied) and f"schema `{applied[-1]}`" in PAGE


def test_there_is_a_store_of_every_older_schema(store: MemoryStore) -> None:
    with store._file.connection() as conn:
        rows = conn.execute("select name from _sqlite_migrations where migration_set = ?",
                            (migrations.name,))  # fmt: skip
        applied = sorted(name for (name,) in rows)
    assert {file.stem for file in STORES.glob("*.sql")} == set(applied[:-1])


@pytest.mark.parametrize("schema", sorted(file.stem for file in STORES.glob("*.sql")))
def test_a_store_that_older_code_wrote_is_checked_migrated_and_continued(
    schema: str, open_store: Opens, path: Path, tmp_path: Path
) -> None:
    """The dumps in `stores/` were made by the code that had this schema for its newest."""
    conn = sqlite3.connect(path)
    conn.execute("pragma page_size = 65536")
    conn.execute("pragma auto_vacuum = incremental")
    conn.executescript((STORES / f"{schema}.sql").read_text("utf-8"))
    conn.execute(f"pragma application_id = {0x5374696C}")
    conn.commit()
    conn.close()
    before = path.read_bytes()
    report = check_store(path)
    assert report.findings == [] and (report.turns, report.spans) == (3, 2)
    assert path.read_bytes() == before  # a check does not migrate

    store = open_store()
    head = store.head("alice")
    assert head is not None and head.settings == {"system": "Be brief."}
    state = store.load(head)
    assert [(e.low, e.high, e.base, e.share, e.level) for e in state.entries] == [
        (0, 8, 0, "memory", 1), (8, 12, 3, "tail", 0)
    ]  # fmt: skip
    compact, raw = (e.span for e in state.entries)
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8
    np.testing.assert_array_equal(compact.layers[1].keys, grid + 1)
    np.testing.assert_array_equal(compact.layers[1].values, grid * 2 + 1)
    np.testing.assert_array_equal(compact.layers[0].bias, [[0.0, 0.5, -np.inf]] * 2)
    assert (raw.rotated_at, state.extra) == (8, {"next": [7]})
    assert raw.ids == (None if schema == "m001_conversations" else (8, 9, 10, 11))
    said = [(t.role, t.text, t.tokens) for t in store.history(head)]
    assert said[1:] == [("user", "My sister Ana lives in Porto.", [3, 4, 5]),
                        ("assistant", "Noted.", [6])]  # fmt: skip
    assert [m.number for m in store.search(head, "porto")] == [2]
    head = store.commit(head, state, [NewTurn("user", "And my brother?", [8])])
    assert store.bytes_written < 800  # its spans have kept their addresses
    store.close()
    assert check_store(path).findings == []
    other = open_store(tmp_path / "other.db")
    again = open_store()
    Portable.of(again, "alice").save(other)
    assert check_store(other.path).findings == []
