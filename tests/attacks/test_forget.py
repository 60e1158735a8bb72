"""Nothing that was forgotten is in any byte; in small, what `forgets.py` does at length."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from still_memory import erasure
from still_memory.database import StoreFile
from still_memory.errors import (
    ConflictError,
    ErasureError,
    StoreError,
    TaintedError,
    UnknownSessionError,
)
from still_memory.records import NewTurn
from still_memory.store import MemoryStore
from tests.attacks import traces
from tests.attacks.forgets import forget
from tests.attacks.states import MODEL, check_file, state

SECRET = "Zanzibar-quixotic"


@pytest.mark.parametrize("what", ["--histories", "--kills"])
def test_no_history_leaves_a_byte_of_what_is_forgotten(what: str) -> None:
    # a process of its own, for it forks, which is not for one in which torch's threads have run
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.forgets", what, "6", "--steps", "12"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[what.strip("-")] == 6 and found["patterns"] > 100 and found["hits"] == 0


def told(store: MemoryStore) -> int:
    """A session that was told a secret, and a fork that was too; the id of that turn."""
    head = store.create("a", MODEL, checkpoint=state(1), turns=[], settings={})
    for n, text in enumerate(["Good day.", f"It is {SECRET}.", "Indeed."]):
        head = store.commit(head, state(2 + n), [NewTurn("user", text, [n])])
    store.fork(head, "b", state(9))
    return store.history("a")[1].id


def secret_in(path: Path) -> bool:
    words = [SECRET.encode(), SECRET.lower().encode()[:8], SECRET.lower().encode()[9:]]
    return bool(traces.hits(path, words))


def test_who_reads_meanwhile_keeps_the_log_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = MemoryStore(path, timeout=0.2)
    turn = told(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("begin")
        assert reader.execute("select count(*) from turns").fetchone() == (3,)
        with pytest.raises(ErasureError, match="store scrub"):
            forget(store, [turn], "keep", state(20))
        assert [t.text for t in store.history("b")] == ["Good day.", "Indeed."]
        assert secret_in(path)  # success would have been a lie
        with closing(MemoryStore(path, timeout=0.2)) as other:  # no opening waits for it
            assert [t.text for t in other.history("a")] == ["Good day.", "Indeed."]
        assert secret_in(path)
    MemoryStore(path).close()  # the next to open finishes, though the first is open still
    assert not secret_in(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("select name from meta").fetchall() == [("key",)]
    store.close()
    check_file(path)


def test_openings_meanwhile_do_not_write_the_file_into_its_log(tmp_path: Path) -> None:
    path, log = tmp_path / "s.db", tmp_path / "s.db-wal"
    store = MemoryStore(path, timeout=0.2)
    turn = told(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("begin")
        reader.execute("select count(*) from turns").fetchone()
        with pytest.raises(ErasureError):
            forget(store, [turn], "keep", state(20))
        before = log.stat().st_size
        for _ in range(3):
            MemoryStore(path).close()
        with pytest.raises(ErasureError):
            store.scrub()
        assert log.stat().st_size == before
    store.close()


def test_an_opening_that_fails_closes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[StoreFile] = []
    close = StoreFile.close

    def fails(_: StoreFile) -> None:
        raise StoreError("the disk is full")

    def closing_it(file: StoreFile) -> None:
        closed.append(file)
        close(file)

    monkeypatch.setattr(erasure, "go_on", fails)
    monkeypatch.setattr(StoreFile, "close", closing_it)
    with pytest.raises(StoreError, match="disk is full"):
        MemoryStore(tmp_path / "s.db")
    assert len(closed) == 1


def test_a_late_writer_brings_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store, other = MemoryStore(path), MemoryStore(path)
    turn = told(store)
    head, fork = other.head("a"), other.head("b")
    assert head is not None and fork is not None
    known = other.history("a")
    forget(store, [turn], "forget", state(20))
    again = [NewTurn(t.role, t.text, t.tokens, t.usage, t.created) for t in known]
    for late in (head, fork):
        with pytest.raises(ConflictError):
            other.commit(late, state(30), [NewTurn("user", f"As said: {SECRET}.", [1])])
        with pytest.raises(ConflictError):
            other.fork(late, "late", state(30))
        made = replace(late, turn=None, turns=0)
        with pytest.raises(ConflictError):
            other.save_draft(late, made, state(30), again)
        with pytest.raises(ConflictError):
            other.adopt(late, made, state(30), again)
    assert not secret_in(path)
    store.delete("a", erase=True)
    with pytest.raises(UnknownSessionError):
        other.commit(head, state(30), again)


def test_a_fork_made_meanwhile_is_not_overlooked(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "s.db")
    turn = told(store)
    head = store.head("a")
    assert head is not None
    made = []
    for taint in store.tainted([turn]):
        source = store.ledger(taint.session)
        first = store.history(source)[0]
        left = replace(source, turn=first.id, turns=1, settings={})
        made.append((source, store.save_draft(source, left, state(20), [])))
    store.fork(head, "c", state(21))
    with pytest.raises(ConflictError, match="moved on"):
        store.forget([turn], made)
    assert SECRET in store.history("c")[1].text and SECRET in store.history("a")[1].text


def test_one_tenant_forgets_nothing_of_anothers(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    one, other = MemoryStore(path), MemoryStore(path, tenant="other")
    turn, theirs = told(one), told(other)
    assert one.tainted([theirs]) == [] and other.tainted([turn]) == []
    forget(one, [turn], "keep", state(20))
    assert SECRET in other.history("a")[1].text and SECRET in other.history("b")[1].text
    head = other.head("b")
    assert head is not None and other.load(head).length == 30
    one.delete("a", erase=True, forks="delete")
    assert [info.name for info in other.sessions()] == ["b", "a"] and one.sessions() == []


def test_erasing_a_session_says_who_shares_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = MemoryStore(path)
    told(store)
    with pytest.raises(TaintedError, match="'b' has it as turns 1 to 3") as refused:
        store.delete("a", erase=True, forks="refuse")
    assert [t.session for t in refused.value.tainted] == ["b"]
    assert len(store.sessions()) == 2
    deleted = store.delete("a", erase=True, forks="keep")
    store.scrub()
    assert deleted.sessions == ("a",)
    assert [(t.session, t.forgotten) for t in deleted.shared] == [("b", (1, 2, 3))]
    assert secret_in(path)
    assert store.delete("b", erase=True, forks="refuse").shared == ()
    assert secret_in(path)  # until it is scrubbed
    store.scrub()
    assert not secret_in(path)


def test_a_state_that_another_session_has_left_goes_too(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = MemoryStore(path)
    told(store)
    head = store.head("b")
    assert head is not None
    store.commit(replace(head, turn=None, turns=0), state(30), [])  # rewound, and kept at turn 3
    assert store.delete("a", erase=True, forks="refuse").shared == ()
    store.scrub()
    assert not secret_in(path) and store.history("b") == []
    head = store.head("b")
    assert head is not None and [h.turns for h in store.kept(head)] == [0]
