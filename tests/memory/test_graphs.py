"""A graph's states are kept beside its thread's sessions, and live, fork and die with them."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, DamageError, InputError, UnknownSessionError
from still_memory.graphs_table import GraphState, Place
from still_memory.identity import ModelIdentity
from still_memory.portable import Portable
from still_memory.records import Head, NewTurn
from still_memory.retention import Retention
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Spans = Callable[..., Span]
Begin = Callable[..., Head]
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILL_AGENT_KEY", raising=False)


@pytest.fixture
def begin(model: ModelIdentity, raw_span: Spans, checkpoint_of: Callable[..., Checkpoint]) -> Begin:
    """A session of one turn, which says `said`."""

    def make(store: MemoryStore, name: str, said: str = "hello", **settings: str) -> Head:
        state = checkpoint_of([raw_span(0, 30, len(name))])
        turns = [NewTurn("user", said, [1, 2])]
        return store.create(name, model, checkpoint=state, turns=turns, settings=settings)

    return make


def state(
    thread: str = "t",
    id: str = "1",
    *pieces: bytes,
    parent: str | None = None,
    space: str = "",
    run: str = "",
) -> GraphState:
    values = {"messages": pieces} if pieces else {}
    return GraphState(Place(thread, space, id), parent, run, b"about", b"body", values)


def put(store: MemoryStore, *args: str | bytes, **told: str) -> GraphState:
    made = state(*args, **told)  # type: ignore[arg-type]
    store.graphs.put(made)
    return made


def count(store: MemoryStore, table: str) -> int:
    with store._file.reading() as conn:
        (rows,) = conn.execute(f"select count(*) from {table}").fetchone()
    return int(rows)


def everything(path: Path) -> bytes:
    log = path.with_name(path.name + "-wal")
    return path.read_bytes() + (log.read_bytes() if log.exists() else b"")


# -- states, values and writes --------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_state_comes_back_as_it_was_put(key: bytes | None, open_store: Opens) -> None:
    store = open_store(key=key, tenant="acmé")
    made = GraphState(
        Place("ålice", "sub:1", "id-2"),
        "id-1",
        "run",
        b"\0about",
        b"",
        {"a": [b"x", b""], "b": [b"y"]},
    )
    store.graphs.put(made)
    store.graphs.put_writes(made.place, {"task 0": b"w", "täsk -1": b""})
    store.close()
    again = open_store(key=key, tenant="acmé").graphs
    found = again.get("ålice", "sub:1", "id-2")
    assert found is not None and found == again.get("ålice", "sub:1")
    assert (found.place, found.parent, found.run) == (made.place, "id-1", "run")
    assert (found.about, found.body) == (b"\0about", b"")
    assert found.values == {"a": [b"x", b""], "b": [b"y"]}
    assert found.writes == {"task 0": b"w", "täsk -1": b""}
    assert again.about(made.place) == b"\0about" and again.places() == [made.place]
    assert again.get("ålice", "", "id-2") is again.get("ålice", "sub:1", "id-1") is None
    assert again.get("alice", "sub:1") is None and check_store(store.path, key=key).findings == []


def test_a_list_that_gains_one_writes_one(store: MemoryStore) -> None:
    pieces = [b"message %03d " % n * 20 for n in range(200)]
    put(store, "t", "1", *pieces)
    before = store.graphs.bytes_written
    put(store, "t", "2", *pieces, b"one more" * 30, parent="1")
    assert store.graphs.bytes_written - before < 240 + 150  # it, and the state's own row
    put(store, "t", "3", *pieces[:100], b"edited", *pieces[101:], parent="2")
    assert count(store, "graph_values") == 200 + 1 + 100  # what follows an edit is written again
    for id, held in (("1", pieces), ("2", [*pieces, b"one more" * 30])):
        found = store.graphs.get("t", "", id)
        assert found is not None and found.values == {"messages": held}


def test_a_value_may_be_the_parents(store: MemoryStore) -> None:
    put(store, "t", "1", b"old")
    asked = []

    def otherwise(name: str) -> list[bytes] | None:
        asked.append(name)
        return [b"else"] if name == "other" else None

    values = {"messages": None, "other": None, "none": None}
    store.graphs.put(GraphState(Place("t", "", "2"), "1", "", b"", b"", values), otherwise)
    store.graphs.put(GraphState(Place("t", "", "3"), "gone", "", b"", b"", values), otherwise)
    found = [store.graphs.get("t", "", id) for id in ("2", "3")]
    assert [f and f.values for f in found] == [
        {"messages": [b"old"], "other": [b"else"]},
        {"other": [b"else"]},
    ]
    assert asked == ["other", "none", "messages", "other", "none"]


def test_a_state_put_again_takes_the_place_of_the_first(store: MemoryStore) -> None:
    put(store, "t", "1", b"first", b"and more")
    store.graphs.put_writes(Place("t", "", "1"), {"w": b"stays"})
    put(store, "t", "1", b"second")
    found = store.graphs.get("t", "")
    assert found is not None and found.values == {"messages": [b"second"]}
    assert found.writes == {"w": b"stays"} and count(store, "graph_values") == 1


def test_writes_may_come_before_their_state_and_only_some_come_again(store: MemoryStore) -> None:
    place = Place("t", "", "1")
    store.graphs.put_writes(place, {"a": b"1", "b": b"1"})
    store.graphs.put_writes(place, {"a": b"2", "b": b"2", "c": b"2"}, {"b"})
    assert store.graphs.get("t", "") is None
    put(store, "t", "1")
    found = store.graphs.get("t", "")
    assert found is not None and found.writes == {"a": b"1", "b": b"2", "c": b"2"}


def test_states_are_listed_latest_first_by_thread_and_space(store: MemoryStore) -> None:
    for thread, space, id in (("t", "", "1"), ("t", "x", "2"), ("u", "", "3"), ("t", "", "4")):
        put(store, thread, id, space=space)
    listed = [(p.thread, p.id) for p in store.graphs.places()]
    assert listed == [("t", "4"), ("u", "3"), ("t", "2"), ("t", "1")]
    assert [p.id for p in store.graphs.places("t")] == ["4", "2", "1"]
    assert [p.id for p in store.graphs.places("t", "")] == ["4", "1"]
    assert [p.id for p in store.graphs.places(None, "x")] == ["2"]
    assert store.graphs.places("nobody") == []


@pytest.mark.parametrize(
    "wrong",
    [
        state("", "1"),
        state("x" * 513, "1"),
        state("t", ""),
        state("\ud800", "1"),
        state("t", "\ud800"),
        state(space="\ud800"),
        state(run="\ud800"),
        GraphState(Place("t", "", "1"), None, "", b"", b"", {"a": []}),
    ],
)
def test_what_cannot_be_stored_is_refused_and_changes_nothing(
    wrong: GraphState, store: MemoryStore
) -> None:
    with pytest.raises(InputError):
        store.graphs.put(wrong)
    assert store.graphs.places() == [] and count(store, "graph_values") == 0


def test_a_tenant_sees_no_others_states(open_store: Opens) -> None:
    ours, theirs = open_store(tenant="a"), open_store(tenant="b")
    put(ours, "t", "1", b"ours", run="r")
    put(theirs, "t", "1", b"ours", run="r")  # the same words: rows of its own
    assert count(ours, "graph_values") == 2
    theirs.graphs.delete_runs(["r"])
    assert theirs.graphs.places() == [] and ours.graphs.get("t", "") is not None
    theirs.graphs.delete_thread("t")
    with pytest.raises(UnknownSessionError):
        theirs.graphs.copy_thread("t", "u")
    found = open_store(tenant="c").graphs
    assert found.places() == [] and found.get("t", "", "1") is None
    assert ours.stats().graph_states == 1 and theirs.stats().graph_states == 0


def test_states_are_counted_among_what_takes_the_space(store: MemoryStore) -> None:
    put(store, "t", "1", b"x" * 1000)
    put(store, "t", "2", b"x" * 1000, b"y" * 500)
    store.graphs.put_writes(Place("t", "", "2"), {"w": b"z" * 100})
    space = store.space()
    assert space.graph_states == store.stats().graph_states == 2
    assert 1600 < space.graph_bytes < 2000 and space.graph_bytes == store.graphs.bytes_written


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_done_no_value_is_lost_and_none_is_left(
    seed: int, store: MemoryStore, path: Path
) -> None:
    chance = random.Random(seed)
    kept: dict[Place, dict[str, list[bytes]]] = {}  # what should be there

    def some_value() -> list[bytes]:
        told = [b"%d" % chance.randrange(2) for _ in range(chance.randrange(1, 6))]
        return told + [b"end"] * chance.randrange(2)

    for step in range(120):
        thread = chance.choice("abc")
        verb = chance.choice(["put"] * 6 + ["copy", "delete", "trim", "runs"])
        if verb == "put":
            place = Place(thread, chance.choice(["", "x"]), f"{chance.randrange(12):02}")
            parent = chance.choice([None, *(p.id for p in kept)])
            above = kept.get(Place(thread, place.space, parent or ""), {})
            values = {n: some_value() if chance.random() < 0.6 else None for n in "mn"}
            run = chance.choice(["", "r"])
            store.graphs.put(GraphState(place, parent, run, run.encode(), b"", values))
            found = {n: v or above.get(n) for n, v in values.items()}
            kept[place] = {n: v for n, v in found.items() if v is not None}
        elif verb == "copy" and not store.graphs.places("d"):
            if any(p.thread == thread for p in kept):
                store.graphs.copy_thread(thread, "d")
            kept |= {Place("d", p.space, p.id): v for p, v in kept.items() if p.thread == thread}
        elif verb == "delete":
            thread = chance.choice([thread, "d"])
            store.graphs.delete_thread(thread)
            kept = {p: v for p, v in kept.items() if p.thread != thread}
        elif verb == "trim":
            gone = [p for p in kept if p.thread == thread and chance.random() < 0.5]
            store.graphs.trim_thread(thread, gone)
            kept = {p: v for p, v in kept.items() if p not in gone}
        elif verb == "runs" and step % 3 == 0:
            gone = [p for p in kept if store.graphs.about(p) == b"r"]
            store.graphs.delete_runs(["r"])
            kept = {p: v for p, v in kept.items() if p not in gone}
        assert set(store.graphs.places()) == set(kept)
    for place, values in kept.items():
        state = store.graphs.get(place.thread, place.space, place.id)
        assert state is not None and state.values == values
    # every beginning of a value is a row, once, and there are no others
    beginnings = {tuple(v[:n]) for held in kept.values() for v in held.values()
                  for n in range(1, len(v) + 1)}  # fmt: skip
    assert count(store, "graph_values") == len(beginnings) and check_store(path).findings == []


# -- together with sessions -----------------------------------------------------------------------


def test_a_deleted_thread_takes_its_sessions_and_no_others(
    store: MemoryStore, begin: Begin
) -> None:
    for name in ("t", "u"):
        begin(store, name)
        put(store, name, "1", b"shared", name.encode())
    begin(store, "t~2", thread="t")
    begin(store, "t~3")  # only called so
    told = store.graphs.delete_thread("t")
    assert (set(told.sessions), told.graphs) == ({"t", "t~2"}, ("t",))
    assert sorted(s.name for s in store.sessions()) == ["t~3", "u"]
    found = store.graphs.get("u", "")
    assert found is not None and found.values == {"messages": [b"shared", b"u"]}
    assert store.graphs.places("t") == [] and count(store, "graph_values") == 2
    assert store.graphs.delete_thread("t").sessions == ()  # as often as you like
    assert check_store(store.path).findings == []


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_copied_thread_shares_everything_and_goes_on_alone(
    key: bytes | None, open_store: Opens, begin: Begin, same: Callable[[object, object], bool]
) -> None:
    store = open_store(key=key)
    main, branch = begin(store, "t", system="Be brief."), begin(store, "odd", thread="t")
    put(store, "t", "1", b"one", b"two")
    put(store, "t", "2", b"one", b"two", b"three", parent="1", space="sub")
    store.graphs.put_writes(Place("t", "", "1"), {"w": b"x"})
    store.graphs.put_writes(Place("t", "", "9"), {"w": b"early"})
    held = [count(store, table) for table in ("spans", "turns", "graph_values")]
    store.graphs.copy_thread("t", "new")
    assert held == [count(store, table) for table in ("spans", "turns", "graph_values")]
    assert store.branches("new") == ["new", "new~2"] and store.branches("t") == ["t", "odd"]
    for copied, source in (("new", main), ("new~2", branch)):
        head = store.head(copied)
        assert head is not None and head.turn == source.turn
        assert same(store.load(head), store.load(source))
    assert store.head("new").settings == {"system": "Be brief."}  # type: ignore[union-attr]
    for one, other in zip(store.graphs.places("t"), store.graphs.places("new"), strict=True):
        a, b = (store.graphs.get(p.thread, p.space, p.id) for p in (one, other))
        assert a is not None and b is not None
        assert (a.parent, a.body, a.values, a.writes) == (b.parent, b.body, b.values, b.writes)
    put(store, "new", "9")
    early = store.graphs.get("new", "", "9")
    assert early is not None and early.writes == {"w": b"early"}
    assert check_store(store.path, key=key).findings == []

    store.graphs.delete_thread("t")
    found, head = store.graphs.get("new", "sub"), store.head("new~2")
    assert found is not None and found.values == {"messages": [b"one", b"two", b"three"]}
    assert head is not None and store.load(head) and check_store(store.path, key=key).findings == []


def test_a_copy_needs_a_source_and_a_free_name(store: MemoryStore, begin: Begin) -> None:
    put(store, "t", "1", b"x")
    put(store, "states", "1", b"x")
    begin(store, "sessions")
    begin(store, "other", thread="branches")
    for taken in ("t", "states", "sessions", "branches"):
        with pytest.raises(ConflictError):
            store.graphs.copy_thread("t", taken)
    with pytest.raises(UnknownSessionError):
        store.graphs.copy_thread("nobody", "new")
    assert count(store, "graph_states") == 2 and store.branches("new") == []


def test_the_states_go_with_a_threads_last_session(store: MemoryStore, begin: Begin) -> None:
    begin(store, "t")
    begin(store, "t~2", thread="t")
    put(store, "t", "1", b"x")
    assert store.delete("t").graphs == () and store.graphs.places("t")
    assert store.delete("t~2").graphs == ("t",) and not store.graphs.places("t")
    assert count(store, "graph_values") == 0


SECRET = b"Cinnabar"


def test_an_erased_session_takes_the_states_of_its_thread_out_of_every_byte(
    store: MemoryStore, begin: Begin, path: Path
) -> None:
    begin(store, "t")
    begin(store, "t~2", SECRET.decode(), thread="t")
    for n in range(5):
        put(store, "t", str(n), *[b"%s %d" % (SECRET, i) for i in range(n + 1)], run="r")
        store.graphs.put_writes(Place("t", "", str(n)), {"w": SECRET})
    assert SECRET in everything(path)
    assert store.delete("t~2", erase=True).graphs == ("t",)
    store.scrub()
    assert SECRET not in everything(path) and [s.name for s in store.sessions()] == ["t"]
    assert not store.graphs.places("t")


def test_a_deleted_thread_is_erased_on_demand(store: MemoryStore, path: Path) -> None:
    put(store, "t", "1", SECRET)  # a thread without a session
    store.graphs.put_writes(Place("t", "", "2"), {"w": SECRET})
    put(store, "other", "1", b"stays")
    store.graphs.delete_thread("t", erase=True)
    store.scrub()
    assert SECRET not in everything(path) and store.graphs.get("other", "")


def test_forgetting_a_turn_takes_the_states_of_every_thread_that_had_it(
    store: MemoryStore, begin: Begin, path: Path, checkpoint_of: Callable[..., Checkpoint]
) -> None:
    head = begin(store, "t", SECRET.decode())
    begin(store, "clean")
    put(store, "t", "1", SECRET)
    put(store, "clean", "1", b"stays")
    store.graphs.copy_thread("t", "copy")
    assert head.turn is not None
    tainted = store.tainted([head.turn])
    assert [(t.session, t.graph_states) for t in tainted] == [("t", 1), ("copy", 1)]
    assert "its graph has 1 states" in str(tainted[0])
    made = []
    for name in ("t", "copy"):
        source = store.head(name)
        assert source is not None
        start = Head(**{**source.__dict__, "turn": None, "turns": 0})
        made.append((source, store.save_draft(source, start, checkpoint_of([]), [])))
    store.forget([head.turn], made)
    store.scrub()
    assert SECRET not in everything(path)
    assert [p.thread for p in store.graphs.places()] == ["clean"]
    assert check_store(path).findings == []


def test_pruned_threads_lose_their_states_with_their_last_session(
    store: MemoryStore, begin: Begin
) -> None:
    for name in ("old", "half", "new"):
        begin(store, name)
        put(store, name, "1", name.encode())
    begin(store, "half~2", thread="half")
    put(store, "alone", "1", b"x")  # no session: nothing tells when it was used
    with store._file.writing() as conn:
        conn.execute("update sessions set updated = '2020-01-01' where name in ('old', 'half')")
    pruned = store.prune(Retention(older_than=timedelta(days=1)))
    assert pruned.sessions == ["old", "half"]
    assert sorted(p.thread for p in store.graphs.places()) == ["alone", "half", "new"]
    assert count(store, "graph_values") == 3 and check_store(store.path).findings == []


def test_a_trimmed_thread_keeps_newest_states_alone(
    store: MemoryStore, begin: Begin, raw_span: Spans, checkpoint_of: Callable[..., Checkpoint]
) -> None:
    head = begin(store, "t")
    store.commit(head, checkpoint_of([raw_span(0, 40, 9)]), [NewTurn("user", "more", [3])])
    for n in range(3):
        put(store, "t", str(n), *[b"%d" % i for i in range(n + 1)])
        store.graphs.put_writes(Place("t", "", str(n)), {"w": b"x"})
    assert store.stats().checkpoints == 2
    store.graphs.trim_thread("t", [Place("t", "", "0"), Place("t", "", "1")])
    now = store.stats()
    assert (now.checkpoints, now.turns, now.graph_states) == (1, 2, 1)
    assert count(store, "graph_writes") == 1 and count(store, "graph_values") == 3
    assert check_store(store.path).findings == []


def test_deleted_runs_leave_no_empty_thread_behind(store: MemoryStore, begin: Begin) -> None:
    begin(store, "only")
    begin(store, "both")
    put(store, "only", "1", b"x", run="bad")
    put(store, "both", "1", b"x", run="good")
    put(store, "both", "2", b"x", b"y", parent="1", run="bad")
    store.graphs.put_writes(Place("both", "", "2"), {"w": b"x"})
    told = store.graphs.delete_runs(["bad", "unknown", ""])
    assert told.sessions == ("only",) and store.branches("both") == ["both"]
    assert store.graphs.places() == [Place("both", "", "1")]
    assert (count(store, "graph_values"), count(store, "graph_writes")) == (1, 0)


def test_an_export_carries_the_session_alone(
    store: MemoryStore, begin: Begin, open_store: Opens, tmp_path: Path
) -> None:
    begin(store, "t")
    put(store, "t", "1", SECRET)
    Portable.of(store, "t").write(tmp_path / "t.still")
    assert SECRET not in (tmp_path / "t.still").read_bytes()


# -- encrypted ------------------------------------------------------------------------------------

SECRETS = {
    "thread": "Marigold", "space": "Celandine", "run": "Verdigris", "about": "Malachite",
    "body": "Obsidian", "name": "Heliotrope", "piece": "Cinnabar", "task": "Quicksilver",
    "write": "Apothecary",
}  # fmt: skip


def speak(path: Path, key: bytes | None) -> bytes:
    s = SECRETS
    with MemoryStore(path, key=key) as store:
        place = Place(s["thread"], s["space"], "1")
        values = {s["name"]: [b"", s["piece"].encode()]}
        about, body = s["about"].encode(), s["body"].encode()
        store.graphs.put(GraphState(place, None, s["run"], about, body, values))
        store.graphs.put_writes(place, {s["task"]: s["write"].encode()})
        return everything(path)


def test_an_encrypted_file_tells_no_word_of_a_graph(tmp_path: Path) -> None:
    plain, sealed = speak(tmp_path / "plain.db", None), speak(tmp_path / "sealed.db", KEY)
    assert [s for s in SECRETS.values() if s.encode() not in plain] == []  # it can be found
    assert [s for s in SECRETS.values() if s.encode() in sealed] == []


def test_another_key_opens_the_states_too(open_store: Opens) -> None:
    store = open_store(key=KEY)
    put(store, "t", "1", b"x")
    store.rekey(OTHER)
    store.close()
    assert open_store(key=OTHER).graphs.get("t", "") is not None


# -- damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "a body": "update graph_states set body = x'00' where thread = 'a'",
    "an about": "update graph_states set about = x'00' where thread = 'a'",
    "what it holds": "update graph_states set holds = '{}' where thread = 'a'",
    "a parent": "update graph_states set parent = '0' where thread = 'a'",
    "a run": "update graph_states set run = 'r' where thread = 'a'",
    "a digest": "update graph_states set digest = x'' where thread = 'a'",
    "an id": "update graph_states set name = '7' where thread = 'a'",
    "a space": "update graph_states set space = 'x' where thread = 'a'",
    "another's state": "update graph_states set body = (select body from graph_states"
    " where thread = 'b') where thread = 'a'",
    "a piece": "update graph_values set data = cast('A2' as blob) where data = cast('a2' as blob)",
    "an address": "update graph_values set address = zeroblob(32) where data = cast('a3' as blob)",
    "a piece lost": "delete from graph_values where data = cast('a1' as blob)",
    "the last piece lost": "delete from graph_values where data = cast('a3' as blob)",
    "a piece that follows another": "update graph_values set parent = null"
    " where data = cast('a3' as blob)",
    "a write": "update graph_writes set data = x'00' where thread = 'a'",
    "a write's name": "update graph_writes set name = 'v' where thread = 'a'",
}


@pytest.fixture
def two(store: MemoryStore) -> MemoryStore:
    for thread in ("a", "b"):
        pieces = [f"{thread}{n}".encode() for n in (1, 2, 3)]
        store.graphs.put(
            GraphState(Place(thread, "", "1"), None, "", b"about", thread.encode(), {"m": pieces})
        )
        store.graphs.put_writes(Place(thread, "", "1"), {"w": b"x"})
    return store


@pytest.mark.parametrize("statement", DAMAGE.values(), ids=DAMAGE.keys())
def test_whatever_is_damaged_is_found_and_harms_its_thread_alone(
    statement: str, two: MemoryStore, path: Path
) -> None:
    conn = sqlite3.connect(path)
    assert conn.execute(statement).rowcount == 1
    conn.commit()
    conn.close()
    report = check_store(path)
    assert report.damaged and {f.kind for f in report.findings if f.kind != "leftover"} == {"graph"}
    assert not any("'b'" in str(f) for f in report.findings)
    with pytest.raises(DamageError, match="delete its thread"):
        for place in two.graphs.places("a"):
            two.graphs.get(*vars(place).values())
    assert two.graphs.get("b", "") is not None
    two.graphs.delete_thread("a")  # and what is left of it is collected
    two.prune(Retention())
    assert check_store(path).findings == []


def test_pieces_in_a_ring_are_no_value(two: MemoryStore, path: Path) -> None:
    conn = sqlite3.connect(path)
    conn.execute("update graph_values set parent = 3 where id = 1")
    conn.commit()
    conn.close()
    assert [f.kind for f in check_store(path).findings] == ["graph"]
    with pytest.raises(DamageError):
        two.graphs.get("a", "")


def test_a_reference_that_is_lost_is_found(two: MemoryStore, path: Path) -> None:
    conn = sqlite3.connect(path)
    conn.execute("delete from graph_holds where state = 1")
    conn.commit()
    conn.close()
    kinds = {f.kind: str(f) for f in check_store(path).findings}
    assert kinds.keys() == {"graph", "leftover"} and "[thread 'a']" in kinds["graph"]


def test_a_row_of_another_tenant_is_no_state(open_store: Opens, path: Path) -> None:
    ours, theirs = open_store(tenant="a"), open_store(tenant="b")
    put(ours, "t", "1", b"x")
    put(theirs, "u", "1", b"y")
    conn = sqlite3.connect(path)
    conn.execute("update graph_states set tenant = (select id from tenants where name = 'a')"
                 " where thread = 'u'")  # fmt: skip
    conn.commit()
    conn.close()
    with pytest.raises(DamageError):
        ours.graphs.get("u", "")
    assert [f.kind for f in check_store(path).findings if f.kind != "leftover"] == ["graph"]


# -- at once, and interrupted ---------------------------------------------------------------------


def test_eight_threads_put_at_once(store: MemoryStore) -> None:
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            pieces: list[bytes] = []
            for step in range(12):
                pieces.append(b"%d" % step if n % 2 else b"%d %d" % (n, step))  # some are shared
                put(store, f"t{n}", f"{step:02}", *pieces, parent=f"{step - 1:02}")
                store.graphs.put_writes(Place(f"t{n}", "", f"{step:02}"), {"w": pieces[-1]})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and count(store, "graph_states") == 96
    assert count(store, "graph_values") == 12 + 4 * 12
    for n in range(8):
        found = store.graphs.get(f"t{n}", "")
        assert found is not None and len(found.values["messages"] or ()) == 12
    assert check_store(store.path).findings == []


WRITER = """
import sys
from still_memory.graphs_table import GraphState, Place
from still_memory.store import MemoryStore
thread, pieces = sys.argv[2], []
store = MemoryStore(sys.argv[1])
for step in range(int(sys.argv[3])):
    place, parent = Place(thread, "", f"{step:06}"), f"{step - 1:06}"
    store.graphs.put_writes(place, {"w": b"%d" % step})
    pieces.append(b"%d " % step * 50)
    store.graphs.put(GraphState(place, parent, "", b"", b"%d" % step, {"m": pieces}))
    print(step, flush=True)
