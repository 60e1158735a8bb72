"""An encrypted store: it tells its words to nobody, and takes nothing that it has not sealed there.

Digests of an encrypted store are made with a key that is not in the file, so they stop most of what
is tried here once more; the cipher's own binding is tried alone, on the vault.
"""

from __future__ import annotations

import base64
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint, Entry
from still_memory.errors import (
    DamageError,
    EncryptionError,
    ErasureError,
    InputError,
    StillError,
    UnknownSessionError,
)
from still_memory.migrations import APPLICATION_ID
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.retention import Retention
from still_memory.sealed_file import KIND as SEALED
from still_memory.sealed_file import PIECE, SealedReader, SealedWriter
from still_memory.store import MemoryStore
from still_memory.vault import SealedVault, Vault, user_key
from tests.attacks.states import MODEL, fill, mark, raw_span, state, told

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
Change = Callable[[sqlite3.Connection], None]


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILL_AGENT_KEY", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Sessions 1 and 2, of three generations and two turns each, and session 3 of a tenant."""
    with MemoryStore(tmp_path / "s.db", key=KEY) as store:
        fill(store, ["alice", "bob"], 2)
    with MemoryStore(tmp_path / "s.db", key=KEY, tenant="acme") as store:
        fill(store, ["alice"], 2)
    return tmp_path / "s.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., MemoryStore]]:
    stores = []

    def open_it(**options: object) -> MemoryStore:
        stores.append(MemoryStore(path, **{"key": KEY, **options}))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


