"""Drafts: states on their way, that will take the place of a session's own.

A draft is a session like any other, so that it is saved, sealed, collected and resumed by the same
code; only that no list shows it, and that no name leads to it.
"""

from __future__ import annotations

import sqlite3

from still_memory import checkpoints_table, words
from still_memory.records import MAX_SESSION_NAME
from still_memory.vault import Vault


def name_of(session: int) -> str:
    """What the draft of this session is called: longer than any session's own name may be."""
    return f"{session:0{MAX_SESSION_NAME + 1}d}"


def is_name(name: str) -> bool:
    """Whether a draft is called so."""
    return len(name) == MAX_SESSION_NAME + 1 and name.isdigit()


def drop(conn: sqlite3.Connection, vault: Vault, session: int) -> None:
    """Delete the draft of a session, if there is one, with what it alone leads to."""
    query = "select id, generation from sessions where draft_of = ?"
    row = conn.execute(query, (session,)).fetchone()
    if row is not None:
        for turn in checkpoints_table.collect(conn, *row):
            words.remove(conn, vault, *turn)
        conn.execute("delete from sessions where id = ?", row[:1])