"""


@pytest.fixture
def writer(path: Path) -> Iterator[Callable[[str, int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(thread: str, steps: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(path), thread, str(steps)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_share_one_file(
    store: MemoryStore, writer: Callable[[str, int], subprocess.Popen[str]]
) -> None:
    both = [writer("shared", 15), writer("shared", 15)]  # the same states, written twice
    assert [process.wait() for process in both] == [0, 0]
    found = store.graphs.get("shared", "")
    assert found is not None and found.place.id == "000014" and len(found.values["m"] or ()) == 15
    assert count(store, "graph_states") == count(store, "graph_values") == 15
    assert check_store(store.path).findings == []


def test_a_killed_process_leaves_whole_states_and_all_that_it_was_told(
    store: MemoryStore, writer: Callable[[str, int], subprocess.Popen[str]]
) -> None:
    process = writer("t", 100_000)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(25)]
    process.kill()
    told += map(int, process.stdout.read().split())
    process.wait()
    places = store.graphs.places("t")
    assert len(places) in (len(told), len(told) + 1)  # the last may have been kept, and not told
    for place in places:
        found = store.graphs.get("t", "", place.id)
        assert found is not None and len(found.values["m"] or ()) == int(place.id) + 1
        assert found.writes == {"w": b"%d" % int(place.id)}
    assert check_store(store.path).findings == []
