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

from still_memory import words
from still_memory.errors import DamageError, InputError
from still_memory.records import NewTurn, TurnRecord, check_text, pack_ids, to_json, unpack_ids


def digest(key: bytes, purpose: bytes, *parts: bytes | str | int | None) -> bytes:
    """A keyed BLAKE2b of parts: of no use, without the store's key, for confirming a guess."""
    state = hashlib.blake2b(key=key, person=purpose, digest_size=32)
    for part in parts:
        if isinstance(part, str):
            part = str.__str__(part)  # what is read back is no subclass of it, such as an enum
        data = part if isinstance(part, bytes) else f"{type(part).__name__} {part}".encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()


def append(
    conn: sqlite3.Connection,
    key: bytes,
    tenant: int,
    parent: int | None,
    turns: Sequence[NewTurn],
    now: str,
) -> tuple[int | None, bytes, int]:
    """Save `turns` after `parent`: the last turn's id and digest, and the bytes written.

    DamageError if `parent` is no turn of the tenant's.
    """
    above = turn_digest(conn, tenant, parent)
    written = 0
    for turn in turns:
        row = _row(turn, now)
        above = digest(key, b"still turn", above, *row)
        cursor = conn.execute(
            "insert into turns (tenant, parent, role, created, usage, tokens, text, digest)"
            " values (?, ?, ?, ?, ?, ?, ?, ?)",
            (tenant, parent, *row, above),
        )
        parent = cursor.lastrowid
        assert parent is not None
        words.add(conn, parent, turn.text)
        written += sum(len(part if isinstance(part, bytes) else part.encode()) for part in row)
    return parent, above, written


def turn_digest(conn: sqlite3.Connection, tenant: int, turn: int | None) -> bytes:
    """What stands for the conversation up to `turn`. DamageError if the tenant has none such."""
    if turn is None:
        return b""
    query = "select digest from turns where id = ? and tenant = ?"
    row = conn.execute(query, (turn, tenant)).fetchone()
    if row is None or type(row[0]) is not bytes:
        raise missing(turn)
    return row[0]


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
    turns: list[TurnRecord] = []
    for row in rows:
        identity, named, stored, *rest = row
        above = digest(key, b"still turn", above, *rest)
        if named != parent or stored != above:
            raise DamageError(
                f"turn {identity} is damaged or one before it is missing; restore the store "
                "from a copy"
            )
        parent = identity
        turns.append(_record(len(turns) + 1, identity, named, *rest))
    if parent != last:
        raise missing(last)
    return turns


def turn_exists(conn: sqlite3.Connection, tenant: int, turn: int) -> bool:
    query = "select 1 from turns where id = ? and tenant = ?"
    return conn.execute(query, (turn, tenant)).fetchone() is not None


def missing(turn: int | None) -> DamageError:
    return DamageError(f"the store lacks turn {turn}; restore it from a copy")


def way(conn: sqlite3.Connection, last: int | None) -> set[int]:
    """The ids of the turns that lead to `last`, and its own. Reads no text."""
    rows = conn.execute(
        "with recursive path (id) as (select ?1 where ?1 not null"
        " union select parent from path join turns using (id) where parent not null)"
        " select id from path",
        (last,),
    )
    return {row[0] for row in rows}


def read_one(conn: sqlite3.Connection, key: bytes, turn: int, number: int) -> TurnRecord:
    """A turn, checked against its digest and that of the one before it."""
    row = conn.execute(
        "select t.parent, p.digest, t.digest, t.role, t.created, t.usage, t.tokens, t.text"
        " from turns t left join turns p on p.id = t.parent where t.id = ?",
        (turn,),
    ).fetchone()
    if row is None:
        raise missing(turn)
    parent, above, stored, *rest = row
    if digest(key, b"still turn", above or b"", *rest) != stored:
        raise DamageError(f"turn {turn} is damaged; restore the store from a copy")
    return _record(number, turn, parent, *rest)


def drop(
    conn: sqlite3.Connection, last: int | None, most: int | None = None
) -> list[tuple[int, str]]:
    """Delete the turns that lead to `last` and to nothing else; their ids and texts.

    With `most` no more than so many, the last ones.
    """
    dropped: list[tuple[int, str]] = []
    while last is not None and (most is None or len(dropped) < most):
        row = conn.execute(
            "delete from turns where id = ?1"
            " and not exists (select 1 from turns child where child.parent = ?1)"
            " and not exists (select 1 from checkpoints where turn = ?1) returning parent, text",
            (last,),
        ).fetchone()
        if row is None:
            break
        dropped.append((last, row[1]))
        last = row[0]
    return dropped


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
    number: int,
    identity: int,
    parent: int | None,
    role: str,
    created: str,
    usage: str,
    ids: bytes,
    text: str,
) -> TurnRecord:
    known: dict[str, JsonValue] = json.loads(usage)
    when = datetime.fromisoformat(created)
    return TurnRecord(role, text, unpack_ids(ids), when, number, identity, parent, known)
