"""Conversations that live as long as their agent: the verbs of a store, without a file."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import Protocol

import torch
from pydantic import JsonValue

from still_memory import taint, words
from still_memory.checkpoint import Checkpoint
from still_memory.codec import EXACT, check_codec
from still_memory.drafts_table import name_of
from still_memory.errors import ConflictError, TaintedError, UnknownSessionError, deleted
from still_memory.identity import ModelIdentity
from still_memory.recognition import THREAD, Known, thread_of
from still_memory.records import (
    MAX_SESSION_NAME,
    Head,
    Match,
    NewTurn,
    SessionInfo,
    TurnRecord,
    check_session_name,
)
from still_memory.taint import Deleted, Forks, Taint


class Store(Protocol):
    """What a session needs of a store. `still_memory.MemoryStore` is the lasting one.

    codec: what the spans of new states are settled in.
    """

    codec: str

    def create(
        self,
        session: str,
        model: ModelIdentity,
        *,
        checkpoint: Checkpoint,
        turns: Sequence[NewTurn],
        settings: Mapping[str, JsonValue],
    ) -> Head: ...

    def commit(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head: ...

    def fork(
        self, head: Head, name: str, checkpoint: Checkpoint, thread: str | None = None
    ) -> Head: ...

    def recognise(
        self, told: Sequence[tuple[str, str]], thread: str, model: ModelIdentity
    ) -> Known | None: ...

    def branches(self, thread: str) -> list[str]: ...

    def head(self, session: str) -> Head | None: ...

    def kept(self, head: Head) -> list[Head]: ...

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint: ...

    def history(self, session: str | Head) -> list[TurnRecord]: ...

    def search(self, head: Head, query: str, limit: int = 20) -> list[Match]: ...

    def sessions(self, limit: int | None = None, after: str | None = None) -> list[SessionInfo]: ...

    def ledger(self, session: str) -> Head: ...

    def draft(self, head: Head) -> Head | None: ...

    def save_draft(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head: ...

    def discard_draft(self, head: Head) -> None: ...

    def adopt(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head: ...

    def tainted(self, turns: Collection[int]) -> list[Taint]: ...

    def forget(self, turns: Collection[int], made: Sequence[tuple[Head, Head]]) -> list[Head]: ...

    def scrub(self) -> None: ...

    def delete(self, session: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted: ...

    def delete_thread(
        self, thread: str, *, erase: bool = False, forks: Forks = "keep"
    ) -> Deleted: ...

    def close(self) -> None: ...


@dataclass
class _Held:
    head: Head
    checkpoint: Checkpoint
    created: datetime
    updated: datetime
    turns: list[TurnRecord] = field(default_factory=list)


class EphemeralStore:
    """Keeps each session's newest checkpoint and its turns, in memory."""

    def __init__(self, codec: str = EXACT) -> None:
        self.codec = check_codec(codec)
        self._sessions: dict[str, _Held] = {}
        self._lock = threading.Lock()
        self._ids = 0

    def create(
        self,
        session: str,
        model: ModelIdentity,
        *,
        checkpoint: Checkpoint,
        turns: Sequence[NewTurn],
        settings: Mapping[str, JsonValue],
    ) -> Head:
        check_session_name(session)
        with self._lock:
            start = Head(session, 0, 0, 0, None, 0, 0, model, dict(settings))
            return self._advance(self._begin(start, [], checkpoint), checkpoint, turns)

    def fork(
        self, head: Head, name: str, checkpoint: Checkpoint, thread: str | None = None
    ) -> Head:
        check_session_name(name)
        with self._lock:
            shared = list(map(_copy, self._at(head).turns[: head.turns]))
            told = {key: deepcopy(v) for key, v in head.settings.items() if key != THREAD}
            told |= {} if thread is None else {THREAD: thread}
            start = replace(head, session=name, generation=0, settings=told)
            return self._advance(self._begin(start, shared, checkpoint), checkpoint, [])

    def recognise(
        self, told: Sequence[tuple[str, str]], thread: str, model: ModelIdentity
    ) -> Known | None:
        best: Known | None = None
        for held in sorted(self._of_thread(thread), key=lambda held: held.updated):
            pairs = zip(told, ((t.role, t.text) for t in held.turns), strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            stands = same == held.head.turns
            if same and (best is None or (same, stands) >= (best.turns, best.stands)):
                best = Known(held.head.session, same, held.turns[same - 1].id, stands)
        return best

    def branches(self, thread: str) -> list[str]:
        return [held.head.session for held in self._of_thread(thread)]

    def commit(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        with self._lock:
            del self._at(head).turns[head.turns :]  # of what a rewind leaves behind
            return self._advance(head, checkpoint, turns)

    def head(self, session: str) -> Head | None:
        check_session_name(session)
        held = self._sessions.get(session)
        return None if held is None else held.head

    def kept(self, head: Head) -> list[Head]:
        newest = self._at(head).head
        return [newest] if newest.turns <= head.turns else []

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint:
        return self._at(head).checkpoint  # it has never left its device

    def history(self, session: str | Head) -> list[TurnRecord]:
        if isinstance(session, Head):
            return list(map(_copy, self._at(session).turns[: session.turns]))
        return list(map(_copy, self._existing(session).turns))

    def search(self, head: Head, query: str, limit: int = 20) -> list[Match]:
        turns = self._at(head).turns[: head.turns]
        found = words.find_among(((t.id, t.text) for t in turns), query, limit)
        return [
            Match(number, turns[number - 1].role, turns[number - 1].created, excerpt)
            for number, _, excerpt in found
        ]

    def sessions(self, limit: int | None = None, after: str | None = None) -> list[SessionInfo]:
        newest = sorted(self._named(), key=lambda held: held.updated, reverse=True)
        names = [held.head.session for held in newest]
        if after is not None and after not in names:
            raise UnknownSessionError(f"there is no session {after!r} to go on after")
        begin = 0 if after is None else names.index(after) + 1
        newest = newest[begin:] if limit is None else newest[begin : begin + limit]
        return [
            SessionInfo(
                name=held.head.session,
                turns=held.head.turns,
                tokens=held.head.tokens,
                slots=held.checkpoint.slots,
                bytes=sum(s.nbytes for s in {e.span for e in held.checkpoint.entries}),
                created=held.created,
                updated=held.updated,
                model=held.head.model.name,
            )
            for held in newest
        ]

    def ledger(self, session: str) -> Head:
        return self._existing(session).head

    def draft(self, head: Head) -> Head | None:
        held = self._sessions.get(name_of(head.session_id))
        return None if held is None else held.head

    def save_draft(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head:
        with self._lock:
            way = self._way(head, made)
            if made.session_id == head.session_id:
                start = replace(made, session=name_of(head.session_id), generation=0)
                made = self._begin(start, way, checkpoint)
            self._at(made).turns = way
            return self._advance(made, checkpoint, turns)

    def discard_draft(self, head: Head) -> None:
        with self._lock:
            self._sessions.pop(name_of(head.session_id), None)

    def adopt(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head:
        with self._lock:
            held, way = self._at(head), self._way(head, made)
            held.turns = way
            start = replace(head, model=made.model, turn=made.turn, turns=made.turns)
            self._sessions.pop(name_of(head.session_id), None)
            return self._advance(start, checkpoint, turns)

    def tainted(self, turns: Collection[int]) -> list[Taint]:
        everyone = self._named()
        said = {_said(t) for held in everyone for t in held.turns if t.id in turns}
        found = []
        for held in everyone:
            forgotten = tuple(t.number for t in held.turns if _said(t) in said)
            if forgotten:
                numbers = range(forgotten[0] + 1, held.head.turns + 1)
                later = tuple(n for n in numbers if n not in forgotten)
                quoting = taint.quotes(held.turns, forgotten, later)
                head = held.head
                found.append(
                    Taint(head.session, head.session_id, head.generation, forgotten, later, quoting)
                )
        return found

    def forget(self, turns: Collection[int], made: Sequence[tuple[Head, Head]]) -> list[Head]:
        with self._lock:
            taint.require_same(self.tainted(turns), [head for head, _ in made])
            heads = []
            for head, draft in made:
                held, new = self._at(head), self._at(draft)
                held.turns = new.turns
                start = replace(head, model=draft.model, turn=draft.turn, turns=draft.turns)
                heads.append(self._advance(start, replace(new.checkpoint, extra={}), []))
                del self._sessions[draft.session]
            return heads

    def scrub(self) -> None:
        """There is no file."""

    def delete(self, session: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted:
        with self._lock:
            self._existing(session)
            return self._delete([session], forks)

    def delete_thread(self, thread: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted:
        with self._lock:
            return self._delete(self.branches(thread), forks)

    def _delete(self, names: Sequence[str], forks: Forks) -> Deleted:
        taint.check_choice(forks, Forks, "forks")
        others = self.tainted([t.id for name in names for t in self._existing(name).turns])
        shared = [t for t in others if t.session not in names]
        if shared and forks == "refuse":
            raise TaintedError(taint.told_shared(names[0], shared), shared)
        gone = [*names, *(t.session for t in shared if forks == "delete")]
        ids = [self._sessions.pop(name).head.session_id for name in gone]
        for identity in ids:
            self._sessions.pop(name_of(identity), None)
        return Deleted(tuple(gone), tuple(ids), tuple(shared) if forks == "keep" else ())

    def close(self) -> None:
        self._sessions.clear()

    def _advance(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        held = self._sessions[head.session]
        held.checkpoint, held.updated = checkpoint, datetime.now(UTC)
        for turn in turns:
            parent, number = head.turn, head.turns + 1
            self._ids += 1
            record = TurnRecord(
                turn.role, turn.text, list(turn.tokens), turn.created or held.updated, number,
                self._ids, parent, deepcopy(dict(turn.usage)),
            )  # fmt: skip
            held.turns.append(record)
            head = replace(head, turn=self._ids, turns=number)
        generation = head.generation + 1
        held.head = replace(
            head, generation=generation, checkpoint=generation, tokens=checkpoint.length
        )
        return held.head

    def _way(self, head: Head, made: Head) -> list[TurnRecord]:
        """The turns up to `made`'s: the session's own, or those of its draft."""
        for held in (self._at(head), self._at(made)):
            turns = held.turns[: made.turns]
            if len(turns) == made.turns and (not turns or turns[-1].id == made.turn):
                return list(map(_copy, turns))
        raise deleted(head.session)

    def _begin(self, start: Head, turns: list[TurnRecord], checkpoint: Checkpoint) -> Head:
        name = start.session
        if name in self._sessions:
            raise ConflictError(
                f"session {name!r} exists already: choose another name, or resume it"
            )
        now = datetime.now(UTC)
        self._ids += 1
        head = replace(start, session_id=self._ids)
        self._sessions[name] = _Held(head, checkpoint, now, now, turns)
        return head

    def _of_thread(self, thread: str) -> list[_Held]:
        """A conversation's sessions, oldest first."""
        return [
            held
            for held in self._named()
            if thread == (held.head.session if (t := thread_of(held.head.settings)) is None else t)
        ]

    def _named(self) -> list[_Held]:
        """The sessions that are no drafts, as they are now; others may be begun meanwhile."""
        every = list(self._sessions.items())
        return [held for name, held in every if len(name) <= MAX_SESSION_NAME]

    def _at(self, head: Head) -> _Held:
        """The session, if it still stands at `head`'s generation."""
        held = self._sessions.get(head.session)
        if held is None or held.head.session_id != head.session_id:
            raise deleted(head.session)
        if held.head.generation != head.generation:
            raise ConflictError(
                f"session {head.session!r} has moved on from generation {head.generation}, by "
                "another writer: open it again, and repeat the turn there"
            )
        return held

    def _existing(self, session: str) -> _Held:
        if (held := self._sessions.get(session)) is None:
            raise UnknownSessionError(
                f"there is no session {session!r}; agent.session({session!r}) begins one"
            )
        return held


def _said(turn: TurnRecord) -> tuple[object, ...]:
    """What is the same in a turn's copies."""
    return turn.role, turn.created, turn.text


def _copy(turn: TurnRecord) -> TurnRecord:
    """A record that its reader may change: the store's own stays as it was said."""
    return replace(turn, tokens=list(turn.tokens), usage=deepcopy(turn.usage))
