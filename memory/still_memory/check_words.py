"""Does the index of words hold the words of the ledger, and no others? Reads both, side by side.

FTS5's own check of an index whose text is elsewhere writes, if only a lock. Here each turn has
one number for what the index holds of it and one for what it says: the sum of a digest of each
word and place. A sum needs no order, so either side is read as it lies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from still_memory import words
from still_memory.findings import Noted

_ROWS = 20_000  # of words, summed at once
_TURNS = 500  # split into words at once
_MIX = np.uint64(0x9E3779B97F4A7C15)


_EMPTY = (1, 10)  # what FTS5 tells of the whole of an index: also of one that holds nothing


def none(conn: sqlite3.Connection, noted: Noted) -> None:
    """Note that an encrypted store, which has no index, has words in it."""
    there = (
        "select (select count(*) from turn_words_data where id not in (?, ?)),"
        " (select count(*) from turn_words_idx)"
    )
    if any(conn.execute(there, _EMPTY).fetchone()):
        noted.add("words", "it holds words in plain, and the store is encrypted")


def compare(conn: sqlite3.Connection, noted: Noted) -> Iterator[int]:
    """Note each turn whose words are not those in the index. Yields how many turns are read."""
    query = "select id from turns order by id"
    ids = np.fromiter((row[0] for row in conn.execute(query)), np.int64)
    held, strangers = _summed(conn, "main", "turn_words", ids)
    said = np.zeros_like(held)
    conn.execute(words.SCHEMA.replace("turn_words", "temp.said_words").replace(
        "content = 'turns', content_rowid = 'id'", "content = ''"))  # fmt: skip
    for at in range(0, len(ids), _TURNS):
        some = ids[at : at + _TURNS]
        conn.execute(
            "insert into temp.said_words (rowid, text) select id, text from turns"
            " where id between ? and ?",
            (int(some[0]), int(some[-1])),
        )
        said[at : at + _TURNS], _ = _summed(conn, "temp", "said_words", some)
        conn.execute("insert into temp.said_words (said_words) values ('delete-all')")
        yield at + len(some)
    for row in ids[held != said]:
        noted.add("words", "the index does not hold the words that the turn says", row=int(row))
    for row in strangers:
        noted.add("words", "the index holds words of a turn that is not there", row=row)


def _summed(
    conn: sqlite3.Connection, schema: str, table: str, ids: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """For each turn of the ascending `ids` the sum of its words; and turns that are not of them."""
    sums = np.zeros(len(ids), np.uint64)
    strangers: set[int] = set()
    name = f"temp.in_{table}"
    conn.execute(f"create virtual table {name} using fts5vocab({schema}, {table}, instance)")
    rows = conn.execute(f'select term, doc, "offset" from {name}')
    last, mark = None, 0
    while some := rows.fetchmany(_ROWS):
        marks = np.empty(len(some), np.uint64)
        for n, (term, _, _) in enumerate(some):  # in the order of words
            if term != last:
                data = term.encode("utf-8", "surrogateescape")
                last, mark = term, int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
            marks[n] = mark
        docs = np.array([row[1] for row in some], np.int64)
        marks ^= np.array([row[2] for row in some], np.uint64) * _MIX
        marks *= _MIX
        marks ^= marks >> np.uint64(29)
        at = np.minimum(np.searchsorted(ids, docs), max(len(ids) - 1, 0))
        known = ids[at] == docs if len(ids) else np.zeros(len(docs), bool)
        np.add.at(sums, at[known], marks[known])
        strangers.update(docs[~known].tolist())
    conn.execute(f"drop table {name}")
    return sums, sorted(strangers)
