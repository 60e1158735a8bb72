"""Checkpoints in the store: a short list of entries, and a digest that seals all it rests on.

The seal covers the session's tenant (whose key makes it), name, generation, model and settings,
the digest of its last turn (and so every turn), and the entries with their spans' addresses (and
so every tensor).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace

from pydantic import ConfigDict, TypeAdapter

from still_memory import ledger
from still_memory.checkpoint import Checkpoint, Entry, Share
from still_memory.digests import digest
from still_memory.records import Head, to_json
from still_memory.span import Span
from still_memory.vault import Vault

Content = tuple[int, int, str, str]  # slots, bytes, entries, extra: as the row holds them


_Row = tuple[str, int, int, int, Share, int]  # address, low, high, base, share, level
_ROWS = TypeAdapter(list[_Row], config=ConfigDict(strict=True))


def dump_entries(checkpoint: Checkpoint, addresses: Mapping[Span, str]) -> str:
    """The entries as JSON, each with its span's address."""
    rows = [
        (addresses[e.span], e.low, e.high, e.base, e.share, e.level) for e in checkpoint.entries
    ]
    return to_json(rows, "entries")


def addresses_in(entries: str) -> list[str]:
    """The addresses that the entries name, each once. ValueError if they are not entries."""
    return list(dict.fromkeys(row[0] for row in _ROWS.validate_json(entries)))


def build(entries: str, extra: str, tokens: int, spans: Mapping[str, Span]) -> Checkpoint:
    """The checkpoint of these rows. ValueError (InputError is one) if they do not make one."""
    rows = _ROWS.validate_json(entries)
    placed = tuple(Entry(spans[row[0]], *row[1:]) for row in rows)
    return Checkpoint(placed, tokens, json.loads(extra))


def seal(key: bytes, head: Head, last_turn: bytes, settings: str, content: Content) -> bytes:
    """The digest of a checkpoint; `last_turn` is its last turn's own."""
    return digest(
        key,
        b"still checkpoint",
        head.session,
        head.generation,
        head.model.address,
        head.turns,
        head.tokens,
        last_turn,
        settings,
        *content,
    )


def seal_state(vault: Vault, head: Head, entries: str, extra: str) -> tuple[str, str]:
    """Entries and extra state as the row of `head`'s checkpoint holds them."""
    place = head.session, head.generation
    return vault.seal_text(entries, "entries", *place), vault.seal_text(extra, "extra", *place)


def open_state(vault: Vault, head: Head, entries: str, extra: str) -> tuple[str, str]:
    """What `seal_state` was given. ValueError if it was not sealed for this very checkpoint."""
    place = head.session, head.generation
    return vault.open_text(entries, "entries", *place), vault.open_text(extra, "extra", *place)


def insert(conn: sqlite3.Connection, head: Head, content: Content, mark: bytes) -> int:
    """Save a checkpoint's row; its id."""
    row: tuple[int] = conn.execute(
        "insert into checkpoints (session, generation, turn, turns, tokens, slots, bytes,"
        " entries, extra, digest) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) returning id",
        (head.session_id, head.generation, head.turn, head.turns, head.tokens, *content, mark),
    ).fetchone()
    return row[0]


def again(
    conn: sqlite3.Connection,
    vault: Vault,
    source: Head,
    made: Head,
    last_turn: bytes,
    settings: str,
    content: Content,
    extra: str | None = None,
) -> Head:
    """Save the state of `source` once more, as that of `made`; its spans are held, and not read.

    content: of the row of `source`'s checkpoint. extra: in place of its own.
    """
    slots, size, *stored = content
    entries, told = open_state(vault, source, *stored)
    content = slots, size, *seal_state(vault, made, entries, told if extra is None else extra)
    mark = seal(vault.key, made, last_turn, settings, content)
    made = replace(made, checkpoint=insert(conn, made, content, mark))
    conn.execute(
        "insert into checkpoint_spans (checkpoint, span)"
        " select ?, span from checkpoint_spans where checkpoint = ?",
        (made.checkpoint, source.checkpoint),
    )
    return made


def collect(conn: sqlite3.Connection, session: int, newest: int) -> list[tuple[int, str]]:
    """Drop a session's checkpoints up to generation `newest`, and what no other leads to.

    That is their spans and, where the session was rewound or is being deleted, their turns,
    whose ids and texts are returned.
    """
    spans = conn.execute(
        "select distinct span from checkpoint_spans where checkpoint in"
        " (select id from checkpoints where session = ?1 and generation <= ?2)",
        (session, newest),
    ).fetchall()
    turns = conn.execute(
        "delete from checkpoints where session = ?1 and generation <= ?2 returning turn",
        (session, newest),
    ).fetchall()
    conn.executemany(
        "delete from spans where id = ?1"
        " and not exists (select 1 from checkpoint_spans where span = ?1)",
        spans,
    )
    return [dropped for (turn,) in turns for dropped in ledger.drop(conn, turn)]
