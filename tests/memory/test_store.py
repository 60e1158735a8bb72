"""The store keeps what it was given, bit for bit, and writes only what is new."""

from __future__ import annotations

import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import still_memory
from still_memory.checkpoint import Checkpoint, Entry
from still_memory.errors import (
    ConflictError,
    InputError,
    StoreError,
    UnknownSessionError,
)
from still_memory.identity import ModelIdentity
from still_memory.migrations import migrations
from still_memory.records import Head, NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore

Spans = Callable[..., Span]
Checkpoints = Callable[..., Checkpoint]
Same = Callable[[Checkpoint, Checkpoint], bool]
Opens = Callable[..., MemoryStore]

HELLO = NewTurn("user", "hello", [1, 2, 3])


def begin(store: MemoryStore, name: str, model: ModelIdentity, checkpoint: Checkpoint) -> Head:
    return store.create(name, model, checkpoint=checkpoint, turns=[HELLO], settings={})


def count(store: MemoryStore, table: str) -> int:
    with sqlite3.connect(f"file:{store.path}?mode=ro", uri=True) as conn:
        (rows,) = conn.execute(f"select count(*) from {table}").fetchone()
    conn.close()
    return int(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_session_resumes_bit_for_bit(
    dtype: torch.dtype,
    open_store: Opens,
    model: ModelIdentity,
    raw_span: Spans,
    compact_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    pinned, tail = raw_span(0, 4, dtype=dtype), raw_span(40, 50, 9, dtype)
    memory = compact_span(4, 40, 6)
    saved = Checkpoint(
        (
            Entry(pinned, 0, 4, 0, "pinned"),
            Entry(memory, 4, 40, 4, "memory", level=2),
            Entry(tail, 40, 47, 10, "tail"),
        ),
        47,
        {"next": [7, 8], "why": None, "x": 0.1},
    )
    store = open_store()
    created = store.create(
        "alice", model, checkpoint=saved, turns=[HELLO], settings={"system": "Be brief."}
    )
    store.close()

    again = open_store()
    head = again.head("alice")
    assert head == created
    assert head is not None and head.settings == {"system": "Be brief."}
    assert (head.turns, head.tokens, head.generation) == (1, 47, 1)
    assert same(again.load(head), saved)


def test_turns_come_back_as_they_were(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone(timedelta(hours=5)))
    text = "naïve \0 \U0001f9e0 \u202e <|im_end|>'; drop table turns;--"
    turns = [
        NewTurn("system", "", []),
        NewTurn("user", text, [0, 2**31, 2**32 - 1], {"prefilled": 3}, when),
    ]
    checkpoint = checkpoint_of([raw_span(0, 3)])
    head = store.create("alice", model, checkpoint=checkpoint, turns=turns, settings={})
    store.commit(head, checkpoint, [NewTurn("assistant", "yes", (5,))])

    system, user, assistant = store.history("alice")
    assert (user.role, user.text, user.usage) == ("user", text, {"prefilled": 3})
    assert user.tokens == [0, 2**31, 2**32 - 1]
    assert user.created == when and user.created.tzinfo == UTC
    assert abs(assistant.created - datetime.now(UTC)) < timedelta(minutes=1)
    assert (system.parent, user.parent, assistant.parent) == (None, system.id, user.id)


def test_a_turn_writes_only_what_is_new(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    spans = [raw_span(0, 40)]
    head = begin(store, "alice", model, checkpoint_of(spans))
    rows = count(store, "span_layers")
    before = store.bytes_written
    head = store.commit(head, checkpoint_of(spans), [HELLO])
    assert count(store, "span_layers") == rows
    assert store.bytes_written - before < 500

    spans.append(raw_span(40, 44, 1))
    before = store.bytes_written
    store.commit(head, checkpoint_of(spans), [HELLO])
    assert count(store, "span_layers") == rows + len(spans[1].layers)
    assert spans[1].nbytes < store.bytes_written - before < spans[1].nbytes + 1200


def test_a_resumed_span_is_not_written_again(
    open_store: Opens, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    begin(open_store(), "alice", model, checkpoint_of([raw_span(0, 40)]))
    other = open_store()
    head = other.head("alice")
    assert head is not None
    other.commit(head, other.load(head), [HELLO])
    assert other.bytes_written < 500


def test_bytes_written_for_a_turn_have_no_term_in_the_history(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, compact_span: Spans
) -> None:
    """A rolling state: memory and tail are replaced each turn, whatever came before."""
    head, written = None, []
    for turn in range(1, 61):
        end = 20 * turn
        memory, tail = compact_span(0, end - 10, 8, turn), raw_span(end - 10, end, turn)
        state = Checkpoint(
            (Entry(memory, 0, end - 10, 0, "memory"), Entry(tail, end - 10, end, 8, "tail")), end
        )
        before = store.bytes_written
        if head is None:
            head = begin(store, "alice", model, state)
        else:
            head = store.commit(head, state, [HELLO])
        written.append(store.bytes_written - before)
    assert max(written[1:]) - min(written[1:]) <= 16  # digits of larger token numbers
    assert len(store.history("alice")) == 60


def test_old_checkpoints_and_their_spans_are_collected(
    open_store: Opens,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    store = open_store(keep_checkpoints=3)
    states = [checkpoint_of([raw_span(0, 5, seed)]) for seed in range(6)]
    heads = [begin(store, "alice", model, states[0])]
    for state in states[1:]:
        heads.append(store.commit(heads[-1], state, []))
    stats = store.stats()
    assert (stats.checkpoints, stats.spans, stats.turns) == (3, 3, 1)
    for head, state in zip(heads[3:], states[3:], strict=True):
        assert same(store.load(head), state)
    with pytest.raises(ConflictError, match="moved on"):
        store.load(heads[2])


def test_a_span_that_was_collected_can_be_saved_again(
    open_store: Opens,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    store = open_store(keep_checkpoints=1)
    state, other = checkpoint_of([raw_span(0, 5, 1)]), checkpoint_of([raw_span(0, 5, 2)])
    head = store.commit(begin(store, "alice", model, state), other, [])
    head = store.commit(head, state, [])
    assert same(store.load(head), state)


def test_a_span_two_sessions_hold_is_stored_once_and_outlives_either(
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    begin(store, "alice", model, checkpoint_of([raw_span(0, 30)]))
    bob = begin(store, "bob", model, checkpoint_of([raw_span(0, 30)]))  # equal, not the same
    assert store.stats().spans == 1
    store.delete("alice")
    assert same(store.load(bob), checkpoint_of([raw_span(0, 30)]))


def test_the_same_span_has_another_address_in_another_store(
    open_store: Opens,
    tmp_path: Path,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    addresses = set()
    for name in ("one.db", "two.db"):
        begin(open_store(tmp_path / name), "alice", model, checkpoint_of([raw_span(0, 3)]))
        with sqlite3.connect(tmp_path / name) as conn:
            addresses |= set(
                conn.execute("select address from spans union select digest from span_layers")
            )
        conn.close()
    assert len(addresses) == 6  # one address and two digests each


def test_spans_are_not_kept_alive_by_the_store(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    head = begin(store, "alice", model, checkpoint_of([raw_span(0, 3)]))
    for seed in range(5):
        head = store.commit(head, checkpoint_of([raw_span(0, 3, seed)]), [])
    gc.collect()
    assert len(store._spans._known) == 0


def test_the_session_list_reads_no_tensor(
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    compact_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    spans = [compact_span(0, 90, 9), raw_span(90, 100)]
    head = begin(store, "alice", model, checkpoint_of(spans))
    begin(store, "bob", model, checkpoint_of([raw_span(0, 4)]))
    store.commit(head, checkpoint_of(spans), [HELLO, HELLO])
    with sqlite3.connect(store.path) as conn:
        conn.execute("update span_layers set data = x'00', digest = x'00'")
        conn.execute("update turns set text = 'gone'")
    conn.close()
    alice, bob = store.sessions()
    assert (alice.name, alice.turns, alice.tokens, alice.slots) == ("alice", 3, 100, 19)
    assert sum(span.nbytes for span in spans) <= alice.bytes <= sum(s.nbytes for s in spans) + 1200
    assert (alice.model, bob.name, bob.tokens) == ("tiny", "bob", 4)
    assert alice.created < alice.updated


@given(name=st.text(min_size=1, max_size=40))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_unicode_text_names_a_session(
    name: str,
    open_store: Opens,
    tmp_path: Path,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    store = open_store(tmp_path / "names.db", synchronous="NORMAL")
    if store.head(name) is None:
        begin(store, name, model, checkpoint_of([raw_span(0, 1)]))
    assert store.head(name) is not None
    assert name in {info.name for info in store.sessions()}
    store.close()


@pytest.mark.parametrize("name", ["e\u0301", "é", "a\0b", "a", " ", "\n", "x" * 512, "../a", "%"])
def test_names_that_look_alike_are_different_sessions(
    name: str,
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    for other in ("e\u0301", "é", "a\0b", "a\0", "A", " ", "  ", "\n", "_"):
        if other != name:
            begin(store, other, model, checkpoint_of([raw_span(0, 1)]))
    assert store.head(name) is None


@pytest.mark.parametrize("name", ["", "x" * 513, "a\ud800", 7])
def test_a_name_that_cannot_be_kept_is_refused(
    name: str, store: MemoryStore, model: ModelIdentity
) -> None:
    for verb in (store.head, store.history, store.delete):
        with pytest.raises(InputError, match="session name"):
            verb(name)
    with pytest.raises(InputError, match="session name"):
        store.create(name, model, checkpoint=Checkpoint((), 0), turns=[], settings={})


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (NewTurn("user", "\udc80", [1]), "surrogate"),
        (NewTurn("user", "x", [-1]), "token ids"),
        (NewTurn("user", "x", [2**32]), "token ids"),
        (NewTurn("user", "x", [1.5]), "token ids"),  # type: ignore[list-item]
        (NewTurn("user", "x", [1], {"x": float("nan")}), "JSON"),
        (NewTurn("user", "x", [1], {}, datetime(2026, 1, 1)), "time zone"),
    ],
)
def test_a_turn_that_cannot_be_kept_changes_nothing(
    turn: NewTurn,
    why: str,
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    head = begin(store, "alice", model, checkpoint_of([raw_span(0, 3)]))
    with pytest.raises(InputError, match=why):
        store.commit(head, checkpoint_of([raw_span(0, 6, 2)]), [HELLO, turn])
    assert store.head("alice") == head
    assert (store.stats().turns, store.stats().spans) == (1, 1)
    store.commit(head, checkpoint_of([raw_span(0, 6, 2)]), [HELLO])


def test_a_second_writer_is_told_to_reload(
    open_store: Opens, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    one, two = open_store(), open_store()
    state = checkpoint_of([raw_span(0, 3)])
    head = begin(one, "alice", model, state)
    won = two.commit(head, state, [NewTurn("user", "mine", [1])])
    with pytest.raises(ConflictError, match="open it again"):
        one.commit(head, checkpoint_of([raw_span(0, 9)]), [NewTurn("user", "lost", [1])])
    assert one.head("alice") == won
    assert [t.text for t in one.history("alice")] == ["hello", "mine"]
    assert one.stats().spans == 1
    with pytest.raises(ConflictError, match="exists already"):
        begin(one, "alice", model, state)


def test_a_head_of_a_deleted_session_does_not_fit_its_successor(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    state = checkpoint_of([raw_span(0, 3)])
    old = begin(store, "alice", model, state)
    store.delete("alice")
    new = begin(store, "alice", model, state)
    assert new.generation == old.generation
    verbs = (
        lambda: store.commit(old, state, []),
        lambda: store.load(old),
        lambda: store.fork(old, "bob", state),
        lambda: store.history(old),
    )
    for verb in verbs:
        with pytest.raises(UnknownSessionError, match="was deleted"):
            verb()


def test_a_fork_and_a_rewind_write_neither_spans_nor_turns(
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    states = [checkpoint_of([raw_span(0, 40, seed)]) for seed in range(3)]
    heads = [begin(store, "alice", model, states[0])]
    for state in states[1:]:
        heads.append(store.commit(heads[-1], state, [HELLO, HELLO]))
    assert [kept.turns for kept in store.kept(heads[-1])] == [5, 3]
    before, rows = store.bytes_written, count(store, "span_layers")
    past = replace(heads[-1], turn=heads[1].turn, turns=3)
    bob = store.fork(past, "bob", store.load(store.kept(past)[0]))
    alice = store.commit(past, store.load(store.kept(past)[0]), [])
    assert store.bytes_written - before < 500 and count(store, "span_layers") == rows
    assert same(store.load(bob), states[1]) and same(store.load(alice), states[1])
    assert store.history("bob") == store.history(alice) and (bob.turns, alice.turns) == (3, 3)
    assert [kept.turns for kept in store.kept(alice)] == [3]  # the other is on no way to it
    assert bob.settings == heads[0].settings and bob.generation == 1
    with pytest.raises(ConflictError, match="moved on"):
        store.fork(past, "carol", states[1])
    with pytest.raises(ConflictError, match="choose another name"):
        store.fork(alice, "bob", states[1])
    lost = heads[-1].turn
    store.commit(alice, states[0], [HELLO])  # and the turns that were left go
    assert lost not in {t.id for t in store.history("alice")} and count(store, "turns") == 4
    with pytest.raises(ConflictError, match="moved on"):
        store.history(heads[-1])


def test_what_is_deleted_is_nowhere_in_the_files(
    store: MemoryStore, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    secret = "the heron keeps the brass key"
    span = raw_span(0, 2000, 5)
    needle = span.layers[0].keys.numpy().tobytes()[:64]
    bob = begin(store, "bob", model, checkpoint_of([raw_span(0, 50)]))
    head = store.create(
        "alice",
        model,
        checkpoint=checkpoint_of([span]),
        turns=[NewTurn("user", secret, [1])],
        settings={"system": secret},
    )
    for turn in range(4):
        state = checkpoint_of([span, raw_span(2000, 2003, turn)])
        head = store.commit(head, state, [NewTurn("user", f"{secret} {turn}", [1])])
    store.delete("alice")

    left = b"".join(f.read_bytes() for f in store.path.parent.iterdir())
    assert secret.encode() not in left and needle not in left
    assert store.head("alice") is None
    assert [t.text for t in store.history("bob")] == ["hello"]
    assert store.stats().turns == 1 and store.stats().spans == 1
    store.load(bob)


def test_an_unknown_session_has_its_own_error(store: MemoryStore) -> None:
    assert store.head("nobody") is None
    for verb in (store.history, store.delete):
        with pytest.raises(UnknownSessionError, match="no session 'nobody'"):
            verb("nobody")


def test_a_file_in_steady_use_does_not_grow(
    open_store: Opens, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    store = open_store(synchronous="NORMAL")
    head = begin(store, "alice", model, checkpoint_of([raw_span(0, 400)]))
    sizes = []
    for seed in range(80):
        head = store.commit(head, checkpoint_of([raw_span(0, 400, seed)]), [HELLO])
        sizes.append(store.stats().file_bytes)
    assert max(sizes[40:]) <= sizes[40] + 2 * 65536


def test_pages_that_a_large_state_used_are_given_back_bit_by_bit(
    open_store: Opens, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    store = open_store(synchronous="NORMAL", keep_checkpoints=1)
    head = begin(store, "alice", model, checkpoint_of([raw_span(0, 60_000)]))
    large, small = store.stats().span_bytes, checkpoint_of([raw_span(0, 10)])
    assert large > 15_000_000
    for _ in range(12):
        head = store.commit(head, small, [])
    store.close()
    assert store.path.stat().st_size < large / 2


def test_the_file_is_its_owners_alone(store: MemoryStore) -> None:
    files = list(store.path.parent.iterdir())
    assert {f.name for f in files} == {"memory.db", "memory.db-wal", "memory.db-shm"}
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}


def test_commits_are_on_disk_when_they_return(path: Path, store: MemoryStore) -> None:
    with store._file.connection() as conn:

        def pragma(name: str) -> object:
            return conn.execute(f"pragma {name}").fetchone()[0]

        assert (pragma("journal_mode"), pragma("synchronous")) == ("wal", 2)
        assert (pragma("page_size"), pragma("auto_vacuum")) == (65536, 2)
        assert (pragma("foreign_keys"), pragma("trusted_schema")) == (1, 0)


@pytest.mark.parametrize("content", [b"hello, this is a letter to Ana", b"\0" * 5000, b"x"])
def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(
    content: bytes, path: Path, open_store: Opens
) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a SQLite file"):
        open_store()
    assert path.read_bytes() == content


def test_a_name_that_sqlite_reads_otherwise_is_a_file_all_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_store: Opens,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(Path(":memory:")) as store:
        begin(store, "alice", model, checkpoint_of([raw_span(0, 3)]))
    monkeypatch.chdir("/")
    assert [s.name for s in open_store(tmp_path / ":memory:").sessions()] == ["alice"]


def test_a_database_of_another_program_is_refused_and_left_alone(
    path: Path, open_store: Opens
) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("create table bookmarks (url)")
    conn.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        open_store()
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(path: Path, open_store: Opens) -> None:
    open_store().close()
    with sqlite3.connect(path) as conn:
        conn.execute(
            "insert into _sqlite_migrations (migration_set, name, applied_at)"
            " values (?, 'm999_telepathy', 'tomorrow')",
            [migrations.name],
        )
    conn.close()
    with pytest.raises(StoreError, match=r"newer still-agent \(m999_telepathy\); upgrade"):
        open_store()


def test_a_store_from_before_spans_knew_their_tokens_is_read(
    path: Path, open_store: Opens, model: ModelIdentity, raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint], same: Callable[[Checkpoint, Checkpoint], bool],
) -> None:  # fmt: skip
    old = checkpoint_of([replace(raw_span(0, 12), ids=None)])
    store = open_store()
    store.create("x", model, checkpoint=old, turns=[], settings={})
    store.close()
    with sqlite3.connect(path) as conn:  # as m001 left it
        conn.execute("alter table spans drop column ids")
        conn.execute("delete from _sqlite_migrations where name = 'm002_token_ids'")
    conn.close()
    store = open_store()
    head = store.head("x")
    assert head is not None and same(store.load(head), old)
    told = raw_span(12, 20, seed=5)
    both = checkpoint_of([old.entries[0].span, told])
    head = store.commit(head, both, [])
    store.close()
    found = open_store().load(head)
    assert same(found, both) and [e.span.ids for e in found.entries] == [None, told.ids]


def test_places_where_no_store_can_be_are_refused(tmp_path: Path, open_store: Opens) -> None:
    for place in (tmp_path, tmp_path / "no" / "such" / "folder.db", tmp_path / ("x" * 300)):
        with pytest.raises(StoreError, match="cannot open the store"):
            open_store(place)
    with pytest.raises(StoreError, match="cannot open the store"):
        open_store(Path("a\0b"))


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_store_is_refused(
    what: str, path: Path, open_store: Opens, in_child: Callable[..., Callable[[], str]]
) -> None:
    open_store().close()
    for folder in path.parents:  # the child is not their owner
        if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o005 == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    path.parent.chmod(0o777 if what == "file" else 0o555)
    path.chmod(0o444 if what == "file" else 0o666)

    def work() -> str:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        MemoryStore(path).close()
        return "opened"

    answer = in_child(work)()
    path.parent.chmod(0o755)
    assert answer.startswith("StoreError") and "writable" in answer


def test_options_that_mean_nothing_are_refused(open_store: Opens) -> None:
    with pytest.raises(InputError, match="keep_checkpoints"):
        open_store(keep_checkpoints=0)
    with pytest.raises(StoreError, match="synchronous"):
        open_store(synchronous="off; drop table turns")


def test_a_closed_store_says_so(store: MemoryStore, path: Path) -> None:
    with store as same_store:
        assert same_store is store
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.sessions()
    assert not path.with_name("memory.db-wal").exists()


def test_threads_share_one_store(
    store: MemoryStore,
    model: ModelIdentity,
    raw_span: Spans,
    checkpoint_of: Checkpoints,
    same: Same,
) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            head = begin(store, f"s{number}", model, checkpoint_of([raw_span(0, 5, number)]))
            for turn in range(8):
                state = checkpoint_of([raw_span(0, 5, 100 * number + turn)])
                head = store.commit(head, state, [HELLO])
                assert same(store.load(head), state)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [len(store.history(f"s{n}")) for n in range(6)] == [9] * 6


def test_the_package_is_imported_without_torch() -> None:
    code = (
        "import sys, still_memory; still_memory.StoreError; dir(still_memory)\n"
        "assert not {'torch', 'pydantic', 'sqlite_utils'} & set(sys.modules)"
    )
    home = Path(still_memory.__path__[0]).parent
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(home)}
    )
    assert all(getattr(still_memory, name).__name__ == name for name in still_memory.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        still_memory.nothing  # noqa: B018


def test_sessions_come_in_pages_newest_first(
    open_store: Opens, model: ModelIdentity, raw_span: Spans, checkpoint_of: Checkpoints
) -> None:
    store = open_store()
    for number in range(5):
        begin(store, f"s{number}", model, checkpoint_of([raw_span(0, 3)]))
    names = [info.name for info in store.sessions()]
    assert names == ["s4", "s3", "s2", "s1", "s0"]
    assert [info.name for info in store.sessions(2)] == names[:2]
    assert [info.name for info in store.sessions(2, after="s3")] == names[2:4]
    assert store.sessions(after="s0") == []
    with pytest.raises(UnknownSessionError):
        store.sessions(after="nobody")
