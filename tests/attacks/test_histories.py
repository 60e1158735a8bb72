"""Random histories of the store's verbs against a plain model of it, kept in lists."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.errors import ConflictError, InputError, UnknownSessionError
from still_memory.portable import Portable
from still_memory.records import Head, NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, check_file, compact_span, mark, raw_span

NAMES = st.sampled_from(["a", "b", "'; drop table turns;--", "ä/../b", "a "])
TEXTS = st.lists(st.sampled_from(["heron", "Key", "brass", "porto", "OR"]), max_size=4).map(
    " ".join
)
SEEDS = st.integers(0, 3)


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn of the model; two that say the same are two."""

    text: str
    parent: Turn | None

    @property
    def way(self) -> list[Turn]:
        return [*(self.parent.way if self.parent else []), self]


@dataclass
class Kept:
    """A checkpoint of the model."""

    turn: Turn | None
    mark: str
    spans: frozenset[tuple[object, ...]]
    tokens: int
    head: Head

    @property
    def way(self) -> list[Turn]:
        return self.turn.way if self.turn else []


@dataclass
class Session:
    kept: list[Kept] = field(default_factory=list)  # oldest first

    @property
    def now(self) -> Kept:
        return self.kept[-1]


_SPANS: dict[tuple[object, ...], Span] = {}


def span(kind: str, start: int, end: int, seed: int) -> Span:
    """Made once, so that a state may hold the very object of another, or an equal one."""
    key = kind, start, end, seed
    make = raw_span(start, end, seed) if kind == "raw" else compact_span(start, end, 2, seed)
    return _SPANS.setdefault(key, make)


def state(seed: int, length: int) -> tuple[Checkpoint, frozenset[tuple[object, ...]]]:
    """Four pinned tokens, memory and a tail, and by which names its spans are known."""
    keys = [("raw", 0, 4, 0), ("compact", 4, length, seed), ("raw", length, length + 3, seed)]
    shares = ["pinned", "memory", "tail"]
    spans = [span(*key) for key in keys]
    entries = tuple(
        Entry(s, s.start, s.end, 4 * n, share)  # type: ignore[arg-type]
        for n, (s, share) in enumerate(zip(spans, shares, strict=True))
    )
    return Checkpoint(entries, length + 3, {"seed": seed}), frozenset(keys)


