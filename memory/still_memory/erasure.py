"""Bytes: what no row holds is nowhere in the file, nor in its log.

A deleted row can leave copies behind. Pages that were freed keep their bytes until they are used
again; pages whose rows were moved keep them in their unused parts; and the log keeps every page
as it once was. `secure_delete` overwrites only what is deleted while it is on, where it stands
then. So the file is written anew (`vacuum`), which takes time and room in proportion to it, and
the log is emptied.

Who deletes marks the file in the same transaction. A process that ends before the file is clean
leaves the mark, and whoever opens the store next goes on.
"""

from __future__ import annotations

import secrets
import sqlite3
from contextlib import suppress

from still_memory.database import StoreFile
from still_memory.errors import ErasureError, StoreError

MARK = "erasing"  # a setting of the file: it may hold what its rows do not


def mark(conn: sqlite3.Connection) -> None:
    """What this transaction deletes is to be nowhere in the file."""
    told = MARK, secrets.token_bytes(16)  # another eraser's is another: none takes it away
    conn.execute("insert or replace into meta (name, value) values (?, ?)", told)


def go_on(file: StoreFile) -> None:
    """Clean the file if someone was kept from it, unless others are at work in it just now."""
    with file.reading() as conn:
        left = marked(conn)
    if left is not None:
        with suppress(StoreError):  # whoever asked for it was told so, and may ask again
            scrub(file, wait=False)


def scrub(file: StoreFile, *, wait: bool = True) -> None:
    """Write the file anew and empty its log; writers wait meanwhile.

    ErasureError if others read it for longer than the store's timeout (or at all, unless `wait`),
    so that it could not be done; the mark then stays.
    """
    with file.connection() as conn:
        left = marked(conn)
        with file.waiting(None if wait else 0.0):
            emptied = _empty_log(conn)
            if emptied:  # else the file, written anew, would only be added to the log
                _rewrite(conn)
                emptied = _empty_log(conn)
        if not emptied:
            raise ErasureError(
                f"another process reads the store {file.path}, so its log still holds what was "
                "erased, though no session does: close that process, and run `still-agent store "
                f"scrub --store {file.path}`, or open the store again"
            )
        conn.execute("delete from meta where name = ? and value = ?", (MARK, left))


def marked(conn: sqlite3.Connection) -> bytes | None:
    """The mark, while the file may hold what its rows do not."""
    row = conn.execute("select value from meta where name = ?", (MARK,)).fetchone()
    return None if row is None else row[0]


def _empty_log(conn: sqlite3.Connection) -> bool:
    """Put the log into the file; False if others who read it kept that from being done."""
    busy, *_ = conn.execute("pragma wal_checkpoint(truncate)").fetchone()
    return not busy


def _rewrite(conn: sqlite3.Connection) -> None:
    conn.execute("pragma secure_delete = on")  # else pages keep what was in memory before
    conn.execute("pragma temp_store = file")  # a store may be larger than memory
    try:
        conn.execute("vacuum")
    finally:
        conn.execute("pragma temp_store = memory")
        conn.execute("pragma secure_delete = fast")