def change(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    conn = sqlite3.connect(path)
    before = conn.total_changes
    for statement in statements:
        conn.execute(statement, values)
    assert conn.total_changes > before
    conn.commit()
    conn.close()


def read(store: MemoryStore, name: str = "alice") -> tuple[str, list[tuple[object, ...]]]:
    head = store.head(name)
    assert head is not None
    return mark(store.load(head)), told(store, name)


# -- what the file tells --------------------------------------------------------------------------

SECRETS = {
    "text": "Cinnabar", "prompt": "Obsidian", "session": "Marigold", "tenant": "Quicksilver",
    "role": "apothecary", "usage": "Verdigris", "extra": "Malachite", "fork": "Celandine",
    "draft": "Heliotrope",
}  # fmt: skip


def speak(path: Path, key: bytes | None) -> tuple[list[bytes], bytes]:
    """A store that holds every secret, one in a draft; what must not be in it, and its bytes."""
    with MemoryStore(path, key=key, tenant=SECRETS["tenant"]) as store:
        spoken = state(7)
        held = type(spoken)(spoken.entries, spoken.length, {"next": SECRETS["extra"]})
        ids = [1000001, 1000003, 1000007, 1000009]
        turn = NewTurn(
            SECRETS["role"], f"The word is {SECRETS['text']}.", ids, {"tool": SECRETS["usage"]}
        )
        settings = {"system": SECRETS["prompt"]}
        head = store.create(
            SECRETS["session"], MODEL, checkpoint=held, turns=[turn], settings=settings
        )
        store.fork(head, SECRETS["fork"], held)
        store.commit(head, state(8), [turn])
        head = store.head(SECRETS["session"])
        assert head is not None
        made = type(head)(**{**head.__dict__, "settings": {"parts": SECRETS["draft"]}})
        store.save_draft(head, made, held, [])
        tensors = [
            tensor.contiguous().numpy().tobytes()[:16]
            for entry in spoken.entries
            for slots in entry.span.layers
            for tensor in (slots.keys, slots.values)
        ]
        span_ids = spoken.entries[0].span.ids
        assert span_ids is not None
        spelt = [secret.encode() for secret in SECRETS.values()]
        packed = [struct.pack(f"<{len(some)}I", *some) for some in (ids, span_ids)]
        # with the log, while it is open
        files = [path, path.with_name(path.name + "-wal")]
        data = b"".join(file.read_bytes() for file in files)
    return [*spelt, *tensors, *packed], data + path.read_bytes()


def test_the_words_are_nowhere_in_the_file(tmp_path: Path) -> None:
    secrets, data = speak(tmp_path / "sealed.db", KEY)
    assert [s for s in secrets if s in data or s.lower() in data] == []
    encoded = [base64.b64encode(s)[: 4 * (len(s) // 3)] for s in secrets if len(s) > 5]
    assert [secret for secret in encoded if secret in data] == []
    secrets, data = speak(tmp_path / "plain.db", None)  # what is looked for can be found
    assert [secret for secret in secrets if secret not in data] == []


def test_the_store_key_and_the_users_are_not_in_the_file(path: Path) -> None:
    conn = sqlite3.connect(path)
    names = {name for (name,) in conn.execute("select name from meta")}
    conn.close()
    assert names == {"sealed key"}
    assert KEY not in path.read_bytes() and KEY.hex().encode() not in path.read_bytes()


def test_what_is_said_twice_is_sealed_otherwise(path: Path) -> None:
    conn = sqlite3.connect(path)
    for query in (
        "select data from span_layers", "select digest from span_layers",
        "select text from turns", "select role from turns", "select settings from sessions",
        "select entries from checkpoints",
    ):  # fmt: skip
        rows = conn.execute(query).fetchall()
        assert len(rows) == len(set(rows)) > 2
    names = [name for (name,) in conn.execute("select name from sessions order by id")]
    conn.close()
    assert len(set(names)) == 3  # also the same name of two tenants


# -- what it gives back ---------------------------------------------------------------------------


def test_it_gives_back_what_a_plain_store_does(
    opened: Callable[..., MemoryStore], path: Path, tmp_path: Path
) -> None:
    with MemoryStore(tmp_path / "plain.db") as plain:
        fill(plain, ["alice", "bob"], 2)
        store = opened()
        assert store.encrypted and not plain.encrypted
        for name in ("alice", "bob"):
            assert read(store, name) == read(plain, name)
            mine, theirs = store.head(name), plain.head(name)
            assert mine is not None and theirs is not None and mine.settings == theirs.settings
        assert [s.name for s in store.sessions()] == [s.name for s in plain.sessions()]
        assert store.head("nobody") is None
        with pytest.raises(UnknownSessionError):
            store.delete("nobody")
    assert [s.name for s in opened(tenant="acme").sessions()] == ["alice"]
    assert opened(tenant="else").sessions() == []


def test_forks_share_spans_and_equal_spans_are_one(opened: Callable[..., MemoryStore]) -> None:
    store = opened()
    head = store.head("alice")
    assert head is not None
    before = store.stats().spans
    store.fork(head, "carol", store.load(head))
    store.create("dora", MODEL, checkpoint=state(2), turns=[], settings={})  # alice's own state
    assert store.stats().spans == before
    assert read(store, "carol") == read(store, "alice")
    assert read(store, "dora")[0] == read(store, "alice")[0]


def test_it_is_searched_without_an_index(opened: Callable[..., MemoryStore]) -> None:
    store = opened()
    head = store.head("alice")
    assert head is not None
    assert [(m.number, m.excerpt) for m in store.search(head, "HERON says")] == [
        (2, "alice says heron 1"), (1, "alice says heron 0"),
    ]  # fmt: skip
    assert store.search(head, "bob") == []
    with pytest.raises(InputError, match="at least one word"):
        store.search(head, "")


def test_it_is_checked_measured_pruned_and_emptied(
    opened: Callable[..., MemoryStore], path: Path
) -> None:
    report = check_store(path, key=KEY)
    assert report.findings == [] and (report.sessions, report.turns) == (3, 6)
    store = opened()
    space = store.space(all_tenants=True)
    assert sorted((s.tenant, s.name) for s in space.sessions) == [
        ("", "alice"), ("", "bob"), ("acme", "alice"),
    ]  # fmt: skip
    pruned = store.prune(Retention(keep_checkpoints=1), all_tenants=True)
    assert {(d.tenant, d.session) for d in pruned.drops} == {
        ("", "alice"), ("", "bob"), ("acme", "alice"),
    }  # fmt: skip
    store.reindex()
    store.delete("bob")
    again = store.create("bob", MODEL, checkpoint=state(3), turns=[], settings={})
    store.commit(again, state(4), [NewTurn("user", "anew", [1])])
    assert check_store(path, key=KEY).findings == []
    store.prune(Retention(older_than=timedelta(0)))
    assert store.sessions() == []


def test_damage_is_told_with_the_names_of_those_it_harms(path: Path) -> None:
    change(path, "update turns set text = text || 'AAAA' where id = 1")
    report = check_store(path, key=KEY)
    assert {f.kind for f in report.findings} == {"turn"}
    assert report.findings[0].sessions == ("alice",)
    assert report.unharmed["alice"] == []


def test_equal_layers_of_two_spans_are_not_seen_to_be_equal(tmp_path: Path) -> None:
    first, other = raw_span(0, 4, 1), raw_span(0, 4, 2)
    mixed = replace(other, layers=(first.layers[0], other.layers[1]))
    marks = {}
    for key in (None, KEY):
        path = tmp_path / f"{key is None}.db"
        with MemoryStore(path, key=key) as store:
            for name, span in (("x", first), ("y", mixed)):
                whole = Checkpoint((Entry(span, 0, 4, 0, "tail"),), 4)
                store.create(name, MODEL, checkpoint=whole, turns=[], settings={})
                assert mark(store.load(store.ledger(name))) == mark(whole)
        conn = sqlite3.connect(path)
        marks[key] = [d for (d,) in conn.execute("select digest from span_layers")]
        conn.close()
    assert len(set(marks[None])) == 3 and len(set(marks[KEY])) == 4
    assert not {mark for mark in marks[KEY] if len(mark) == 32}


# -- what is damaged, and all else ----------------------------------------------------------------


def spoil(column: str, table: str, row: int) -> tuple[str, tuple[object, ...]]:
    """Another letter, where base64 stands."""
    first = f"case substr({column}, 1, 1) when 'A' then 'B' else 'A' end"
    return f"update {table} set {column} = {first} || substr({column}, 2) where id = ?", (row,)


@pytest.mark.parametrize("key", [KEY, None], ids=["encrypted", "plain"])
@pytest.mark.parametrize("options", [{}, {"erase": True}, {"erase": True, "forks": "delete"}])
def test_a_session_with_a_damaged_turn_can_be_deleted(
    tmp_path: Path, key: bytes | None, options: dict[str, object]
) -> None:
    path = tmp_path / "d.db"
    with MemoryStore(path, key=key) as store:
        fill(store, ["alice", "bob"], 2)
        head = store.head("alice")
        assert head is not None
        store.fork(head, "carol", store.load(head))
        statement, values = spoil("text", "turns", 1)
        change(path, statement, values=values)
        gone = store.delete("alice", **options)
        left = {"bob"} if "forks" in options else {"bob", "carol"}
        assert {s.name for s in store.sessions()} == left and "alice" in gone.sessions
        assert {t.session for t in gone.shared} == left - {"bob"}
        assert read(store, "bob")[1]


def test_a_damaged_name_is_its_own_sessions_alone(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    statement, values = spoil("name", "sessions", 1)
    change(path, statement, values=values)
    conn = sqlite3.connect(path)
    (stored,) = conn.execute("select name from sessions where id = 1").fetchone()
    conn.close()
    store = opened()
    assert {s.name for s in store.sessions()} == {stored, "bob"}
    named = {("", stored), ("", "bob"), ("acme", "alice")}
    assert {(s.tenant, s.name) for s in store.space(all_tenants=True).sessions} == named
    pruned = store.prune(Retention(keep_checkpoints=1), all_tenants=True)
    assert {(d.tenant, d.session) for d in pruned.drops} == named
    assert read(store, "bob")[1]
    assert any(f.kind == "session" and "name" in f.how for f in check_store(path, key=KEY).findings)
    with pytest.raises(DamageError, match="store check"):
        store.tainted([1])
    store.prune(Retention(older_than=timedelta(0)))
    assert store.sessions() == []


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [MemoryStore, check_store], ids=["open", "check"])
def test_a_wrong_key_no_key_and_a_key_too_many_are_told_before_anything_is_read(
    work: Callable[..., object], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    with pytest.raises(EncryptionError, match="does not open with this key"):
        work(path, key=OTHER)
    with pytest.raises(EncryptionError, match="STILL_AGENT_KEY"):
        work(path)
    assert path.read_bytes() == before
    with MemoryStore(tmp_path / "plain.db") as store:
        fill(store, ["alice"], 1)
    with pytest.raises(EncryptionError, match="is not encrypted"):
        work(tmp_path / "plain.db", key=KEY)
    monkeypatch.setenv("STILL_AGENT_KEY", KEY.hex())
    with pytest.raises(EncryptionError, match="is not encrypted"):
        work(tmp_path / "plain.db")


@pytest.mark.parametrize(
    "given",
    [
        KEY, KEY.hex(), KEY.hex().upper() + "\n", base64.b64encode(KEY).decode(), lambda: KEY,
        lambda: KEY.hex(),
    ],
    ids=["bytes", "hex", "HEX", "base64", "callback", "callback of hex"],
)  # fmt: skip
def test_a_key_comes_in_several_ways(path: Path, given: object) -> None:
    with MemoryStore(path, key=given) as store:
        assert store.head("alice") is not None


def test_a_key_without_a_store_is_refused() -> None:
    from still_agent import Agent

    with pytest.raises(InputError, match="store="):
        Agent.load("reference", key=KEY)


def test_a_key_comes_from_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILL_AGENT_KEY", base64.b64encode(KEY).decode())
    with MemoryStore(path) as store:
        assert store.head("alice") is not None
    with MemoryStore(path.with_name("new.db")) as store:
        assert store.encrypted
    monkeypatch.setenv("STILL_AGENT_KEY", "")
    with MemoryStore(path.with_name("newer.db")) as store:
        assert not store.encrypted


@pytest.mark.parametrize(
    "given", [b"", b"short", bytes(33), "", "password", "ü" * 64, "g" * 64, 7], ids=str
)
def test_what_is_no_key_is_told(tmp_path: Path, given: object) -> None:
    with pytest.raises(EncryptionError, match="a key is 32 bytes"):
        MemoryStore(tmp_path / "s.db", key=given)
    assert not (tmp_path / "s.db").exists()


def test_without_the_library_the_extra_is_named(path: Path) -> None:
    """In an interpreter that cannot import it."""
    script = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from still_memory import MemoryStore\n"
        f"try: MemoryStore({str(path)!r}, key=bytes(32))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        f"MemoryStore({str(path.with_name('plain.db'))!r}).close()"  # needs none
    )
    paths = [p for p in sys.path if p]
    said = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}\n{script}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.startswith("EncryptionError") and "still-agent[encryption]" in said


# -- the cipher's own binding ---------------------------------------------------------------------


def test_a_field_opens_in_its_own_place_alone() -> None:
    vault = SealedVault(KEY)
    places: list[tuple[str | int | bytes, ...]] = [
        ("a" * 64, 0, "exact"), ("a" * 64, 1, "exact"), ("a" * 64, 0, "int8"),
        ("b" * 64, 0, "exact"), ("a" * 64, "ids"), ("entries", "alice", 1), ("entries", "bob", 1),
        ("entries", "alice", 2), ("extra", "alice", 1), ("entries", "alice", "1"), ("settings",),
        ("text", b"above"), ("text", b"other"), ("role", b"above"), ("text", "above"), (),
    ]  # fmt: skip
    everyone = [vault, vault.of("acme"), vault.of("acm"), SealedVault(OTHER)]
    for owner in everyone:
        for place in places:
            sealed = owner.seal(b"words", *place)
            opens = []
            for other in everyone:
                for there in places:
                    try:
                        opens.append((other, there, other.open(sealed, *there)))
                    except ValueError:
                        continue
            assert opens == [(owner, place, b"words")]


def test_names_are_bound_to_their_namespace() -> None:
    vault = SealedVault(KEY)
    name = vault.name("alice", "session", "")
    assert vault.of("acme").open_name(name, "session", "") == "alice"
    for other, namespace in ((vault, ("session", "x")), (vault, ("tenant",)),
                             (SealedVault(OTHER), ("session", ""))):  # fmt: skip
        with pytest.raises(ValueError):
            other.open_name(name, *namespace)
    for forged in ("alice", "YWxpY2U=", name[:-4], name.swapcase(), "=", "ü"):
        with pytest.raises(ValueError):
            vault.open_name(forged, "session", "")


def test_every_bit_of_a_sealed_field_counts() -> None:
    vault = SealedVault(KEY)
    sealed = vault.seal(b"x", "text")
    for bit in range(8 * len(sealed)):
        forged = bytearray(sealed)
        forged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            vault.open(bytes(forged), "text")
    for length in range(len(sealed)):
        with pytest.raises(ValueError):
            vault.open(sealed[:length], "text")
    with pytest.raises(ValueError):
        vault.open(sealed + b"\0", "text")


def test_a_plain_vault_is_none() -> None:
    vault = Vault(KEY)
    assert not vault.encrypted and vault.seal(b"x", "y") == b"x" and vault.name("n") == "n"
    assert user_key(None) is None


# -- rows in another place, altered, or from elsewhere --------------------------------------------


def swap(table: str, columns: str, one: str, other: str) -> Change:
    """Exchange columns of two rows, each found by a condition."""

    def work(conn: sqlite3.Connection) -> None:
        rows = []
        for where in (one, other):
            (row,) = conn.execute(f"select id, {columns} from {table} where {where}").fetchall()
            rows.append(row)
        sets = ", ".join(f"{name} = ?" for name in columns.split(", "))
        for here, there in (rows, rows[::-1]):
            conn.execute(f"update {table} set {sets} where id = ?", (*there[1:], here[0]))

    return work


def run(*statements: str) -> Change:
    def work(conn: sqlite3.Connection) -> None:
        for statement in statements:
            conn.execute(statement)

    return work


def flip(table: str, column: str, where: str) -> Change:
    """Change the last bit of a sealed field."""

    def work(conn: sqlite3.Connection) -> None:
        query = f"select id, {column} from {table} where {where}"
        ((row, data),) = conn.execute(query).fetchall()
        forged = data[:-1] + bytes([data[-1] ^ 1])
        conn.execute(f"update {table} set {column} = ? where id = ?", (forged, row))

    return work


def tail(session: int) -> str:
    """The last span of a session's newest checkpoint; spans are made in order."""
    return (
        "(select max(span) from checkpoint_spans join checkpoints c on c.id = checkpoint"
        f" where c.session = {session})"
    )


def newest(session: int) -> str:
    return f"session = {session} and generation = 3"


SWAPS: dict[str, Change] = {
    "two layers": swap(
        "span_layers", "data", f"span = {tail(1)} and layer = 0", f"span = {tail(1)} and layer = 1"
    ),
    "two layers, digests and all": swap(
        "span_layers", "digest, data",
        f"span = {tail(1)} and layer = 0", f"span = {tail(1)} and layer = 1",
    ),
    "a layer of two sessions": swap(
        "span_layers", "digest, data",
        f"span = {tail(1)} and layer = 0", f"span = {tail(2)} and layer = 0",
    ),
    "a layer of two tenants": swap(
        "span_layers", "digest, data",
        f"span = {tail(1)} and layer = 0", f"span = {tail(3)} and layer = 0",
    ),
    "the ids of two spans": swap("spans", "ids", f"id = {tail(1)}", f"id = {tail(2)}"),
    "the spans of two tenants": swap(
        "spans", "start, ids, layers", f"id = {tail(1)}", f"id = {tail(3)}"
    ),
    "the states of two sessions": swap(
        "checkpoints", "entries, extra", newest(1), newest(2)
    ),
    "the states of two tenants, seals and all": swap(
        "checkpoints", "turn, entries, extra, digest", newest(1), newest(3)
    ),
    "the states of two generations": swap(
        "checkpoints", "entries, extra", newest(1), "session = 1 and generation = 2"
    ),
    "an older generation": run("update sessions set generation = 2 where id = 1"),
    "an older state under the newest number": run(
        f"delete from checkpoints where {newest(1)}",
        "update checkpoints set generation = 3 where session = 1",
    ),
    "the texts of two turns": swap("turns", "text", "id = 1", "id = 2"),
    "two turns of two sessions": swap(
        "turns", "role, usage, digest, tokens, text", "id = 1", "id = 3"
    ),
    "a turn of another tenant": swap(
        "turns", "role, usage, digest, tokens, text", "id = 2", "id = 6"
    ),
    "the settings of two sessions": swap("sessions", "settings", "id = 1", "id = 2"),
    "text that is plain": run("update turns set text = 'alice says nothing' where id = 1"),
    "tokens that are plain": run("update turns set tokens = x'0100000002000000' where id = 1"),
    "settings that are plain": run("update sessions set settings = '{}' where id = 1"),
    "a state that is plain": run(f"update checkpoints set extra = '{{}}' where {newest(1)}"),
    "a layer cut short": run(
        f"update span_layers set data = substr(data, 1, 100) where span = {tail(1)}"
    ),
    "an empty layer": run(f"update span_layers set data = x'' where span = {tail(1)}"),
    "a flip in a layer": flip("span_layers", "data", f"span = {tail(1)} and layer = 1"),
    "a flip in tokens": flip("turns", "tokens", "id = 2"),
    "a flip in ids": flip("spans", "ids", f"id = {tail(1)}"),
    "an altered text": run("update turns set text = 'A' || substr(text, 2) where id = 1",
                           "update turns set text = substr(text, 1, 40) || 'AAAA' where id = 1"),
}  # fmt: skip


@pytest.mark.parametrize("work", SWAPS.values(), ids=SWAPS.keys())
def test_a_row_that_was_not_sealed_there_is_refused(
    work: Change, path: Path, opened: Callable[..., MemoryStore]
) -> None:
    before = {name: read(opened(tenant=name)) for name in ("", "acme")}
    conn = sqlite3.connect(path)
    work(conn)
    assert conn.total_changes > 0
    conn.commit()
    conn.close()
    store = opened()
    with pytest.raises(DamageError):
        assert read(store) != before[""]
    assert check_store(path, key=KEY).damaged
    with suppress(StillError):  # and nothing of hers is given to another
        assert read(opened(tenant="acme")) == before["acme"]


def test_swapped_names_are_damage(path: Path, opened: Callable[..., MemoryStore]) -> None:
    conn = sqlite3.connect(path)
    names = [name for (name,) in conn.execute("select name from sessions order by id limit 2")]
    for name, row in (("x", 1), (names[0], 2), (names[1], 1)):
        conn.execute("update sessions set name = ? where id = ?", (name, row))
    conn.commit()
    conn.close()
    for name in ("alice", "bob"):
        with pytest.raises(DamageError):
            opened().head(name)


def test_a_session_moved_to_another_tenant_is_nobodys(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    conn = sqlite3.connect(path)
    (acme,) = conn.execute("select tenant from sessions where id = 3").fetchone()
    conn.close()
    change(path, f"update sessions set tenant = {acme} where id = 2")
    assert opened().head("bob") is None and opened(tenant="acme").head("bob") is None
    there = [s.name for s in opened(tenant="acme").sessions()]
    assert "bob" not in there and len(there) == 2
    assert check_store(path, key=KEY).damaged
    assert read(opened())[1]  # hers stands


def test_a_name_that_is_plain_is_damage_and_no_session(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    change(path, "update sessions set name = 'mallory' where id = 1")
    store = opened()
    assert store.head("mallory") is None
    assert {s.name for s in store.sessions()} == {"mallory", "bob"}
    assert any(f.kind == "session" for f in check_store(path, key=KEY).findings)


# -- downgrades -----------------------------------------------------------------------------------


def test_without_its_sealed_key_it_opens_for_nobody(path: Path) -> None:
    change(path, "delete from meta where name = 'sealed key'")
    for key in (KEY, None):
        with pytest.raises(DamageError, match="has lost its key"):
            MemoryStore(path, key=key)


def test_a_live_store_writes_no_plain_word_whatever_its_settings_say(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    store = opened()
    head = store.head("alice")
    assert head is not None
    key = sealed_key(path)
    change(path, "delete from meta where name = 'sealed key'")
    head = store.commit(head, state(9), [NewTurn("user", "zanzibar", [1])])
    store.fork(head, "carol", state(9))
    store.delete("bob", erase=True)
    store.prune(Retention(keep_checkpoints=1))
    store.reindex()
    change(path, "insert into meta values ('sealed key', ?)", values=(key,))
    files = [path, path.with_name(path.name + "-wal")]
    assert not any(b"zanzibar" in file.read_bytes() for file in files)
    conn = sqlite3.connect(path)
    assert conn.execute("select count(*) from turn_words_idx").fetchone() == (0,)
    conn.close()
    store.scrub()
    assert check_store(path, key=KEY).findings == []


def test_a_word_in_the_index_of_an_encrypted_store_is_damage(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    change(path, "insert into turn_words (rowid, text) values (1, 'zanzibar')")
    assert b"zanzibar" in path.read_bytes()
    report = check_store(path, key=KEY)
    assert report.damaged and [f.kind for f in report.findings] == ["words"]
    assert "in plain" in report.findings[0].how and "reindex" in report.findings[0].remedy
    store = opened()
    store.reindex()
    assert check_store(path, key=KEY).findings == []
    store.close()
    assert b"zanzibar" not in path.read_bytes()


def test_a_plain_key_beside_the_sealed_one_is_refused(path: Path) -> None:
    change(path, "insert into meta values ('key', ?)", values=(bytes(32),))
    for key in (KEY, None):
        with pytest.raises(DamageError, match="plain key"):
            MemoryStore(path, key=key)
    assert [f.kind for f in check_store(path, key=KEY).findings] == ["key"]


def test_a_plain_key_in_place_of_the_sealed_one_opens_nothing(path: Path) -> None:
    change(path, "update meta set name = 'key', value = ?", values=(bytes(32),))
    with pytest.raises(EncryptionError, match="is not encrypted"):
        MemoryStore(path, key=KEY)
    with MemoryStore(path) as store:  # who has no key is told of damage, and reads nothing
        assert store.head("alice") is None
        for info in store.sessions():
            with pytest.raises(DamageError):
                store.head(info.name)


def test_a_sealed_key_of_another_store_opens_nothing(path: Path, tmp_path: Path) -> None:
    """Also one of the same user's key."""
    with MemoryStore(tmp_path / "other.db", key=KEY) as store:
        fill(store, ["alice"], 1)
    conn = sqlite3.connect(tmp_path / "other.db")
    (sealed,) = conn.execute("select value from meta").fetchone()
    conn.close()
    change(path, "update meta set value = ?", values=(sealed,))
    with MemoryStore(path, key=KEY) as store:
        assert not {"alice", "bob"} & {s.name for s in store.sessions()}
        assert store.head("alice") is None


@pytest.mark.parametrize("sealed", [b"", b"\x01", b"\x02" + bytes(60), bytes(61), b"\x01" * 62])
def test_a_broken_sealed_key_is_damage(path: Path, sealed: bytes) -> None:
    change(path, "update meta set value = ?", values=(sealed,))
    with pytest.raises(DamageError, match="has lost its key"):
        MemoryStore(path, key=KEY)


def test_a_store_is_what_it_was_made_as(tmp_path: Path) -> None:
    """An empty one too: another process may be writing into it in plain."""
    MemoryStore(tmp_path / "s.db").close()
    with pytest.raises(EncryptionError, match="is not encrypted"):
        MemoryStore(tmp_path / "s.db", key=KEY)


# -- another key, and files for another machine ---------------------------------------------------


def test_a_store_changes_its_key(path: Path, opened: Callable[..., MemoryStore]) -> None:
    before = read(opened())
    with pytest.raises(EncryptionError, match="a key is 32 bytes"):
        opened().rekey("no key")
    sealed = sealed_key(path)
    store = opened()
    store.rekey(OTHER.hex())
    assert read(store) == before  # it goes on
    store.rekey(OTHER)
    with pytest.raises(EncryptionError, match="does not open"):
        MemoryStore(path, key=KEY)
    assert read(opened(key=OTHER)) == before and check_store(path, key=OTHER).findings == []
    store.close()
    assert sealed not in path.read_bytes()  # what the old key would open is overwritten


def test_the_old_key_is_nowhere_and_seals_nothing_more(
    path: Path, opened: Callable[..., MemoryStore]
) -> None:
    log, old = path.with_name(path.name + "-wal"), sealed_key(path)
    store, other = opened(timeout=0.2), opened()
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("begin")
    reader.execute("select count(*) from turns").fetchone()
    with pytest.raises(ErasureError, match="store scrub"):
        store.rekey(OTHER)
    assert store.secret == OTHER  # in force all the same
    with pytest.raises(EncryptionError, match="does not open"):
        other.secret  # noqa: B018  # as an export asks for it
    reader.close()
    store.scrub()
    assert old not in path.read_bytes() and old not in log.read_bytes()
    again = sealed_key(path)
    store.rekey(KEY)  # nobody reads now
    assert again not in path.read_bytes() and again not in log.read_bytes()


def test_a_key_is_not_shown(opened: Callable[..., MemoryStore]) -> None:
    store = opened()
    assert repr(store.secret) == repr(user_key(KEY)) == "<a key>"
    assert store._file._founding is None and store._file._admitting is None


def test_a_key_too_many_changes_no_older_store(tmp_path: Path) -> None:
    stores = Path(__file__).parents[1] / "memory" / "stores"
    path = tmp_path / "old.db"
    conn = sqlite3.connect(path)
    conn.executescript((stores / "m004_drafts.sql").read_text("utf-8"))
    conn.execute(f"pragma application_id = {APPLICATION_ID}")
    conn.commit()
    before = list(conn.iterdump())
    with pytest.raises(EncryptionError, match="is not encrypted"):
        MemoryStore(path, key=KEY)
    assert list(conn.iterdump()) == before
    conn.close()
    MemoryStore(path).close()


def test_a_plain_store_has_no_key_to_change(tmp_path: Path) -> None:
    with (
        MemoryStore(tmp_path / "s.db") as store,
        pytest.raises(EncryptionError, match="is not encrypted"),
    ):
        store.rekey(KEY)


def sealed_key(path: Path) -> bytes:
    conn = sqlite3.connect(path)
    (sealed,) = conn.execute("select value from meta where name = 'sealed key'").fetchone()
    conn.close()
    assert isinstance(sealed, bytes)
    return sealed


def test_an_export_is_sealed_and_opens_with_its_key(
    opened: Callable[..., MemoryStore], tmp_path: Path
) -> None:
    store, file = opened(), tmp_path / "x.still"
    Portable.of(store, "alice").write(file, KEY)
    data = file.read_bytes()
    assert data.startswith(b"still sealed 1\n") and b"heron" not in data and b"keys" not in data
    with MemoryStore(tmp_path / "other.db", key=OTHER) as other:
        Portable.read(file, KEY).save(other)
        assert read(other) == read(store)
    with pytest.raises(EncryptionError, match="does not open with this key"):
        Portable.read(file, OTHER)
    with pytest.raises(EncryptionError, match="STILL_AGENT_KEY"):
        Portable.read(file)
    plain = tmp_path / "plain.still"
    Portable.of(store, "alice").write(plain)
    assert b"heron" in plain.read_bytes()
    assert mark(Portable.read(plain).checkpoint) == mark(Portable.read(file, KEY).checkpoint)


def test_a_plain_store_becomes_an_encrypted_one_by_files(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "plain.db") as plain:
        fill(plain, ["alice"], 3)
        Portable.of(plain, "alice").write(tmp_path / "x.still")
        with MemoryStore(tmp_path / "sealed.db", key=KEY) as sealed:
            Portable.read(tmp_path / "x.still").save(sealed)
            assert read(sealed) == read(plain)


@given(st.integers(0, 10**9), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_sealed_file_that_was_altered_does_not_open(
    sealed_export: bytes, tmp_path_factory: pytest.TempPathFactory, at: int, by: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "altered.still"
    at %= len(sealed_export)
    forged = bytearray(sealed_export)
    forged[at] ^= by
    for data in (bytes(forged), sealed_export[:at], sealed_export + bytes(by)):
        file.write_bytes(data)
        with pytest.raises((DamageError, EncryptionError, InputError)):
            Portable.read(file, KEY)


@pytest.fixture(scope="module")
def sealed_export(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("export")
    with MemoryStore(folder / "s.db", key=KEY) as store:
        fill(store, ["alice"], 1)
        Portable.of(store, "alice").write(folder / "x.still", KEY)
    return (folder / "x.still").read_bytes()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_pieces_open_in_their_order_alone(tmp_path: Path, size: int) -> None:
    data = bytes(n % 251 for n in range(997)) * (size // 997 + 1)
    file = tmp_path / "f"
    with file.open("wb") as out:
        writer = SealedWriter(out, KEY)
        for low in range(0, size, 700_001):
            writer.write(data[low : min(size, low + 700_001)])
        writer.close()

    def read_back() -> bytes:
        with file.open("rb") as sealed:
            sealed.read(len(SEALED))
            reader = SealedReader(sealed, KEY, "f")
            found = b"".join(iter(lambda: reader.read(300_000), b""))
            assert len(found) == reader.size
            return found

    assert read_back() == data[:size]
    whole, head, piece = file.read_bytes(), len(SEALED) + 24, PIECE + 16
    first, second = whole[head : head + piece], whole[head + piece : head + 2 * piece]
    forged = [whole[:-1], whole[: head + 16], whole[:head]]
    if len(second) == piece:
        rest = whole[head + 2 * piece :]
        forged += [whole[:head] + second + first + rest, whole[:head] + first + rest,
                   whole[:head] + first, whole[:head] + second + rest]  # fmt: skip
    for forgery in forged:
        if forgery == whole:
            continue
        file.write_bytes(forgery)
        with pytest.raises((ValueError, EncryptionError)):
            read_back()
