"""Threads: the sessions of a conversation, and the states of its graph; they die together.

A graph's states hold the conversation's words as its engine keeps them, and no word can be taken
out of them here. So the states of a thread go with its last session, whatever takes that; they go
with any session of it that is erased, and with any turn of it that is forgotten. A copy of a
thread shares its turns, its spans and its graph's values.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from pydantic import JsonValue

from still_memory import (
    checkpoints_table,
    drafts_table,
    erasure,
    graphs_table,
    ledger,
    taint,
    words,
)
from still_memory.errors import TaintedError
from still_memory.recognition import THREAD
from still_memory.records import Head, to_json
from still_memory.taint import Deleted, Forks
from still_memory.vault import Vault

Sessions = Sequence[tuple[int, str]]  # their rows, and their names


def delete(
    conn: sqlite3.Connection,
    vault: Vault,
    tenant: int,
    sessions: Sessions,
    *,
    erase: bool,
    forks: Forks,
) -> Deleted:
    """Delete sessions, with the graphs' states that go with them. See `MemoryStore.delete`."""
    rows = {row for row, _ in sessions}
    own = "select turn from checkpoints where session = ?"
    turns = {
        turn
        for row in rows
        for (last,) in conn.execute(own, (row,)).fetchall()
        for turn in ledger.way(conn, last)
    }
    led, held = taint.trace(conn, vault, tenant, turns)
    shared = [t for t in held if t.session_id not in rows]
    if shared and forks == "refuse":
        raise TaintedError(taint.told_shared(sessions[0][1], shared), shared)
    gone = [*sessions, *((t.session_id, t.session) for t in shared if forks == "delete")]
    threads = of(conn, [row for row, _ in gone])
    for row, _ in gone:
        drafts_table.drop(conn, vault, row)
        query = "select generation from sessions where id = ?"
        (newest,) = conn.execute(query, (row,)).fetchone()
        checkpoints_table.collect(conn, row, newest)
        conn.execute("delete from sessions where id = ?", (row,))
    graphs = drop_graphs(conn, vault, tenant, threads, always=erase)
    if erase:
        taint.drop_states(conn, vault, led - taint.said_now(conn, tenant))
        taint.collect(conn)
        erasure.mark(conn)
    words.erase(conn, vault)
    ids, names = [row for row, _ in gone], [name for _, name in gone]
    kept = tuple(shared) if forks == "keep" else ()
    return Deleted(tuple(names), tuple(ids), kept, tuple(graphs))


def of(conn: sqlite3.Connection, sessions: Collection[int]) -> set[str]:
    """The threads that sessions are of, as stored; none for what its owner has not named."""
    rows = conn.execute(
        "select distinct coalesce(thread, name) from sessions where draft_of is null"
        " and id in (select value from json_each(?))",
        (to_json(sorted(sessions), "sessions"),),
    )
    return {thread for (thread,) in rows if thread}


def sessions(conn: sqlite3.Connection, vault: Vault, tenant: int, thread: str) -> Sessions:
    """The sessions of a thread, oldest first. thread: as it is stored."""
    rows = conn.execute(
        "select s.id, n.name, s.name from sessions s join tenants n on n.id = s.tenant"
        " where s.tenant = ?1 and draft_of is null"
        " and (thread = ?2 or (s.name = ?2 and thread is null)) order by s.id",
        (tenant, thread),
    ).fetchall()
    return [(row, vault.names(owner, name)[1]) for row, owner, name in rows]


def drop_graphs(
    conn: sqlite3.Connection, vault: Vault, tenant: int, threads: Iterable[str], *, always: bool
) -> list[str]:
    """Delete the graphs' states of threads that have no session left, or `always`; whose went.

    threads: as they are stored.
    """
    gone = [
        thread
        for thread in threads
        if (always or not sessions(conn, vault, tenant, thread))
        and graphs_table.delete_thread(conn, tenant, thread)
    ]
    (owner,) = conn.execute("select name from tenants where id = ?", (tenant,)).fetchone() or ("",)
    return sorted(vault.names(owner, thread)[1] for thread in gone)


def trim(conn: sqlite3.Connection, vault: Vault, session: int) -> None:
    """Delete a session's states but for the newest, and what they alone led to."""
    query = "select generation from sessions where id = ?"
    (newest,) = conn.execute(query, (session,)).fetchone()
    for turn in checkpoints_table.collect(conn, session, newest - 1):
        words.remove(conn, vault, *turn)


def taken(conn: sqlite3.Connection, tenant: int, name: str) -> bool:
    """Whether a session is called so. name: as it is stored."""
    query = "select 1 from sessions where tenant = ? and name = ?"
    return conn.execute(query, (tenant, name)).fetchone() is not None


def copy(
    conn: sqlite3.Connection,
    vault: Vault,
    source: Head,
    content: checkpoints_table.Content,
    name: str,
    thread: str | None,
    stored: Callable[[str], str],
) -> None:
    """A session once more, under another name, a branch of `thread`; turns and spans are shared.

    content: what the row of its newest checkpoint holds. stored: a name as rows have it.
    """
    told: dict[str, JsonValue] = {k: v for k, v in source.settings.items() if k != THREAD}
    if thread is not None:
        told[THREAD] = thread
    settings = vault.seal_text(to_json(told, "settings"), "settings")
    now = datetime.now(UTC).isoformat()
    identity, tenant = conn.execute(
        "insert into sessions"
        " (tenant, name, generation, model, created, updated, settings, thread)"
        " select tenant, ?, 1, model, ?, ?, ?, ? from sessions where id = ? returning id, tenant",
        (
            stored(name), now, now, settings, None if thread is None else stored(thread),
            source.session_id,
        ),
    ).fetchone()  # fmt: skip
    made = replace(source, session=name, session_id=identity, generation=1)
    last_turn = ledger.turn_digest(conn, tenant, source.turn)
    checkpoints_table.again(conn, vault, source, made, last_turn, settings, content)
