"""Conversations that live as long as their agent: the verbs of a store, without a file."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

import torch
from pydantic import JsonValue

from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, UnknownSessionError
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn, SessionInfo, TurnRecord, check_session_name


class Store(Protocol):
    """What a session needs of a store. `still_memory.MemoryStore` is the lasting one."""

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

    def head(self, session: str) -> Head | None: ...

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint: ...

    def history(self, session: str) -> list[TurnRecord]: ...

    def sessions(self) -> list[SessionInfo]: ...

    def delete(self, session: str) -> None: ...

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

    def __init__(self) -> None:
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
            if session in self._sessions:
                raise ConflictError(f"session {session!r} exists already: resume it from head()")
            now = datetime.now(UTC)
            self._ids += 1
            head = Head(session, self._ids, 0, 0, None, 0, 0, model, dict(settings))
            self._sessions[session] = _Held(head, checkpoint, now, now)
            return self._advance(head, checkpoint, turns)

    def commit(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        with self._lock:
            held = self._sessions.get(head.session)
            if held is None or held.head != head:
                raise ConflictError(
                    f"session {head.session!r} was changed or deleted by another writer: open it "
                    "again, and repeat the turn there"
                )
            return self._advance(head, checkpoint, turns)

    def head(self, session: str) -> Head | None:
        check_session_name(session)
        held = self._sessions.get(session)
        return None if held is None else held.head

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint:
        return self._existing(head.session).checkpoint  # it has never left its device

    def history(self, session: str) -> list[TurnRecord]:
        return list(self._existing(session).turns)

    def sessions(self) -> list[SessionInfo]:
        newest = sorted(self._sessions.values(), key=lambda held: held.updated, reverse=True)
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

    def delete(self, session: str) -> None:
        with self._lock:
            self._existing(session)
            del self._sessions[session]

    def close(self) -> None:
        self._sessions.clear()

    def _advance(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        held = self._sessions[head.session]
        held.checkpoint, held.updated = checkpoint, datetime.now(UTC)
        for turn in turns:
            parent, number = head.turn, head.turns + 1
            record = TurnRecord(
                turn.role, turn.text, list(turn.tokens), turn.created or held.updated, number,
                parent, dict(turn.usage),
            )  # fmt: skip
            held.turns.append(record)
            head = replace(head, turn=number, turns=number)
        generation = head.generation + 1
        held.head = replace(
            head, generation=generation, checkpoint=generation, tokens=checkpoint.length
        )
        return held.head

    def _existing(self, session: str) -> _Held:
        if (held := self._sessions.get(session)) is None:
            raise UnknownSessionError(
                f"there is no session {session!r}; agent.session({session!r}) begins one"
            )
        return held
