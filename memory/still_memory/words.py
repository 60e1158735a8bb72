"""The words of the ledger: a full-text index of the turns (SQLite's FTS5).

It holds words and where they stand, and no text of its own. FTS5 deletes by writing down that
something was deleted, and its remedy for that, "secure-delete", makes a file that SQLite before
3.42 cannot read. So where words must be nowhere afterwards, the index is built anew from the
turns that are left, which any SQLite can do.

An encrypted store has no index, for FTS5's cannot be sealed. That is for the vault to say, and
never for the file: whoever can write the file would have it take the words in plain.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import closing

from still_memory.errors import DamageError, InputError
from still_memory.records import check_limit, check_text
from still_memory.vault import Vault

# No sizes of columns: they are for ranking, and matches come newest first. Case and accents
# do not count. Words of a script without spaces are whole runs of it.
SCHEMA = """
create virtual table turn_words using fts5 (
    text, content = 'turns', content_rowid = 'id', columnsize = 0,
    tokenize = 'unicode61 remove_diacritics 2'
)
"""
REBUILD = "insert into turn_words (turn_words) values ('rebuild')"
EXCERPT = 24  # words
MOST_WORDS = 64  # of a search


def add(conn: sqlite3.Connection, vault: Vault, turn: int, text: str) -> None:
    """A turn was written."""
    if vault.encrypted:
        return
    conn.execute("insert into turn_words (rowid, text) values (?, ?)", (turn, text))


def remove(conn: sqlite3.Connection, vault: Vault, turn: int, text: str) -> None:
    """A turn is gone; what it said may stay in the file until `erase`."""
    if vault.encrypted:
        return
    conn.execute(
        "insert into turn_words (turn_words, rowid, text) values ('delete', ?, ?)", (turn, text)
    )


def erase(conn: sqlite3.Connection, vault: Vault) -> None:
    """Leave no word but those of the turns that are there. Reads them all."""
    if vault.encrypted:
        return
    conn.execute(REBUILD)


def merge(conn: sqlite3.Connection, vault: Vault, pages: int) -> bool:
    """Merge some pages of the index; whether there is more to merge.

    A negative number begins a merge of everything, which ends with no deleted word left.
    """
    if vault.encrypted:
        return False
    before = conn.total_changes
    conn.execute("insert into turn_words (turn_words, rank) values ('merge', ?)", (pages,))
    return conn.total_changes - before >= 2  # FTS5's own sign


def renew(conn: sqlite3.Connection, vault: Vault) -> None:
    """Make the index anew, also where its own tables are damaged. Reads all turns.

    That of an encrypted store is empty, whatever somebody has put into it.
    """
    conn.execute("drop table if exists turn_words")
    conn.execute(SCHEMA)
    erase(conn, vault)


def find(
    conn: sqlite3.Connection, query: str, way: Sequence[int], limit: int
) -> list[tuple[int, int, str]]:
    """The newest `limit` turns among the ascending ids `way` that hold all words of `query`.

    Number (1 for the first of `way`), id, and the words with those around them. InputError for
    a query without a word or with too many, and for a limit below 0.
    """
    wanted, most = _expression(query), check_limit(limit)
    found = "select rowid from turn_words where turn_words match ? order by rowid desc"
    shown = (
        f"select snippet(turn_words, 0, '', '', '…', {EXCERPT}) from turn_words"
        " where turn_words match ? and rowid = ?"
    )
    matches: list[tuple[int, int, str]] = []
    for (turn,) in conn.execute(found, (wanted,)):
        if len(matches) == most:
            break
        at = bisect_left(way, turn)
        if at < len(way) and way[at] == turn:
            row = conn.execute(shown, (wanted, turn)).fetchone()
            if row is None or row[0] is None:
                raise DamageError(
                    f"the index of words is damaged at turn {turn}; restore the store from a copy"
                )
            matches.append((at + 1, turn, " ".join(row[0].split())))
    return matches


def find_among(
    turns: Iterable[tuple[int, str]], query: str, limit: int
) -> list[tuple[int, int, str]]:
    """As `find`, among these ids and texts, ascending, and with an index of nothing else."""
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.execute("create table turns (id integer primary key, text text)")
        conn.executemany("insert into turns values (?, ?)", turns)
        conn.execute(SCHEMA)
        conn.execute(REBUILD)
        way = [row[0] for row in conn.execute("select id from turns order by id")]
        return find(conn, query, way, limit)


def _expression(query: str) -> str:
    """The query as FTS5 takes it: each word must be there, and none is an operator."""
    words = check_text(query, "a search").replace("\0", " ").replace('"', " ").split()
    if not any(character.isalnum() for word in words for character in word):
        raise InputError("a search needs at least one word; give one that was said")
    distinct = dict.fromkeys(words)
    if len(distinct) > MOST_WORDS:  # FTS5 takes time in the square of their number
        raise InputError(f"a search takes {MOST_WORDS} words at most: leave some out")
    return " ".join(f'"{word}"' for word in distinct)
