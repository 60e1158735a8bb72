"""The ledger: the text and token ids of every turn, from which any state can be rebuilt.

A turn names its parent, so a conversation is a path to a root. Its digest covers its parent's,
so that the digest of the last turn, which the checkpoint covers, stands for all of them.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import JsonValue

from still_memory.errors import DamageError, InputError
from still_memory.records import NewTurn, TurnRecord, check_text, pack_ids, to_json, unpack_ids


def digest(key: bytes, purpose: bytes, *parts: bytes | str | int | None) -> bytes:
    """A keyed BLAKE2b of parts: of no use, without the store's key, for confirming a guess."""
    state = hashlib.blake2b(key=key, person=purpose, digest_size=32)
    for part in parts:
        data = part if isinstance(part, bytes) else f"{type(part).__name__} {part}".encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()


def append(
    conn: sqlite3.Connection, key: bytes, parent: int | None, turns: Sequence[NewTurn], now: str
) -> tuple[int | None, bytes, int]:
    """Save `turns` after `parent`: the last turn's id and digest, and the bytes written."""
    above = turn_digest(conn, parent)
    written = 0
    for turn in turns:
        row = _row(turn, now)
        above = digest(key, b"still turn", above, *row)
        cursor = conn.execute(
            "insert into turns (parent, role, created, usage, tokens, text, digest)"
            " values (?, ?, ?, ?, ?, ?, ?)",
            (parent, *row, above),
        )
        parent = cursor.lastrowid
        written += sum(len(part if isinstance(part, bytes) else part.encode()) for part in row)
    return parent, above, written


def turn_digest(conn: sqlite3.Connection, turn: int | None) -> bytes:
    """What stands for the conversation up to `turn`."""
    if turn is None:
        return b""
    row = conn.execute("select digest from turns where id = ?", (turn,)).fetchone()
    if row is None:
        raise DamageError(f"the store lacks turn {turn}; restore it from a copy")
    return bytes(row[0])


def read(conn: sqlite3.Connection, key: bytes, last: int | None) -> list[TurnRecord]:
    """The turns that lead to `last`, oldest first, each checked against its digest."""
    rows = conn.execute(
        "with recursive path (id, parent) as ("
        "  select id, parent from turns where id = ?"
        "  union select t.id, t.parent from path join turns t on t.id = path.parent)"
        " select t.id, t.parent, t.digest, t.role, t.created, t.usage, t.tokens, t.text"
        " from path join turns t using (id) order by t.id",
        (last,),
    ).fetchall()
    above, parent = b"", None
    turns = []
    for row in rows:
        identity, named, stored, *rest = row
        above = digest(key, b"still turn", above, *rest)
        if named != parent or stored != above:
            raise DamageError(
                f"turn {identity} is damaged or one before it is missing; restore the store "
                "from a copy"
            )
        parent = identity
        turns.append(_record(identity, named, *rest))
    if parent != last:
        raise DamageError(f"the store lacks turn {last}; restore it from a copy")
    return turns


def drop(conn: sqlite3.Connection, last: int | None) -> None:
    """Delete the turns that lead to `last` and to nothing else."""
    while last is not None:
        row = conn.execute(
            "delete from turns where id = ?1"
            " and not exists (select 1 from turns child where child.parent = ?1)"
            " and not exists (select 1 from checkpoints where turn = ?1) returning parent",
            (last,),
        ).fetchone()
        last = None if row is None else row[0]


def _row(turn: NewTurn, now: str) -> tuple[str, str, str, bytes, str]:
    """Role, created, usage, tokens and text as they stand in the table."""
    created = now
    if turn.created is not None:
        if turn.created.tzinfo is None:
            raise InputError("a turn's time needs a time zone: use datetime.now(UTC)")
        created = turn.created.astimezone(UTC).isoformat()
    role, text = check_text(turn.role, "a turn's role"), check_text(turn.text, "a turn's text")
    return role, created, to_json(dict(turn.usage), "a turn's usage"), pack_ids(turn.tokens), text


def _record(
    identity: int, parent: int | None, role: str, created: str, usage: str, ids: bytes, text: str
) -> TurnRecord:
    known: dict[str, JsonValue] = json.loads(usage)
    return TurnRecord(
        role, text, unpack_ids(ids), datetime.fromisoformat(created), identity, parent, known
    )
