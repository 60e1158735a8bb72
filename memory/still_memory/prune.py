"""Deleting in small pieces: each a short transaction, with a rest after it for whoever waits.

SQLite's write lock is not fair, and who waits for it looks up only now and then: without rests
as long as the work, a turn that is to be saved would starve. So nothing here holds the lock for
longer than a few pages, one span or a few turns take. A session that goes is gone with the first
transaction; what it alone held is then collected, and by the next prune if this one is stopped.
"""

from __future__ import annotations

import sqlite3
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from still_memory import checkpoints_table, drafts_table, ledger, threads, values_table, words
from still_memory.database import StoreFile
from still_memory.retention import Drop, Retention, plan
from still_memory.tenants import label
from still_memory.vault import Vault

BATCH = 1 << 20  # bytes of spans deleted in one transaction, or one span
TURNS = 32  # turns deleted in one transaction
MERGE = 16  # pages of the index (4 KiB each) merged in one transaction
SLACK = 1.25  # for half-filled pages: rather plan again than delete one session too many
PAGES = 8  # given back in one transaction: 512 KiB
REST = 0.005  # seconds between transactions, at least


@dataclass(frozen=True)
class Pruned:
    """What a prune took out, or with `dry_run` would take out."""

    drops: list[Drop]
    file_bytes: int  # before it
    file_bytes_after: int  # a dry run does not know them, and says what it expects
    dry_run: bool

    @property
    def sessions(self) -> list[str]:
        """The sessions that are gone; with its tenant, but for those of the default one."""
        return [label(drop.tenant, drop.session) for drop in self.drops if drop.whole]


def prune(
    file: StoreFile, vault: Vault, retention: Retention, dry_run: bool, tenant: int | None
) -> Pruned:
    """Take out what `retention` does not let stay, of a tenant or of all, and give its room back.

    What nothing holds any more is collected whose ever it was.
    """
    before = _size(file)
    if dry_run:
        with file.reading() as conn:
            drops = plan(conn, vault, retention, datetime.now(UTC), tenant)
        expected = max(0, before - sum(drop.bytes for drop in drops))
        return Pruned(drops, before, expected, True)
    done: list[Drop] = []
    size, limits = before, retention
    while True:
        with file.reading() as conn:
            drops = plan(conn, vault, limits, datetime.now(UTC), tenant, SLACK)
        done += [drop for drop in drops if _drop(file, vault, drop)]
        _collect_spans(file)
        _collect_values(file)
        if _collect_turns(file, vault):
            _forget_words(file, vault)
        _give_back(file)
        last, size = size, _size(file)
        # Again for its size alone, and while that helps: turns that go on meanwhile make
        # checkpoints as fast as they are dropped.
        if retention.max_bytes is None or size <= retention.max_bytes or size >= last:
            break
        limits = Retention(max_bytes=retention.max_bytes)
    return Pruned(done, before, size, False)


@contextmanager
def _briefly(file: StoreFile) -> Iterator[sqlite3.Connection]:
    """One short transaction that overwrites what it deletes, and the rest after it."""
    began = time.monotonic()
    with file.overwriting() as conn:
        yield conn
    time.sleep(max(REST, time.monotonic() - began))


def _drop(file: StoreFile, vault: Vault, drop: Drop) -> bool:
    """Whether it is gone: a session that was used since the plan was made stays."""
    if drop.whole:
        with _briefly(file) as conn:
            told = drop.session_id, drop.updated
            query = "select 1 from sessions where id = ? and updated = ?"
            if conn.execute(query, told).fetchone() is None:
                return False
            drafts_table.drop(conn, vault, drop.session_id)
            query = "select tenant from sessions where id = ?"
            (tenant,) = conn.execute(query, told[:1]).fetchone()
            left = threads.of(conn, told[:1])
            conn.execute("delete from sessions where id = ?", told[:1])
            threads.drop_graphs(conn, vault, tenant, left, always=False)
            return True
    for generation in drop.generations:
        with _briefly(file) as conn:
            query = "select 1 from sessions where id = ? and generation > ?"
            if conn.execute(query, (drop.session_id, generation)).fetchone() is None:
                return False
            for turn in checkpoints_table.collect(conn, drop.session_id, generation):
                words.remove(conn, vault, *turn)
    return True


def _collect_spans(file: StoreFile) -> None:
    """Spans that no checkpoint holds."""
    free = "not exists (select 1 from checkpoint_spans r where r.span = spans.id)"
    with file.reading() as conn:
        spans = conn.execute(f"select id, bytes from spans where {free}").fetchall()
    while spans:
        with _briefly(file) as conn:
            size = 0
            while spans and size < BATCH:
                row, held = spans.pop()
                conn.execute(f"delete from spans where id = ? and {free}", (row,))
                size += held


def _collect_values(file: StoreFile) -> None:
    """Values that no graph's state holds."""
    with file.reading() as conn:
        query = f"select id from graph_values where {values_table.FREE}"
        values = [row for (row,) in conn.execute(query)]
    for first in range(0, len(values), TURNS):
        with _briefly(file) as conn:
            values_table.collect(conn, values[first : first + TURNS])


def _collect_turns(file: StoreFile, vault: Vault) -> int:
    """Turns that nothing leads to, from their last back; how many there were."""
    with file.reading() as conn:
        ends = conn.execute(
            "select id from turns t where not exists (select 1 from turns c where c.parent = t.id)"
            " and not exists (select 1 from checkpoints where turn = t.id)"
        ).fetchall()
    many = 0
    for (end,) in ends:
        with file.reading() as conn:
            way = sorted(ledger.way(conn, end))
        while way:
            with _briefly(file) as conn:
                dropped = ledger.drop(conn, way[-1], TURNS)
                for turn in dropped:
                    words.remove(conn, vault, *turn)
            if not dropped:
                break
            many += len(dropped)
            way = way[: bisect_left(way, dropped[-1][0])]
    return many


def _forget_words(file: StoreFile, vault: Vault) -> None:
    """Merge the index until it holds no word that was deleted."""
    pages, more = -MERGE, True  # the sign begins a merge of all that there is
    while more:
        with _briefly(file) as conn:
            more = words.merge(conn, vault, pages)
        pages = MERGE


def _give_back(file: StoreFile) -> None:
    """Every free page, some at a time; then the log."""

    left = _free(file)
    while left:
        with _briefly(file) as conn:
            for _ in range(PAGES):  # one execute is a page
                conn.execute("pragma incremental_vacuum(1)")
        left, before = _free(file), left
        if left >= before:  # others free pages too, or the file gives none back
            break
    with file.connection() as conn:
        conn.execute("pragma wal_checkpoint(truncate)").fetchall()


def _free(file: StoreFile) -> int:
    """Pages that may be given back."""
    with file.reading() as conn:
        (pages,) = conn.execute("pragma freelist_count").fetchone()
    return int(pages)


def _size(file: StoreFile) -> int:
    """Of the file, once the log is in it."""
    with file.reading() as conn:
        (pages,) = conn.execute("pragma page_count").fetchone()
        (page,) = conn.execute("pragma page_size").fetchone()
    return int(pages * page)
