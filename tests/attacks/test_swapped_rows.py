"""Rows that are whole, and not where they belong: between layers, sessions, turns, generations."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from still_memory.check import check_store
from still_memory.errors import ConflictError, DamageError, StillError
from still_memory.records import Head, NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, fill, mark, state, told

Change = Callable[[sqlite3.Connection], None]

OTHER_MODEL = MODEL.model_copy(update={"weights": "other"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two sessions of three generations, and one of another model that holds the same state."""
    with MemoryStore(tmp_path / "s.db") as store:
        fill(store, ["alice", "bob"], 2)
        store.create("carol", OTHER_MODEL, checkpoint=state(2), turns=[], settings={})
    return tmp_path / "s.db"


@pytest.fixture
def changed(path: Path) -> Iterator[Callable[[Change], MemoryStore]]:
    """Changes the file and opens it."""
    opened = []

    def change(work: Change) -> MemoryStore:
        conn = sqlite3.connect(path)
        work(conn)
        assert conn.total_changes > 0
        conn.commit()
        conn.close()
        opened.append(MemoryStore(path))
        return opened[-1]

    yield change
    for store in opened:
        store.close()


def read(store: MemoryStore, name: str) -> tuple[str, list[tuple[object, ...]]]:
    head = store.head(name)
    assert head is not None
    return mark(store.load(head)), told(store, name)


def her(name: str) -> str:
    return f"(select id from sessions where name = '{name}')"


def newest(name: str, share: int) -> str:
    """The span of an entry of a session's newest checkpoint."""
    return (
        f"(select id from spans where address = (select entries ->> '$[{share}][0]' from"
        f" checkpoints where session = {her(name)} order by generation desc limit 1))"
    )


def run(statements: str) -> Change:
    def change(conn: sqlite3.Connection) -> None:
        for statement in statements.split(";"):
            conn.execute(statement)

    return change


def swap(table: str, columns: str, one: str, other: str) -> Change:
    """Exchange columns of two rows, each found by a condition."""

    def change(conn: sqlite3.Connection) -> None:
        rows = []
        for where in (one, other):
            (row,) = conn.execute(f"select id, {columns} from {table} where {where}").fetchall()
            rows.append(row)
        sets = ", ".join(f"{name} = ?" for name in columns.split(", "))
        for here, there in (rows, rows[::-1]):
            conn.execute(f"update {table} set {sets} where id = ?", (*there[1:], here[0]))

    return change


def layer(name: str, share: int, number: int) -> str:
    return f"span = {newest(name, share)} and layer = {number}"


def checkpoint(name: str) -> str:
    return f"session = {her(name)} and generation = 3"


def swapped_addresses(conn: sqlite3.Connection) -> None:
    query = f"select id, address from spans where id in ({newest('alice', 2)}, {newest('bob', 2)})"
    (a, address), (b, other) = conn.execute(query).fetchall()
    for span, new in ((a, "x"), (b, address), (a, other)):
        conn.execute("update spans set address = ? where id = ?", (new, span))