class Histories(RuleBasedStateMachine):
    """Every verb of the store, by two that have it open; and what it must show after each."""

    folder: ClassVar[Path]

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        self.keep, self.exports = keep, 0
        self.sessions: dict[str, Session] = {}
        self.stale: list[tuple[Head, bool]] = []  # heads that were left; whether by deletion
        self.stores = [self.open(), self.open()]

    def open(self) -> MemoryStore:
        path = self.folder / "s.db"
        return MemoryStore(path, keep_checkpoints=self.keep, synchronous="NORMAL")

    def saved(
        self,
        name: str,
        head: Head,
        turn: Turn | None,
        held: Checkpoint,
        spans: frozenset[tuple[object, ...]],
    ) -> None:
        session = self.sessions.setdefault(name, Session())
        if session.kept:
            self.stale.append((session.now.head, False))
        session.kept.append(Kept(turn, mark(held), spans, held.length, head))
        del session.kept[: -self.keep]

    def draw(self, data: st.DataObject) -> tuple[str, Session]:
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        return name, self.sessions[name]

    @rule(who=st.integers(0, 1))
    def reopen(self, who: int) -> None:
        self.stores[who].close()
        self.stores[who] = self.open()

    @rule(who=st.integers(0, 1), name=NAMES, texts=st.lists(TEXTS, max_size=2), seed=SEEDS)
    def create(self, who: int, name: str, texts: list[str], seed: int) -> None:
        held, spans = state(seed, 9)
        turns = [NewTurn("user", text, [len(text)]) for text in texts]
        make = self.stores[who].create
        if name in self.sessions:
            with pytest.raises(ConflictError):
                make(name, MODEL, checkpoint=held, turns=turns, settings={})
            return
        head = make(name, MODEL, checkpoint=held, turns=turns, settings={"n": name})
        turn = None
        for text in texts:
            turn = Turn(text, turn)
        self.saved(name, head, turn, held, spans)

    @precondition(lambda self: self.sessions)
    @rule(
        who=st.integers(0, 1), data=st.data(), texts=st.lists(TEXTS, max_size=3), seed=SEEDS,
        length=st.integers(6, 12),
    )  # fmt: skip
    def commit(
        self, who: int, data: st.DataObject, texts: list[str], seed: int, length: int
    ) -> None:
        name, session = self.draw(data)
        held, spans = state(seed, length)
        turns = [NewTurn("user", text, [len(text)]) for text in texts]
        head = self.stores[who].commit(session.now.head, held, turns)
        turn = session.now.turn
        for text in texts:
            turn = Turn(text, turn)
        self.saved(name, head, turn, held, spans)

    def past(self, data: st.DataObject, session: Session) -> tuple[Head, Turn | None]:
        """The head as it stands at one of the turns on its way."""
        way: list[Turn | None] = [None, *session.now.way]
        at = data.draw(st.integers(0, len(way) - 1))
        ids = [None, *(t.id for t in self.stores[0].history(session.now.head))]
        return replace(session.now.head, turn=ids[at], turns=at), way[at]

    @precondition(lambda self: self.sessions)
    @rule(who=st.integers(0, 1), data=st.data(), seed=SEEDS)
    def rewind(self, who: int, data: st.DataObject, seed: int) -> None:
        name, session = self.draw(data)
        head, turn = self.past(data, session)
        held, spans = state(seed, 7)
        self.saved(name, self.stores[who].commit(head, held, []), turn, held, spans)

    @precondition(lambda self: self.sessions)
    @rule(who=st.integers(0, 1), data=st.data(), new=NAMES, seed=SEEDS)
    def fork(self, who: int, data: st.DataObject, new: str, seed: int) -> None:
        head, turn = self.past(data, self.draw(data)[1])
        held, spans = state(seed, 7)
        if new in self.sessions:
            with pytest.raises(ConflictError):
                self.stores[who].fork(head, new, held)
        else:
            self.saved(new, self.stores[who].fork(head, new, held), turn, held, spans)

    @precondition(lambda self: self.sessions)
    @rule(who=st.integers(0, 1), data=st.data())
    def delete(self, who: int, data: st.DataObject) -> None:
        name, session = self.draw(data)
        self.stores[who].delete(name)
        gone = session.now.head.session_id
        self.stale = [(h, dead or h.session_id == gone) for h, dead in self.stale]
        self.stale += [(kept.head, True) for kept in session.kept]
        del self.sessions[name]
        with pytest.raises(UnknownSessionError):
            self.stores[1 - who].delete(name)

    @precondition(lambda self: self.sessions)
    @rule(who=st.integers(0, 1), data=st.data(), new=NAMES)
    def export_and_import(self, who: int, data: st.DataObject, new: str) -> None:
        name, session = self.draw(data)
        self.exports += 1
        path = self.folder / f"{self.exports}.still"
        Portable.of(self.stores[who], name).write(path)
        found = Portable.read(path)
        if new in self.sessions:
            with pytest.raises(ConflictError):
                found.save(self.stores[1 - who], new)
            return
        head = found.save(self.stores[1 - who], new)
        turn = None
        for told in session.now.way:  # copies: they share no turn with the origin
            turn = Turn(told.text, turn)
        self.saved(new, head, turn, found.checkpoint, session.now.spans)

    @precondition(lambda self: self.stale)
    @rule(who=st.integers(0, 1), data=st.data(), seed=SEEDS)
    def a_head_that_was_left_is_refused(self, who: int, data: st.DataObject, seed: int) -> None:
        head, dead = data.draw(st.sampled_from(self.stale))
        error = UnknownSessionError if dead else ConflictError
        held, _ = state(seed, 8)
        with pytest.raises(error):
            self.stores[who].commit(head, held, [NewTurn("user", "late", [1])])
        with pytest.raises(error):
            self.stores[who].fork(head, "late", held)

    @precondition(lambda self: self.sessions)
    @rule(who=st.integers(0, 1), data=st.data(), query=TEXTS, limit=st.integers(0, 5))
    def search(self, who: int, data: st.DataObject, query: str, limit: int) -> None:
        session = self.draw(data)[1]
        wanted = set(query.lower().split())
        if not wanted:
            with pytest.raises(InputError):
                self.stores[who].search(session.now.head, query, limit)
            return
        right = [
            (number, " ".join(turn.text.split()))
            for number, turn in enumerate(session.now.way, 1)
            if wanted <= set(turn.text.lower().split())
        ]
        found = self.stores[who].search(session.now.head, query, limit)
        assert [(m.number, m.excerpt) for m in found] == right[::-1][:limit]

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        if not hasattr(self, "stores"):
            return
        store = self.stores[1]
        listed = {i.name: (i.turns, i.tokens) for i in store.sessions()}
        assert listed == {n: (len(s.now.way), s.now.tokens) for n, s in self.sessions.items()}
        turns: set[Turn] = set()
        spans: set[tuple[object, ...]] = set()
        for name, session in self.sessions.items():
            head = store.head(name)
            assert head is not None and head == session.now.head
            history = store.history(name)
            assert [t.text for t in history] == [t.text for t in session.now.way]
            assert [t.number for t in history] == list(range(1, len(history) + 1))
            assert [t.parent for t in history] == [None, *(t.id for t in history)][: len(history)]
            for kept in session.kept:
                if kept.turn is None or kept.turn in session.now.way:
                    assert mark(store.load(kept.head)) == kept.mark
                turns |= set(kept.way)
                spans |= kept.spans
            reachable = [k for k in session.kept if k.turn is None or k.turn in session.now.way]
            assert [h.generation for h in store.kept(head)] == [
                k.head.generation for k in reachable[::-1]
            ]
        stats = store.stats()
        checkpoints = sum(len(s.kept) for s in self.sessions.values())
        assert (stats.turns, stats.spans) == (len(turns), len(spans))  # no more, no fewer
        assert (stats.sessions, stats.checkpoints) == (len(self.sessions), checkpoints)

    def teardown(self) -> None:
        if not hasattr(self, "stores"):
            return
        if not self.stores[0].encrypted:  # the words of what is there, no others
            with self.stores[0]._file.connection() as conn:
                conn.execute(
                    "insert into turn_words (turn_words, rank) values ('integrity-check', 1)"
                )
        for store in self.stores:
            store.close()
        check_file(self.folder / "s.db")


@pytest.mark.parametrize("key", ["", "ab" * 32], ids=["plain", "encrypted"])
def test_any_history_is_as_in_a_plain_model(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILL_AGENT_KEY", key)

    class Here(Histories):
        folder = tmp_path

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None,
            suppress_health_check=list(HealthCheck), derandomize=True,
        ),
    )  # fmt: skip
