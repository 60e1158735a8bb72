"""Which session a conversation goes on in, told by what was said in it.

Whoever keeps no state sends a conversation as the list of its messages, each time. Every turn has a
digest of what was said up to it (`ledger.said_after`), so the longest beginning of a list that a
session has had is found by one look-up for each message, and nothing of it is read. What is found
is vouched for by its turn's row, whose digest covers that one.

A conversation that was told in several ways, because it was edited or went on from an earlier
message, has branches: sessions whose settings name it as their `thread`. A session that names none
is the conversation of its own name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pydantic import JsonValue

from still_memory import ledger
from still_memory.records import to_json
from still_memory.vault import Vault

THREAD = "thread"  # in a session's settings
_AT_ONCE = 500  # digests of one query
_FEW = 8  # turns that each have a query of their own, and branches that are read to the root

# The tenant's sessions that are branches of a conversation, and of the model. The plus has SQLite
# begin at the turn, where few stand, and not go through all that the tenant has.
_BRANCHES = (
    "select s.name from sessions s join models m on m.id = s.model"
    " join checkpoints c on c.session = s.id and c.generation = s.generation"
    " where +s.tenant = :tenant and s.draft_of is null and m.address = :model"
    " and (s.thread = :thread or (s.name = :thread and s.thread is null))"
)

# The turns of a conversation's branches
_WAYS = (
    "with recursive way (id) as (select c.turn from sessions s"
    " join checkpoints c on c.session = s.id and c.generation = s.generation"
    " where s.name in (select value from json_each(?2)) and s.tenant = ?1 and c.turn not null"
    " union select parent from way join turns using (id) where parent not null)"
    " select id from way"
)

# The turns that lead on from one, and itself
_AFTER = (
    "(with recursive after (id) as (select :turn union all"
    " select t.id from after join turns t on t.parent = after.id) select id from after)"
)


@dataclass(frozen=True)
class Known:
    """The session that has had the longest beginning of a conversation."""

    session: str
    turns: int  # of that beginning,
    turn: int  # and the id of the last of them
    stands: bool  # whether the session ends with them; else it has gone on otherwise


def thread_of(settings: Mapping[str, JsonValue]) -> str | None:
    """The conversation that a session is a branch of; None: that of its own name."""
    thread = settings.get(THREAD)
    return thread if isinstance(thread, str) else None


def branches(conn: sqlite3.Connection, tenant: int, thread: str, limit: int = -1) -> list[str]:
    """The sessions of a conversation, oldest first; names as they are stored."""
    rows = conn.execute(
        "select name from sessions where tenant = ?1 and draft_of is null"
        " and (thread = ?2 or (name = ?2 and thread is null)) order by id"
        " limit ?3",
        (tenant, thread, limit),
    )
    return [name for (name,) in rows]


def find(
    conn: sqlite3.Connection,
    vault: Vault,
    tenant: int,
    thread: str,
    model: str,
    told: Sequence[tuple[str, str]],
) -> Known | None:
    """The branch of `thread` that goes on from the longest beginning of `told`.

    thread: as it is stored, and so is the name of the session that is found.
    model: the address of the model that its state must be of.
    told: roles and texts, oldest first.

    DamageError if the turn that it is told by is damaged.
    """
    digests = list(
        accumulate(told, lambda said, turn: ledger.said_after(vault, said, *turn), initial=b"")
    )
    for number, turns in _turns(conn, tenant, digests):
        if len(turns) > _FEW:  # a common beginning: only the conversation's own are looked at
            turns = _own(conn, tenant, thread, turns)
        where = {"tenant": tenant, "thread": thread, "model": model}
        for stands, condition in ((True, "c.turn = :turn"), (False, f"c.turn in {_AFTER}")):
            query = f"{_BRANCHES} and {condition} order by s.updated desc, s.id desc"
            for turn in turns:
                row = conn.execute(query, {**where, "turn": turn}).fetchone()
                if row is not None:
                    ledger.read_one(conn, vault, turn, number)
                    return Known(row[0], number, turn, stands)
    return None


def _own(conn: sqlite3.Connection, tenant: int, thread: str, turns: list[int]) -> list[int]:
    """Those of the turns that a conversation of few branches has; all, for one of many."""
    names = branches(conn, tenant, thread, _FEW + 1)
    if len(names) > _FEW:
        return turns
    ways = {row[0] for row in conn.execute(_WAYS, (tenant, to_json(names, "names")))}
    return [turn for turn in turns if turn in ways]


def _turns(
    conn: sqlite3.Connection, tenant: int, digests: Sequence[bytes]
) -> Iterator[tuple[int, list[int]]]:
    """After how many turns this was said, the most first, and the ids of the last of them."""
    for high in range(len(digests), 1, -_AT_ONCE):
        low = max(1, high - _AT_ONCE)
        some = digests[low:high]
        rows = conn.execute(
            f"select said, id from turns where said in ({', '.join('?' * len(some))})"
            " and tenant = ? order by id desc",
            (*some, tenant),
        ).fetchall()
        found: dict[bytes, list[int]] = {}
        for said, turn in rows:
            found.setdefault(said, []).append(turn)
        for number in range(high - 1, low - 1, -1):
            if digests[number] in found:
                yield number, found[digests[number]]
