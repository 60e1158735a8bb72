"""The ledger: the text and token ids of every turn, from which any state can be rebuilt.

A turn names its parent, so a conversation is a path to a root. Its digest covers its parent's,
so that the digest of the last turn, which the checkpoint covers, stands for all of them. Another
digest, `said`, is of roles and texts alone, up to it: two conversations that say the same have the
same one, so that a conversation can be found by what was said in it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import JsonValue

from still_memory import words
from still_memory.digests import digest
from still_memory.errors import DamageError, InputError
from still_memory.records import NewTurn, TurnRecord, check_text, pack_ids, to_json, unpack_ids
from still_memory.vault import Vault

_Row = tuple[str, str, str, bytes, str]  # role, created, usage, tokens, text


def append(
    conn: sqlite3.Connection,
    vault: Vault,
    tenant: int,
    parent: int | None,
    turns: Sequence[NewTurn],
    now: str,
) -> tuple[int | None, bytes, int]:
    """Save `turns` after `parent`: the last turn's id and digest, and the bytes written.

    DamageError if `parent` is no turn of the tenant's.
    """
    above = turn_digest(conn, tenant, parent)
    said = said_up_to(conn, parent)
    written = 0
    for turn in turns:
        plain = _row(turn, now)
        row = _sealed(vault, above, plain)
        said = None if said is None else said_after(vault, said, plain[0], plain[-1])
        above = mark(vault, above, said, row)
        cursor = conn.execute(
            "insert into turns (tenant, parent, role, created, usage, tokens, text, said, digest)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (tenant, parent, *row, said, above),
        )
        parent = cursor.lastrowid
        assert parent is not None
        words.add(conn, vault, parent, turn.text)
        written += sum(len(part if isinstance(part, bytes) else part.encode()) for part in row)
    return parent, above, written


def mark(vault: Vault, above: bytes, said: bytes | None, row: Sequence[Any]) -> bytes:
    """The digest of a turn's row, after the turn whose digest is `above`."""
    told = () if said is None else (said,)
    return digest(vault.key, b"still turn", above, *row, *told)


def said_after(vault: Vault, said: bytes, role: str, text: str) -> bytes:
    """What tells a conversation by what was said in it, after one more turn; empty before any."""
    return digest(vault.key, b"still said", said, role, text)


def said_up_to(conn: sqlite3.Connection, turn: int | None) -> bytes | None:
    """As the turn's row has it; None for one from before `m006_recognition`, or after such."""
    if turn is None:
        return b""
    row: tuple[bytes | None] = conn.execute(
        "select said from turns where id = ?", (turn,)
    ).fetchone()
    return row[0]


def turn_digest(conn: sqlite3.Connection, tenant: int, turn: int | None) -> bytes:
    """What stands for the conversation up to `turn`. DamageError if the tenant has none such."""
    if turn is None:
        return b""
    query = "select digest from turns where id = ? and tenant = ?"
    row = conn.execute(query, (turn, tenant)).fetchone()
    if row is None or type(row[0]) is not bytes:
        raise missing(turn)
    return row[0]


def read(conn: sqlite3.Connection, vault: Vault, last: int | None) -> list[TurnRecord]:
    """The turns that lead to `last`, oldest first, each checked against its digest."""
    rows = conn.execute(
        "with recursive path (id, parent) as ("
        "  select id, parent from turns where id = ?"
        "  union select t.id, t.parent from path join turns t on t.id = path.parent)"
        " select t.id, t.parent, t.digest, t.said, t.role, t.created, t.usage, t.tokens, t.text"
        " from path join turns t using (id) order by t.id",
        (last,),
    ).fetchall()
    above, parent = b"", None
    turns: list[TurnRecord] = []
    for row in rows:
        identity, named, stored, said, *rest = row
        before, above = above, mark(vault, above, said, rest)
        if named != parent or stored != above:
            raise DamageError(
                f"turn {identity} is damaged or one before it is missing; restore the store "
                "from a copy"
            )
        parent = identity
        said = _opened(vault, before, identity, rest)
        turns.append(_record(len(turns) + 1, identity, named, *said))
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


