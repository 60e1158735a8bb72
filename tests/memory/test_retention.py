"""What may go goes, and nothing else; in short steps; and what is deleted is overwritten."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zlib import crc32

import pytest

from still_memory import prune as prune_module
from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint
from still_memory.errors import InputError, UnknownSessionError
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn
from still_memory.retention import Retention
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Talk = Callable[..., Head]
Same = Callable[[Checkpoint, Checkpoint], bool]


@pytest.fixture
def talk(
    model: ModelIdentity, raw_span: Callable[..., Span], checkpoint_of: Callable[..., Checkpoint]
) -> Talk:
    """`talk(store, "alice", 3)`: three turns, each with a state of its own of so many tokens."""

    def go_on(store: MemoryStore, name: str, turns: int, tokens: int = 40) -> Head:
        head = store.head(name)
        for n in range(turns):
            state = checkpoint_of([raw_span(0, tokens, crc32(name.encode()) % 10**6 + 9 * n)])
            said = [NewTurn("user", f"{name} secretly{n}word", [n])]
            if head is None:
                head = store.create(name, model, checkpoint=state, turns=said, settings={})
            else:
                head = store.commit(head, state, said)
        assert head is not None
        return head

    return go_on


def age(store: MemoryStore, name: str, days: float) -> None:
    """The session was last used so long ago."""
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    conn = sqlite3.connect(store.path)
    conn.execute("update sessions set updated = ? where name = ?", (when, name))
    conn.commit()
    conn.close()


def names(store: MemoryStore) -> set[str]:
    return {info.name for info in store.sessions()}


def test_older_checkpoints_of_every_session_go(open_store: Opens, talk: Talk, same: Same) -> None:
    store = open_store(keep_checkpoints=5)
    heads = {name: talk(store, name, 4) for name in ("al", "bob")}
    states = {name: store.load(head) for name, head in heads.items()}
    pruned = store.prune(Retention(keep_checkpoints=2))
    assert [(d.session, d.checkpoints, d.whole, d.why) for d in pruned.drops] == [
        ("al", 2, False, "checkpoints"), ("bob", 2, False, "checkpoints")
    ]  # fmt: skip
    assert (store.stats().checkpoints, store.stats().spans, store.stats().turns) == (4, 4, 8)
    for name, head in heads.items():
        assert store.head(name) == head and same(store.load(head), states[name])
        assert len(store.kept(head)) == 2
    assert not check_store(store.path).findings
    assert store.prune(Retention(keep_checkpoints=2)).drops == []


def test_sessions_that_were_not_used_for_long_go_with_all_their_words(
    store: MemoryStore, talk: Talk
) -> None:
    heads = {name: talk(store, name, 40) for name in ("al", "bob", "carol")}
    forked = replace(heads["al"], turn=heads["al"].turn, turns=40)
    store.fork(forked, "dora", store.load(heads["al"]))
    age(store, "al", 31), age(store, "bob", 40), age(store, "carol", 29)
    needle = b"bob secretly"
    assert needle in _files(store)

    pruned = store.prune(Retention(older_than=timedelta(days=30)))
    assert pruned.sessions == ["bob", "al"]  # the one not used for longest first
    assert [d.turns for d in pruned.drops] == [40, 0]  # "dora" holds those of "al"
    assert names(store) == {"carol", "dora"}
    assert needle not in _files(store) and b"carol secretly" in _files(store)
    for name in ("al", "bob"):
        with pytest.raises(UnknownSessionError, match="deleted"):
            store.commit(heads[name], Checkpoint((), 0), [])
    dora = store.head("dora")
    assert dora is not None and len(store.history(dora)) == 40 and store.load(dora)
    assert [m.number for m in store.search(dora, "secretly39word")] == [40]
    report = check_store(store.path)
    assert not report.findings and report.turns == 80


def _files(store: MemoryStore) -> bytes:
    return b"".join(f.read_bytes() for f in store.path.parent.iterdir())


def test_no_pruned_word_stays_in_the_index(store: MemoryStore, talk: Talk) -> None:
    for _ in range(8):  # in segments between those that stay
        talk(store, "bob", 9), talk(store, "carol", 9)
    conn = sqlite3.connect(store.path)
    conn.execute("create virtual table temp.words using fts5vocab (main, turn_words, row)")
    assert "bob" in {w for (w,) in conn.execute("select term from words")}
    age(store, "bob", 2)
    store.prune(Retention(older_than=timedelta(days=1)))
    blocks = b"".join(b for (b,) in conn.execute("select block from turn_words_data"))
    assert b"bob" not in blocks and b"carol" in blocks
    conn.close()


def test_a_file_that_is_too_large_loses_the_oldest_first_and_gives_its_pages_back(
    open_store: Opens, talk: Talk
) -> None:
    store = open_store(synchronous="NORMAL", keep_checkpoints=3)
    for name, days in (("al", 3), ("bob", 2), ("carol", 1), ("doris", 0)):
        talk(store, name, 3, tokens=4000)
        age(store, name, days)
    state = max(s.bytes for s in store.sessions())
    large = store.space().file_bytes
    assert large > 12 * state

    planned = store.prune(Retention(max_bytes=large - 5 * state), dry_run=True)
    assert planned.dry_run and planned.sessions == [] and store.space().file_bytes == large
    first = store.prune(Retention(max_bytes=large - 5 * state))
    assert [d.session for d in first.drops] == [d.session for d in planned.drops]
    assert [d.session for d in first.drops] == ["al", "bob", "carol"]  # two states each
    assert {d.why for d in first.drops} == {"size"}
    assert store.space().file_bytes <= large - 5 * state and len(names(store)) == 4
    assert first.file_bytes_after == store.space().file_bytes  # on the disk, not only free
    assert abs(planned.file_bytes_after - first.file_bytes_after) < 0.2 * large

    assert store.prune(Retention(max_bytes=5 * state)).sessions == ["al", "bob"]
    assert store.prune(Retention(max_bytes=0)).sessions == ["carol"]
    assert names(store) == {"doris"}  # the one that was used last stays
    assert not check_store(store.path).findings


def test_a_dry_run_changes_nothing(store: MemoryStore, talk: Talk) -> None:
    talk(store, "alice", 3)
    age(store, "alice", 9)
    before = _dump(store.path)
    retention = Retention(1, timedelta(days=1), 0)
    planned = store.prune(retention, dry_run=True)
    assert planned.sessions == ["alice"] and _dump(store.path) == before
    assert sum(d.checkpoints for d in planned.drops) == 2 and planned.drops[-1].turns == 3
    assert store.prune(retention).sessions == ["alice"] and store.stats().spans == 0


def _dump(path: Path) -> list[str]:
    conn = sqlite3.connect(path)
    try:
        return list(conn.iterdump())
    finally:
        conn.close()


def test_a_session_that_is_used_meanwhile_stays(
    store: MemoryStore, open_store: Opens, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_store()
    talk(store, "alice", 2), talk(store, "bob", 1)
    age(store, "alice", 9)
    planned = prune_module.plan

    def plan_then_use(*arguments: object) -> object:
        drops = planned(*arguments)  # type: ignore[arg-type]
        talk(other, "alice", 1)
        return drops

    monkeypatch.setattr(prune_module, "plan", plan_then_use)
    assert store.prune(Retention(older_than=timedelta(days=1))).drops == []
    assert len(store.history("alice")) == 3 and not check_store(store.path).findings


def test_a_prune_ends_though_a_session_goes_on(
    store: MemoryStore, open_store: Opens, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, planned, plans = open_store(), prune_module.plan, []
    talk(store, "alice", 2), talk(store, "bob", 2)
    age(store, "bob", 1)

    def use_then_plan(conn: sqlite3.Connection, *limits: object) -> object:
        conn.execute("rollback")  # what follows is seen
        talk(other, "alice", 1)
        conn.execute("begin")
        plans.append(planned(conn, *limits))  # type: ignore[arg-type]
        return plans[-1]

    monkeypatch.setattr(prune_module, "plan", use_then_plan)
    assert store.prune(Retention(keep_checkpoints=1, max_bytes=0)).sessions == ["bob"]
    assert len(plans) < 5 and all(plans)


def test_a_prune_that_was_stopped_is_ended_by_the_next(
    store: MemoryStore, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(store, "alice", 40), talk(store, "bob", 2)
    age(store, "alice", 9)
    steps, real = iter(range(3)), store._file.overwriting

    def stopped() -> object:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(store._file, "overwriting", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.prune(Retention(older_than=timedelta(days=1)))
    monkeypatch.undo()
    report = check_store(store.path)
    assert [f.kind for f in report.findings] == ["leftover"] and not report.damaged
    assert names(store) == {"bob"}
    assert store.prune(Retention()).drops == []  # no limits: collects what was left
    assert not check_store(store.path).findings and store.stats().turns == 2


def test_turns_go_on_while_a_store_is_pruned(open_store: Opens, talk: Talk, path: Path) -> None:
    """From another connection, as another process would."""
    store = open_store(synchronous="NORMAL", keep_checkpoints=1)
    for n in range(10):
        talk(store, f"old{n:02}", 2, tokens=3000)
        age(store, f"old{n:02}", 9)
    other = open_store(synchronous="NORMAL")
    head, waits, over = talk(other, "alice", 1), [], threading.Event()
    pruned: list[object] = []

    def work() -> None:
        pruned.append(store.prune(Retention(older_than=timedelta(days=1))))
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not over.is_set():
        began = time.perf_counter()
        head = talk(other, "alice", 1)
        waits.append(time.perf_counter() - began)
    thread.join()
    assert names(store) == {"alice"} and len(pruned) == 1
    assert len(waits) > 2 and len(other.history(head)) == len(waits) + 1
    assert not check_store(path).findings


def test_what_takes_the_space_is_told(store: MemoryStore, talk: Talk) -> None:
    head = talk(store, "alice", 3, tokens=500)
    store.fork(head, "bob", store.load(head))
    talk(store, "carol", 1, tokens=100)
    space = store.space()
    assert (space.spans, space.shared_spans, space.turns, space.checkpoints) == (3, 1, 4, 4)
    assert space.span_bytes == store.stats().span_bytes > space.shared_span_bytes > 0
    one = space.shared_span_bytes  # the span of alice's newest state, which is bob's
    alice, bob, carol = space.sessions
    assert (alice.name, alice.span_bytes, alice.shared_span_bytes) == ("alice", 2 * one, one)
    assert (bob.name, bob.span_bytes, bob.shared_span_bytes) == ("bob", one, one)
    assert (alice.turns, alice.turn_bytes) == (bob.turns, bob.turn_bytes) and alice.turns == 3
    said = sum(len(t.text) + 4 * len(t.tokens) + 2 for t in store.history("alice"))
    assert alice.turn_bytes == said and space.turn_bytes == said + carol.turn_bytes
    parts = (
        space.span_bytes, space.turn_bytes, space.checkpoint_bytes, space.index_bytes,
        space.free_bytes, space.other_bytes,
    )  # fmt: skip
    assert sum(parts) == space.file_bytes and min(parts[:4]) > 0 and space.gives_back


def test_a_file_that_gives_no_pages_back_says_so(
    store: MemoryStore, open_store: Opens, talk: Talk, tmp_path: Path
) -> None:
    talk(store, "alice", 2, tokens=2000)
    store.close()
    conn = sqlite3.connect(store.path)
    conn.execute("pragma auto_vacuum = none")
    conn.execute("vacuum")
    conn.close()
    again = open_store()
    assert not again.space().gives_back
    age(again, "alice", 3), talk(again, "bob", 1)
    assert again.prune(Retention(older_than=timedelta(days=1))).sessions == ["alice"]
    assert again.space().free_bytes > 500_000
    again.close()
    conn = sqlite3.connect(store.path)  # as `store stats` says
    conn.executescript("pragma auto_vacuum = incremental; vacuum")
    conn.close()
    last = open_store()
    assert last.space().gives_back and last.space().free_bytes == 0 and names(last) == {"bob"}


@pytest.mark.parametrize(
    ("limits", "why"),
    [({"keep_checkpoints": 0}, "at least 1"), ({"older_than": timedelta(-1)}, "negative"),
     ({"max_bytes": -1}, "negative")],
)  # fmt: skip
def test_limits_that_mean_nothing_are_refused(limits: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Retention(**limits)  # type: ignore[arg-type]
