"""What takes the space in a store: by kind, and by session. Reads no tensor."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from still_memory import tenants
from still_memory.vault import Vault


@dataclass(frozen=True)
class SessionSpace:
    """What one session holds. What it shares with others counts in each of them."""

    tenant: str
    name: str
    turns: int
    checkpoints: int
    span_bytes: int  # of the spans of all its checkpoints
    shared_span_bytes: int  # of these, those that other sessions hold too
    turn_bytes: int  # text, token ids and usage on its way


@dataclass(frozen=True)
class Space:
    """The bytes of a store's file, by what they are for.

    `free_bytes` are pages to be used again, or given back where `gives_back` says so. `other_bytes`
    are rows' names and numbers, SQLite's own indexes, and what pages leave unused; where one
    tenant's sessions, spans, turns, checkpoints and graphs are measured, also what the others have.
    """

    sessions: list[SessionSpace]  # largest first
    spans: int
    shared_spans: int  # held by more than one session
    turns: int
    checkpoints: int
    file_bytes: int
    log_bytes: int
    span_bytes: int
    shared_span_bytes: int
    turn_bytes: int
    checkpoint_bytes: int
    graph_states: int
    graph_bytes: int  # of states of graphs, their values and writes
    index_bytes: int
    free_bytes: int
    other_bytes: int
    gives_back: bool


_TURN = "length(cast(t.text as blob)) + length(t.tokens) + length(cast(t.usage as blob))"
_WHOSE = "(?1 is null or tenant = ?1)"
_SPANS = f"(select s.id, s.bytes from spans s join models m on m.id = s.model where {_WHOSE}) s"
_HELD = (
    "held (span, session) as (select distinct r.span, c.session from checkpoint_spans r"
    " join checkpoints c on c.id = r.checkpoint),"
    " many (span, holders) as (select span, count(*) from held group by span)"
)
_GRAPHS = (
    "coalesce(sum(length(cast(holds as blob)) + length(about) + length(body)), 0)"
    f" + (select coalesce(sum(length(data)), 0) from graph_values where {_WHOSE})"
    f" + (select coalesce(sum(length(data)), 0) from graph_writes where {_WHOSE})"
)
_CHECKPOINT = "length(cast(entries as blob)) + length(cast(extra as blob)) + length(digest)"


def measure(
    conn: sqlite3.Connection, vault: Vault, log_bytes: int, tenant: int | None = None
) -> Space:
    """What takes the space, in one moment of the store. Reads the length of every text.

    tenant: whose sessions, or None for everyone's.
    """

    def ask(query: str, *values: int | None) -> tuple[int, ...]:
        row: tuple[int, ...] = conn.execute(query, values).fetchone()
        return row

    page, pages, free, mode = (
        ask(f"pragma {name}")[0]
        for name in ("page_size", "page_count", "freelist_count", "auto_vacuum")
    )
    spans, span_bytes = ask(f"select count(*), coalesce(sum(bytes), 0) from {_SPANS}", tenant)
    shared, shared_bytes = ask(
        f"with {_HELD} select count(*), coalesce(sum(bytes), 0) from many"
        f" join {_SPANS} on s.id = span where holders > 1",
        tenant,
    )
    turns, turn_bytes = ask(
        f"select count(*), coalesce(sum({_TURN}), 0) from turns t where {_WHOSE}", tenant
    )
    checkpoints, checkpoint_bytes = ask(
        f"select count(*), coalesce(sum({_CHECKPOINT}), 0) from checkpoints"
        f" join sessions s on s.id = session where {_WHOSE}",
        tenant,
    )
    graph_states, graph_bytes = ask(f"select count(*), {_GRAPHS} from graph_states where {_WHOSE}",
                                    tenant)  # fmt: skip
    (index,) = ask("select coalesce(sum(length(block)), 0) from turn_words_data")
    if tenant is not None and tenants.several(conn):  # it tells how much the others say
        index = 0
    known = span_bytes + turn_bytes + checkpoint_bytes + graph_bytes + index
    return Space(
        sessions=_by_session(conn, vault, tenant),
        spans=spans,
        shared_spans=shared,
        turns=turns,
        checkpoints=checkpoints,
        file_bytes=page * pages,
        log_bytes=log_bytes,
        span_bytes=span_bytes,
        shared_span_bytes=shared_bytes,
        turn_bytes=turn_bytes,
        checkpoint_bytes=checkpoint_bytes,
        graph_states=graph_states,
        graph_bytes=graph_bytes,
        index_bytes=index,
        free_bytes=page * free,
        other_bytes=max(0, page * (pages - free) - known),
        gives_back=mode == 2,
    )


def _by_session(conn: sqlite3.Connection, vault: Vault, tenant: int | None) -> list[SessionSpace]:
    held: dict[int, tuple[int, int]] = {
        session: (size, shared)
        for session, size, shared in conn.execute(
            f"with {_HELD} select session, sum(bytes),"
            " sum(case when holders > 1 then bytes else 0 end) from held"
            " join many using (span) join spans on id = span group by session"
        )
    }
    said: dict[int, tuple[int, int]] = {
        session: (turns, size)
        for session, turns, size in conn.execute(
            # turns that name a later one are damaged, and would lead round and round
            "with recursive way (session, id) as (select s.id, c.turn from sessions s"
            "  join checkpoints c on c.session = s.id and c.generation = s.generation"
            "  where c.turn not null union all select way.session, t.parent from way"
            "  join turns t on t.id = way.id where t.parent < way.id)"
            f" select session, count(*), sum({_TURN}) from way join turns t using (id)"
            " group by session"
        )
    }
    rows = conn.execute(
        "select s.id, n.name, coalesce(o.name, s.name), o.id, count(c.id)"
        " from sessions s join tenants n on n.id = s.tenant"
        " left join sessions o on o.id = s.draft_of left join checkpoints c"
        " on c.session = s.id where ?1 is null or s.tenant = ?1 group by s.id",
        (tenant,),
    ).fetchall()
    found = []
    for session, owner, stored, draft_of, checkpoints in rows:
        whose, name = vault.names(owner, stored)
        name = name if draft_of is None else f"draft of {name}"
        turns, text = said.get(session, (0, 0))
        spans = held.get(session, (0, 0))
        found.append(SessionSpace(whose, name, turns, checkpoints, *spans, text))
    return sorted(found, key=lambda s: s.turn_bytes + s.span_bytes, reverse=True)
