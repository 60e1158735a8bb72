"""What was acknowledged stays: through SIGKILL, a full disk, racing writers and forks."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from still_memory.checkpoint import Checkpoint
from still_memory.errors import StoreError
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
InChild = Callable[[Callable[[], str]], Callable[[], str]]
States = Callable[[int], Checkpoint]
Same = Callable[[Checkpoint, Checkpoint], bool]


@pytest.fixture
def state(raw_span: Callable[..., Span], checkpoint_of: Callable[..., Checkpoint]) -> States:
    """The state that a session has at a generation: it can be made again, to compare."""
    return lambda generation: checkpoint_of(
        [raw_span(0, 400, generation), raw_span(400, 402, generation)], generation=generation
    )


@pytest.fixture
def begin(model: ModelIdentity, state: States) -> Callable[[MemoryStore], Head]:
    def make(store: MemoryStore) -> Head:
        turns = [NewTurn("user", "turn 1", [1])]
        return store.create("alice", model, checkpoint=state(1), turns=turns, settings={})

    return make


def advance(store: MemoryStore, head: Head, state: States) -> Head:
    n = head.generation + 1
    return store.commit(head, state(n), [NewTurn("user", f"turn {n}", [n])])


def test_every_acknowledged_turn_survives_sigkill(
    open_store: Opens, path: Path, begin: Callable[[MemoryStore], Head], state: States, same: Same
) -> None:
    with open_store() as store:
        begin(store)
    chance = random.Random(0)
    told = 1
    for _ in range(10):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                store = MemoryStore(path)
                head = store.head("alice")
                assert head is not None
                while True:
                    head = advance(store, head, state)
                    os.write(into, f"{head.generation}\n".encode())
            finally:
                os._exit(1)
        os.close(into)
        with open(out) as pipe:
            told = int(pipe.readline())  # it has opened the store, and is in the midst of it
            time.sleep(chance.uniform(0, 0.08))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            told = max([told, *map(int, pipe.read().split())])

        with open_store() as store:
            head = store.head("alice")
            assert head is not None and head.generation in (told, told + 1)
            told = head.generation
            assert same(store.load(head), state(told))
            texts = [turn.text for turn in store.history("alice")]
            assert texts == [f"turn {n}" for n in range(1, told + 1)]
            assert store.stats().checkpoints <= 2
        conn = sqlite3.connect(path)
        assert conn.execute("pragma integrity_check").fetchone() == ("ok",)
        assert conn.execute("pragma foreign_key_check").fetchall() == []
        conn.close()
    assert told >= 11  # each child was killed after a commit of its own


def test_of_two_processes_that_race_for_a_head_one_wins(
    open_store: Opens,
    path: Path,
    begin: Callable[[MemoryStore], Head],
    state: States,
    in_child: InChild,
) -> None:
    with open_store() as store:
        head = begin(store)
    for _ in range(4):
        start = time.time() + 0.15

        def work(expected: Head = head, start: float = start) -> str:
            with MemoryStore(path) as mine:
                time.sleep(max(0.0, start - time.time()))
                advance(mine, expected, state)
            return "won"

        answers = sorted(wait() for wait in [in_child(work), in_child(work), in_child(work)])
        assert answers[-1] == "won"
        assert all(
            a.startswith("ConflictError: session 'alice' has moved on") for a in answers[:-1]
        )
        with open_store() as store:
            new = store.head("alice")
            assert new is not None and new.generation == head.generation + 1
            assert len(store.history("alice")) == new.generation
            head = new


def test_opening_a_store_twice_keeps_its_locks(
    open_store: Opens, path: Path, begin: Callable[[MemoryStore], Head], state: States
) -> None:
    """Else the next process to leave would delete the log under the first connection."""
    store = open_store()
    head = begin(store)
    open_store().close()

    def other(program: str) -> str:  # not a fork: that would bring the first connection along
        opened = f"import sqlite3; c = sqlite3.connect({str(path)!r})"
        call = [sys.executable, "-c", f"{opened}; {program}"]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    count = "print(c.execute('select count(*) from turns').fetchone()[0]); c.close()"
    assert other(count) == "1"
    advance(store, head, state)
    assert other(count) == "2"


def test_many_processes_may_make_one_store(
    path: Path, open_store: Opens, in_child: InChild
) -> None:
    def work() -> str:
        with MemoryStore(path) as store:
            return store._vault.key.hex()

    keys = {wait() for wait in [in_child(work) for _ in range(6)]}
    assert len(keys) == 1 and open_store()._vault.key.hex() in keys


def test_an_open_store_may_be_used_on_both_sides_of_a_fork(
    store: MemoryStore, begin: Callable[[MemoryStore], Head], state: States, in_child: InChild
) -> None:
    head = begin(store)

    def work() -> str:
        moved = advance(store, head, state)
        store.close()
        return str(moved.generation)

    assert in_child(work)() == "2"
    seen = store.head("alice")
    assert seen is not None and seen.generation == 2
    assert advance(store, seen, state).generation == 3


def test_a_full_disk_leaves_the_session_as_it_was(
    open_store: Opens,
    path: Path,
    begin: Callable[[MemoryStore], Head],
    state: States,
    raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
    same: Same,
) -> None:
    store = open_store()
    head = advance(store, begin(store), state)
    with store._file.connection() as conn:  # SQLite's own limit, and its own error
        (pages,) = conn.execute("pragma page_count").fetchone()
        conn.execute(f"pragma max_page_count = {pages + 4}")
    with pytest.raises(StoreError, match="free some space"):
        store.commit(head, checkpoint_of([raw_span(0, 9000)]), [NewTurn("user", "lost", [1])])
    assert store.head("alice") == head
    assert same(store.load(head), state(2))
    assert len(store.history("alice")) == 2

    with store._file.connection() as conn:
        conn.execute("pragma max_page_count = 1000000")
    store.commit(head, checkpoint_of([raw_span(0, 9000)]), [NewTurn("user", "kept", [1])])
    assert store.history("alice")[-1].text == "kept"


def test_a_file_that_may_not_grow_leaves_the_session_as_it_was(
    open_store: Opens,
    path: Path,
    begin: Callable[[MemoryStore], Head],
    state: States,
    in_child: InChild,
    same: Same,
) -> None:
    with open_store() as store:
        begin(store)

    def work() -> str:
        mine = MemoryStore(path)
        head = mine.head("alice")
        assert head is not None
        limit = path.stat().st_size  # of any file, the log too
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        while True:
            head = advance(mine, head, state)

    assert in_child(work)().startswith("StoreError")
    with open_store() as store:
        head = store.head("alice")
        assert head is not None
        assert same(store.load(head), state(head.generation))
        assert len(store.history("alice")) == head.generation


def test_an_interrupt_in_mid_commit_undoes_all_of_it(
    store: MemoryStore, begin: Callable[[MemoryStore], Head], state: States, same: Same
) -> None:
    head = begin(store)

    def interrupted() -> Iterator[NewTurn]:
        yield NewTurn("user", "first", [1])
        raise KeyboardInterrupt

    class Turns(list[NewTurn]):
        def __iter__(self) -> Iterator[NewTurn]:
            return interrupted()

    with pytest.raises(KeyboardInterrupt):
        store.commit(head, state(2), Turns())
    assert store.head("alice") == head
    assert store.stats().turns == 1
    assert same(store.load(head), state(1))
    assert advance(store, head, state).generation == 2


def test_a_writer_who_waits_too_long_is_told(
    open_store: Opens, begin: Callable[[MemoryStore], Head], state: States
) -> None:
    store, slow = open_store(timeout=0.05), open_store()
    head = begin(store)
    with slow._file.writing():
        with pytest.raises(StoreError, match="longer timeout"):
            advance(store, head, state)
        assert store.head("alice") == head  # readers never wait
    assert advance(store, head, state).generation == 2