SWAPS: dict[str, Change] = {
    "two layers of a span": swap(
        "span_layers", "digest, data", layer("alice", 2, 0), layer("alice", 2, 1)
    ),
    "the numbers of two layers": run(
        f"update span_layers set layer = layer + 10 where span = {newest('alice', 1)};"
        f"update span_layers set layer = 11 - layer where span = {newest('alice', 1)}"
    ),
    "a layer of two sessions": swap(
        "span_layers", "digest, data", layer("alice", 2, 0), layer("bob", 2, 0)
    ),
    "a layer without its digest": swap(
        "span_layers", "data", layer("alice", 1, 0), layer("bob", 1, 0)
    ),
    "the addresses of two spans": swapped_addresses,
    "the states of two checkpoints": swap(
        "checkpoints", "entries, slots, bytes", checkpoint("alice"), checkpoint("bob")
    ),
    "two checkpoints, seals and all": swap(
        "checkpoints",
        "turn, turns, tokens, slots, bytes, entries, extra, digest",
        checkpoint("alice"),
        checkpoint("bob"),
    ),
    "the last turns": swap("checkpoints", "turn", checkpoint("alice"), checkpoint("bob")),
    "two turns, digests and all": swap(
        "turns",
        "role, created, usage, digest, tokens, text",
        "text = 'alice says heron 0'",
        "text = 'bob says heron 0'",
    ),
    "the texts of two turns": swap(
        "turns", "text", "text = 'alice says heron 0'", "text = 'bob says heron 0'"
    ),
    "an earlier turn of another": run(
        "update turns set parent = (select id from turns where text = 'bob says heron 0')"
        " where text = 'alice says heron 1'"
    ),
    "the system prompts": swap("sessions", "settings", "name = 'alice'", "name = 'bob'"),
    "the models": swap("sessions", "model", "name = 'alice'", "name = 'carol'"),
    "an older generation": run("update sessions set generation = 2 where name = 'alice'"),
    "an older state under the newest number": run(
        f"delete from checkpoints where {checkpoint('alice')};"
        f"update checkpoints set generation = 3 where session = {her('alice')}"
    ),
}


@pytest.mark.parametrize("change", SWAPS.values(), ids=SWAPS.keys())
def test_a_row_in_another_place_is_damage(
    change: Change, changed: Callable[[Change], MemoryStore]
) -> None:
    store = changed(change)
    with pytest.raises(DamageError):
        read(store, "alice")


def test_swapped_names_are_damage_of_both(changed: Callable[[Change], MemoryStore]) -> None:
    store = changed(
        run(
            "update sessions set name = 'x' where name = 'alice';"
            "update sessions set name = 'alice' where name = 'bob';"
            "update sessions set name = 'bob' where name = 'x'"
        )
    )
    for name in ("alice", "bob"):
        with pytest.raises(DamageError):
            store.head(name)


def test_an_older_generation_is_not_built_upon(
    path: Path, changed: Callable[[Change], MemoryStore]
) -> None:
    """Also by a writer who had the session open: the head it knows is another."""
    with MemoryStore(path) as store:
        head = store.head("alice")
    assert head is not None
    store = changed(run("update sessions set generation = 2 where name = 'alice'"))
    with pytest.raises(ConflictError):
        store.commit(head, state(9), [NewTurn("user", "again", [1])])


ROOTS = swap(
    "turns",
    "role, created, usage, digest, tokens, text",
    "text = 'alice says heron 0'",
    "text = 'bob says heron 0'",
)
AGAIN = [NewTurn("user", "again", [1])]
Late = Callable[[MemoryStore], object]


def draft_of(store: MemoryStore, head: Head) -> Head:
    return store.save_draft(head, replace(head, turn=None, turns=0), state(9), [])


def forgetting(store: MemoryStore, head: Head) -> Late:
    made = draft_of(store, head)
    assert head.turn is not None
    turns = [head.turn]
    return lambda late: late.forget(turns, [(head, made)])


def adopting(store: MemoryStore, head: Head) -> Late:
    made = draft_of(store, head)
    return lambda late: late.adopt(head, made, state(9), AGAIN)


