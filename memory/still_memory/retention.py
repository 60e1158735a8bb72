"""What may stay in a store, and so what goes: decided here, from numbers, and deleted elsewhere.

What goes first is the oldest. A state that is not a session's newest goes before any session; a
session goes as a whole, with its text, and the one that was used last stays. A plan is made in
one moment of the store and names what would be gone and what that frees.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Literal

from still_memory.errors import InputError
from still_memory.vault import Vault


@dataclass(frozen=True)
class Retention:
    """The limits of a store. None is no limit. InputError for one that means nothing.

    keep_checkpoints: newest checkpoints that each session keeps.
    older_than: a session without a turn for that long is deleted, with its text.
    max_bytes: of the file. Above it older checkpoints go, and then whole sessions, those first
        that were not used for longest; never the one that was used last.
    """

    keep_checkpoints: int | None = None
    older_than: timedelta | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise InputError("keep_checkpoints must be at least 1: the head is a checkpoint")
        if self.older_than is not None and self.older_than < timedelta(0):
            raise InputError("older_than must not be negative; give an age such as 30 days")
        if self.max_bytes is not None and self.max_bytes < 0:
            raise InputError("max_bytes must not be negative; give a size such as 2_000_000_000")


@dataclass(frozen=True)
class Drop:
    """Checkpoints of a session that go, or the session as a whole."""

    session: str
    whole: bool
    why: Literal["checkpoints", "age", "size"]
    checkpoints: int
    turns: int  # that nothing else leads to
    bytes: int  # about: of spans, text and states that nothing else holds
    session_id: int
    updated: str  # as the row has it: with another the session was used since
    generations: tuple[int, ...]  # of the checkpoints
    tenant: str


def plan(
    conn: sqlite3.Connection,
    vault: Vault,
    retention: Retention,
    now: datetime,
    tenant: int | None = None,
    slack: float = 1.0,
) -> list[Drop]:
    """What goes, in order. Reads no tensor. Deletes nothing.

    tenant: whose sessions may go, or None for everyone's.
    slack: how much more than its rows' bytes a drop is taken to free, against `max_bytes`.
    """
    gone = _Gone(conn, vault)
    drops: list[Drop] = []
    if retention.keep_checkpoints is not None:
        for row, older in _older(conn, tenant, retention.keep_checkpoints):
            drops.append(gone.drop(row, older, "checkpoints"))
    if retention.older_than is not None:
        before = (now - retention.older_than).isoformat()
        for row in _sessions(conn, tenant):
            if row[2] < before:
                drops.append(gone.drop(row, None, "age"))
    if retention.max_bytes is not None:
        over = _used(conn) - retention.max_bytes - slack * sum(drop.bytes for drop in drops)
        for row, some in _for_size(conn, tenant):
            if over <= 0:
                break
            drop = gone.drop(row, some, "size")
            if drop.checkpoints:
                drops.append(drop)
                over -= slack * drop.bytes
    return [drop for drop in drops if drop.checkpoints or drop.whole]


_Session = tuple[int, str, str, str]  # row, name, updated, tenant
_WHOSE = "sessions s join tenants n on n.id = s.tenant and (?1 is null or n.id = ?1)"


def _sessions(conn: sqlite3.Connection, tenant: int | None) -> list[_Session]:
    """Those not used for longest first. A draft goes with the session whose place it is to take."""
    return conn.execute(
        f"select s.id, s.name, updated, n.name from {_WHOSE} where draft_of is null"
        " order by updated, s.id",
        (tenant,),
    ).fetchall()


def _older(
    conn: sqlite3.Connection, tenant: int | None, keep: int
) -> Iterator[tuple[_Session, list[int]]]:
    """The checkpoints of each session before its newest `keep`."""
    rows = conn.execute(
        f"select s.id, s.name, s.updated, n.name, c.id from {_WHOSE} join checkpoints c"
        " on c.session = s.id and c.generation <= s.generation - ?2"
        " order by s.updated, s.id, c.generation",
        (tenant, keep),
    ).fetchall()
    for session, some in groupby(rows, key=lambda row: row[:4]):
        yield session, [row[4] for row in some]


def _for_size(
    conn: sqlite3.Connection, tenant: int | None
) -> Iterator[tuple[_Session, list[int] | None]]:
    yield from _older(conn, tenant, 1)
    for session in _sessions(conn, tenant)[:-1]:
        yield session, None


def _used(conn: sqlite3.Connection) -> int:
    """Bytes of the file that are not free."""
    pages, free, size = (
        conn.execute(f"pragma {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


class _Gone:
    """What is dropped so far, so that what it shared is free when its last holder goes."""

    def __init__(self, conn: sqlite3.Connection, vault: Vault) -> None:
        self._conn, self._vault = conn, vault
        self._checkpoints: set[int] = set()
        self._sessions: set[int] = set()
        self._spans: Counter[int] = Counter()  # references that are dropped
        self._turns: Counter[int] = Counter()  # holders of a turn that are dropped

    def drop(
        self,
        session: _Session,
        some: Iterable[int] | None,
        why: Literal["checkpoints", "age", "size"],
    ) -> Drop:
        """The checkpoints `some` of a session, or all of them and the session; counted once."""
        identity, stored, updated, owner = session
        tenant, name = self._vault.names(owner, stored)
        rows = self._conn.execute(
            "select id, generation, turn, length(cast(entries as blob))"
            " + length(cast(extra as blob)) from checkpoints where session = ? order by generation",
            (identity,),
        ).fetchall()
        wanted = {row[0] for row in rows} if some is None else set(some)
        wanted -= self._checkpoints
        whole = some is None and identity not in self._sessions
        if whole:
            self._sessions.add(identity)
        self._checkpoints |= wanted
        size, turns, generations = 0, 0, []
        for checkpoint, generation, turn, own in rows:
            if checkpoint in wanted:
                many, freed = self._unhold(turn)
                turns += many
                size += own + freed + self._unrefer(checkpoint)
                generations.append(generation)
        return Drop(
            name, whole, why, len(generations), turns, size, identity, updated,
            tuple(generations), tenant,
        )  # fmt: skip

    def _unrefer(self, checkpoint: int) -> int:
        """The bytes of the spans that only dropped checkpoints hold, now with this one."""
        size = 0
        for span, held, own in self._conn.execute(
            "select s.id, s.bytes, (select count(*) from checkpoint_spans x where x.span = s.id)"
            " from checkpoint_spans r join spans s on s.id = r.span where r.checkpoint = ?",
            (checkpoint,),
        ):
            self._spans[span] += 1
            size += held if self._spans[span] == own else 0
        return size

    def _unhold(self, turn: int | None) -> tuple[int, int]:
        """Turns, and their bytes, that nothing leads to once this one has a holder less."""
        turns = size = 0
        while turn is not None:
            self._turns[turn] += 1
            row = self._conn.execute(
                "select parent, length(cast(text as blob)) + length(tokens)"
                " + length(cast(usage as blob)),"
                " (select count(*) from turns child where child.parent = t.id)"
                " + (select count(*) from checkpoints where turn = t.id)"
                " from turns t where id = ?",
                (turn,),
            ).fetchone()
            if row is None or self._turns[turn] < row[2]:
                break
            turns, size, turn = turns + 1, size + row[1], row[0]
        return turns, size
