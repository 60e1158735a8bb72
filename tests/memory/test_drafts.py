"""A state that is made anew takes a session's place whole, or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, DamageError, StoreError, UnknownSessionError
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn
from still_memory.retention import Retention
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Same = Callable[[Checkpoint, Checkpoint], bool]
PARTS = {"parts": {"compactor": "new", "budget": {"slots": 64}}}


@pytest.fixture
def old(raw_span: Callable[..., Span], checkpoint_of: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoint_of([raw_span(0, 12), raw_span(12, 20, seed=5)])


@pytest.fixture
def new(
    raw_span: Callable[..., Span], compact_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> Checkpoint:  # fmt: skip
    return checkpoint_of([compact_span(0, 12, 5), raw_span(12, 20, seed=9)])


@pytest.fixture
def head(store: MemoryStore, model: ModelIdentity, old: Checkpoint) -> Head:
    """A session of two turns."""
    turns = [NewTurn("user", "the brass key", [1, 2]), NewTurn("user", "the heron", [3])]
    return store.create("x", model, checkpoint=old, turns=turns, settings={"system": None})


@pytest.fixture
def other(model: ModelIdentity) -> ModelIdentity:
    return model.model_copy(update={"weights": "other", "name": "other"})


def begun(head: Head, model: ModelIdentity) -> Head:
    return replace(head, model=model, turn=None, turns=0, settings=PARTS)


def texts(store: MemoryStore) -> list[str]:
    return [turn.text for turn in store.history("x")]


def test_a_draft_is_no_damage_and_goes_with_its_session(
    store: MemoryStore, head: Head, other: ModelIdentity, old: Checkpoint, new: Checkpoint,
    model: ModelIdentity,
) -> None:  # fmt: skip
    store.save_draft(head, begun(head, other), new, [NewTurn("user", "the key", [7])])
    assert check_store(store.path).findings == []
    assert sorted(s.name for s in store.space().sessions) == ["draft of x", "x"]
    store.create("y", model, checkpoint=old, turns=[], settings={})
    assert store.prune(Retention(max_bytes=1)).sessions == ["x"]
    assert store.draft(head) is None and check_store(store.path).findings == []
    assert (store.stats().sessions, store.stats().turns) == (1, 0)


def test_a_draft_is_kept_and_shows_nowhere(
    store: MemoryStore, head: Head, other: ModelIdentity, old: Checkpoint, new: Checkpoint,
    open_store: Opens, same: Same,
) -> None:  # fmt: skip
    assert store.draft(head) is None
    half = replace(new, extra={"of": 1})
    made = store.save_draft(head, begun(head, other), half, [NewTurn("user", "the key", [7])])
    made = store.save_draft(head, made, half, [])
    again = open_store()
    assert again.draft(head) == made and same(again.load(made), half)
    assert (made.model, made.settings, made.turns) == (other, PARTS, 1)
    assert [info.name for info in again.sessions()] == ["x"] and again.stats().sessions == 1
    assert again.head("x") == head == again.ledger("x") and same(again.load(head), old)
    assert texts(again) == ["the brass key", "the heron"]
    again.discard_draft(head)
    assert store.draft(head) is None and store.stats().turns == 2
    with pytest.raises(UnknownSessionError, match="was deleted"):
        store.save_draft(head, made, half, [])


@pytest.mark.parametrize("saved", [True, False], ids=["after a draft", "at once"])
def test_a_new_state_takes_the_place_of_the_old_one(
    store: MemoryStore, head: Head, other: ModelIdentity, new: Checkpoint, open_store: Opens,
    same: Same, saved: bool,
) -> None:  # fmt: skip
    made, turns = begun(head, other), [NewTurn("user", "the key", [7]), NewTurn("user", "a", [8])]
    if saved:
        made, turns = store.save_draft(head, made, new, turns[:1]), turns[1:]
    now = store.adopt(head, made, new, turns)
    again = open_store()
    assert again.head("x") == now and same(again.load(now), new)
    assert (now.session_id, now.generation) == (head.session_id, head.generation + 1)
    assert now.model == other and now.settings == {"system": None}
    assert texts(again) == ["the key", "a"] and again.draft(now) is None
    stats = again.stats()
    assert (stats.turns, stats.checkpoints, stats.spans) == (2, 1, 2)
    assert [m.number for m in again.search(now, "key")] == [1]
    with pytest.raises(ConflictError, match="moved on"):
        again.commit(head, new, [])
    (info,) = again.sessions()
    assert info.model == "other"


def test_turns_may_stay_the_rows_that_they_are(
    store: MemoryStore, head: Head, model: ModelIdentity, new: Checkpoint
) -> None:
    first, second = (turn.id for turn in store.history(head))
    made = store.save_draft(head, replace(begun(head, model), turn=first, turns=1), new, [])
    made = replace(made, turn=second, turns=2)
    now = store.adopt(head, made, new, [])
    assert [turn.id for turn in store.history(now)] == [first, second]


def test_what_fails_on_the_way_leaves_the_old_state(
    store: MemoryStore, path: Path, head: Head, other: ModelIdentity, old: Checkpoint,
    new: Checkpoint, same: Same,
) -> None:  # fmt: skip
    made = store.save_draft(head, begun(head, other), new, [NewTurn("user", "the key", [7])])
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "create trigger late before delete on checkpoints begin select raise(abort, 'no'); end"
        )
    with pytest.raises(StoreError, match="no"):
        store.adopt(head, made, new, [NewTurn("user", "a", [8])])
    assert store.head("x") == head and same(store.load(head), old)
    assert store.draft(head) == made and texts(store) == ["the brass key", "the heron"]


def test_who_comes_late_is_told(
    store: MemoryStore, head: Head, other: ModelIdentity, old: Checkpoint, new: Checkpoint
) -> None:
    made = store.save_draft(head, begun(head, other), new, [])
    newer = store.save_draft(head, made, new, [])
    with pytest.raises(ConflictError):
        store.adopt(head, made, new, [])
    with pytest.raises(ConflictError):
        store.save_draft(head, begun(head, other), new, [])  # there is one
    later = store.commit(head, old, [])
    with pytest.raises(ConflictError, match="'x' has moved on"):
        store.adopt(head, newer, new, [])
    store.delete("x")
    for act in (lambda: store.adopt(later, newer, new, []),
                lambda: store.save_draft(later, begun(later, other), new, [])):  # fmt: skip
        with pytest.raises(UnknownSessionError, match="'x' was deleted"):
            act()
    stats = store.stats()
    assert (stats.turns, stats.checkpoints, stats.spans) == (0, 0, 0)


def test_a_span_that_is_made_anew_mends_what_is_there(
    store: MemoryStore, path: Path, head: Head, model: ModelIdentity, old: Checkpoint,
    raw_span: Callable[..., Span], checkpoint_of: Callable[..., Checkpoint], open_store: Opens,
    same: Same,
) -> None:  # fmt: skip
    store.fork(head, "y", old)
    with closing(sqlite3.connect(path)) as db:
        db.execute("update span_layers set data = zeroblob(length(data)) where layer = 1")
        db.execute("update spans set bytes = bytes + 1 where id = 2")
        db.commit()
    again = open_store()
    for name in ("x", "y"):
        with pytest.raises(DamageError):
            again.load(again.head(name))  # type: ignore[arg-type]
    written = again.bytes_written
    anew = checkpoint_of([raw_span(0, 12), raw_span(12, 20, seed=5)])
    again.adopt(head, replace(head, turn=None, turns=0), anew, [])
    assert again.bytes_written > written + old.entries[0].span.nbytes
    for name in ("x", "y"):
        assert same(open_store().load(again.head(name)), old)  # type: ignore[arg-type]
    assert again.stats().spans == 2


def test_a_store_from_before_drafts_is_read(
    store: MemoryStore, path: Path, head: Head, old: Checkpoint, new: Checkpoint, open_store: Opens,
    same: Same,
) -> None:  # fmt: skip
    store.close()
    with closing(sqlite3.connect(path)) as db:  # as m003 left it
        db.execute("drop index sessions_draft_of")
        db.execute("alter table sessions drop column draft_of")
        db.execute("delete from _sqlite_migrations where name = 'm004_drafts'")
        db.commit()
    again = open_store()
    assert again.head("x") == head and same(again.load(head), old)
    made = again.save_draft(head, begun(head, head.model), new, [])
    assert again.draft(head) == made