VERBS: dict[str, Callable[[MemoryStore, Head], Late]] = {
    "commit": lambda _, head: lambda late: late.commit(head, state(9), AGAIN),
    "fork": lambda _, head: lambda late: late.fork(head, "fork", state(9)),
    "draft": lambda _, head: lambda late: late.save_draft(head, head, state(9), AGAIN),
    "adopt": lambda _, head: lambda late: late.adopt(head, head, state(9), AGAIN),
    "adopt a draft": adopting,
    "forget": forgetting,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("what", ["settings", "turns"])
def test_what_is_written_after_a_swap_does_not_vouch_for_it(
    what: str, verb: Callable[[MemoryStore, Head], Late], tmp_path: Path
) -> None:
    """By a writer who had read the session before: a new seal would cover what was swapped in."""
    path = tmp_path / "late.db"
    with MemoryStore(path) as store:
        head, _ = (
            store.create(
                name,
                MODEL,
                checkpoint=state(place),
                turns=[NewTurn("user", f"{name} says heron 0", [place])],
                settings={"system": name},
            )
            for place, name in enumerate(["alice", "bob"])
        )
        late = verb(store, head)
        conn = sqlite3.connect(path)
        (SWAPS["the system prompts"] if what == "settings" else ROOTS)(conn)
        conn.commit()
        conn.close()
        with pytest.raises(DamageError):
            late(store)
        with pytest.raises(DamageError):
            store.head("alice")
    assert check_store(path).damaged


@pytest.mark.parametrize("verb", ["commit", "fork", "draft", "adopt"])
def test_nor_does_who_goes_back_to_a_swapped_turn(verb: str, path: Path) -> None:
    with MemoryStore(path) as store:
        head = store.head("alice")
        assert head is not None
        root = replace(head, turn=store.history(head)[0].id, turns=1)
        first = {"draft": head, "adopt": head}.get(verb, root)
        late = {
            "commit": lambda: store.commit(root, state(9), []),
            "fork": lambda: store.fork(root, "fork", state(9)),
            "draft": lambda: store.save_draft(first, root, state(9), AGAIN),
            "adopt": lambda: store.adopt(first, root, state(9), AGAIN),
        }[verb]
        conn = sqlite3.connect(path)
        ROOTS(conn)
        conn.commit()
        conn.close()
        with pytest.raises(DamageError):
            late()
        assert store.head("fork") is None and store.draft(head) is None


def test_who_goes_back_does_so_on_the_sessions_own_way(path: Path) -> None:
    with MemoryStore(path) as store:
        head = store.head("alice")
        assert head is not None
        other = replace(head, turn=store.history("bob")[0].id, turns=1)
        for late in (
            lambda: store.commit(other, state(9), []),
            lambda: store.fork(other, "fork", state(9)),
            lambda: store.save_draft(head, other, state(9), []),
            lambda: store.adopt(head, other, state(9), []),
        ):
            with pytest.raises(DamageError, match="does not lead"):
                late()
        assert store.head("alice") == head


def test_references_lost_are_no_silent_loss(
    path: Path, changed: Callable[[Change], MemoryStore]
) -> None:
    """Spans that nothing refers to are collected; who still needs one is told."""
    with MemoryStore(path) as store:
        before = read(store, "bob")
    hers = f"select id from checkpoints where {checkpoint('alice')}"
    store = changed(run(f"delete from checkpoint_spans where checkpoint in ({hers})"))
    for name in ("alice", "bob"):  # commits that collect
        for n in range(3):
            head = store.head(name)
            assert head is not None
            try:
                store.commit(head, store.load(head), [NewTurn("user", f"more {n}", [n])])
            except StillError as error:
                assert name == "alice" and isinstance(error, DamageError)
    assert read(store, "bob")[0] == before[0]


def test_the_index_of_names_may_be_lost_and_no_session_is_begun_anew(
    path: Path, changed: Callable[[Change], MemoryStore]
) -> None:
    data = path.read_bytes()
    with sqlite3.connect(path) as conn:
        (page,) = conn.execute("pragma page_size").fetchone()
        (root,) = conn.execute(
            "select rootpage from sqlite_master where name = 'sqlite_autoindex_sessions_1'"
        ).fetchone()
    conn.close()
    index = data[(root - 1) * page : root * page]
    assert index.count(b"alice") == 1
    path.write_bytes(
        data[: (root - 1) * page] + index.replace(b"alice", b"alicf") + data[root * page :]
    )
    with MemoryStore(path) as store:
        with pytest.raises(DamageError, match="index of names"):
            store.head("alice")
        assert store.head("nobody") is None and read(store, "bob")


def test_a_list_with_a_date_that_is_none_is_damage(
    changed: Callable[[Change], MemoryStore],
) -> None:
    store = changed(run("update sessions set updated = 'soon' where name = 'alice'"))
    with pytest.raises(DamageError, match="its times cannot be read"):
        store.sessions()
    assert read(store, "alice")