def texts(conn: sqlite3.Connection, vault: Vault, last: int | None) -> Iterator[tuple[int, str]]:
    """The ids and texts of the turns that lead to `last`, oldest first."""
    for turn in sorted(way(conn, last)):
        row = conn.execute(
            "select t.text, p.digest from turns t left join turns p on p.id = t.parent"
            " where t.id = ?",
            (turn,),
        ).fetchone()
        if row is None:
            raise missing(turn)
        try:
            yield turn, vault.open_text(row[0], "text", row[1] or b"")
        except ValueError as error:
            raise _damaged(turn, error) from None


def read_one(conn: sqlite3.Connection, vault: Vault, turn: int, number: int) -> TurnRecord:
    """A turn, checked against its digest and that of the one before it."""
    row = conn.execute(
        "select t.parent, p.digest, t.digest, t.said, t.role, t.created, t.usage, t.tokens, t.text"
        " from turns t left join turns p on p.id = t.parent where t.id = ?",
        (turn,),
    ).fetchone()
    if row is None:
        raise missing(turn)
    parent, above, stored, said, *rest = row
    above = above or b""
    if mark(vault, above, said, rest) != stored:
        raise DamageError(f"turn {turn} is damaged; restore the store from a copy")
    return _record(number, turn, parent, *_opened(vault, above, turn, rest))


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


def copies(conn: sqlite3.Connection, vault: Vault, tenant: int, turns: Collection[int]) -> set[int]:
    """The ids of the tenant's turns that say what these say, in one role and at one moment.

    These themselves, and rows that an import or a rebuild has made of them. Reads the time of
    every turn, and the text of those that could be copies. A damaged one is a copy of none.
    """
    query = "select id, created from turns where tenant = ?"
    chosen = "and id in (select value from json_each(?))"
    own = conn.execute(f"{query} {chosen}", (tenant, to_json(sorted(turns), "ids"))).fetchall()
    moments = {created for _, created in own}
    alike = [row for row, created in conn.execute(query, (tenant,)) if created in moments]

    def said(turn: int) -> tuple[str, str, str] | None:
        above, *row = conn.execute(
            "select p.digest, t.role, t.created, t.usage, t.tokens, t.text"
            " from turns t left join turns p on p.id = t.parent where t.id = ?",
            (turn,),
        ).fetchone()
        try:
            role, created, _, _, text = opened(vault, above or b"", row)
        except ValueError:  # what cannot be read must not keep from deleting it
            return None
        return role, created, text

    wanted = {said(row) for row, _ in own} - {None}
    return {row for row, _ in own} | {row for row in alike if said(row) in wanted}


def collect(conn: sqlite3.Connection) -> None:
    """Delete every turn that no checkpoint leads to. Their words stay in the index."""
    conn.execute(
        "with recursive led (id) as (select turn from checkpoints where turn not null"
        " union select parent from led join turns using (id) where parent not null)"
        " delete from turns where id not in (select id from led)"
    )


def opened(vault: Vault, above: bytes, row: Sequence[Any]) -> _Row:
    """A turn's row as it was before it was sealed; `above` is the digest of the turn before it.

    ValueError for one that was not sealed here.
    """
    role, created, usage, tokens, text = row
    return (
        vault.open_text(role, "role", above),
        created,
        vault.open_text(usage, "usage", above),
        vault.open(tokens, "tokens", above),
        vault.open_text(text, "text", above),
    )


def _sealed(vault: Vault, above: bytes, row: _Row) -> _Row:
    role, created, usage, tokens, text = row
    return (
        vault.seal_text(role, "role", above),
        created,
        vault.seal_text(usage, "usage", above),
        vault.seal(tokens, "tokens", above),
        vault.seal_text(text, "text", above),
    )


def _opened(vault: Vault, above: bytes, turn: int, row: Sequence[Any]) -> _Row:
    try:
        return opened(vault, above, row)
    except ValueError as error:
        raise _damaged(turn, error) from None


def _damaged(turn: int, error: ValueError) -> DamageError:
    return DamageError(f"turn {turn} is damaged ({error}); restore the store from a copy")


def _row(turn: NewTurn, now: str) -> _Row:
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
