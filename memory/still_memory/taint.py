"""What a turn has entered: the sessions that were told it, and all that was computed after it.

A model that has read a turn says what it says next because of it, and a compaction mixes what it
takes: so whatever comes later on the turn's way through the tree is tainted, in forks too, and
later turns may quote it word for word. What was computed before it is clean.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from still_memory import drafts_table, ledger
from still_memory.errors import ConflictError, DamageError, InputError
from still_memory.records import Head, TurnRecord, to_json
from still_memory.vault import Vault

Later = Literal["refuse", "keep", "forget"]
Forks = Literal["refuse", "keep", "delete"]

# The turns `?1` (a JSON list of ids), and all that follow them in any session.
_LED = (
    "with recursive led (id) as (select value from json_each(?1)"
    " union select t.id from led join turns t on t.parent = led.id)"
)


@dataclass(frozen=True)
class Taint:
    """What one session has of turns that are to go. Turns by number, as its `history` counts."""

    session: str
    session_id: int
    generation: int  # at which this was so
    forgotten: tuple[int, ...]  # the turns themselves, or copies of them
    later: tuple[int, ...]  # what was said after the first of them, and stays unless it is named
    quoting: tuple[int, ...] = ()  # of `later`, those with a word that the turns brought in
    graph_states: int = 0  # of its thread's graph, which say it in their own way

    def __str__(self) -> str:
        later = f", and {_listed(self.later)} after that" if self.later else ""
        quoting = f" (words of it are in {_listed(self.quoting)})" if self.quoting else ""
        graph = f"; its graph has {self.graph_states} states" if self.graph_states else ""
        return f"{self.session!r} has it as {_listed(self.forgotten)}{later}{quoting}{graph}"


@dataclass(frozen=True)
class Deleted:
    """What a deletion took out, and what is left of it elsewhere."""

    sessions: tuple[str, ...]  # that are gone
    session_ids: tuple[int, ...]
    shared: tuple[Taint, ...]  # sessions that are not, and what they have of its turns
    graphs: tuple[str, ...] = ()  # threads whose graphs' states went too


def trace(
    conn: sqlite3.Connection,
    vault: Vault,
    tenant: int,
    turns: Collection[int],
    *,
    quoting: bool = False,
) -> tuple[set[int], list[Taint]]:
    """The rows of a tenant's turns and of their copies, and what each session has of them.

    With `quoting` the turns are read, and those that quote them found; DamageError if one is
    damaged. Without, no text is read but that of copies.
    """
    rows = ledger.copies(conn, vault, tenant, turns)
    held = conn.execute(
        f"{_LED} select n.name, s.name, s.id, s.generation, c.turn,"
        " (select count(*) from graph_states g where g.tenant = s.tenant"
        "  and g.thread = coalesce(s.thread, s.name)) from sessions s"
        " join tenants n on n.id = s.tenant join checkpoints c"
        " on c.session = s.id and c.generation ="
        " (select max(generation) from checkpoints where session = s.id)"
        " where s.tenant = ?2 and s.draft_of is null and c.turn in (select id from led)"
        " order by s.id",
        (_ids(rows), tenant),
    ).fetchall()
    found = []
    for owner, stored, session, generation, last, states in held:
        _, name = (vault.open_names if quoting else vault.names)(owner, stored)
        way = sorted(ledger.way(conn, last))  # a parent's id is the smaller one
        forgotten = tuple(n for n, turn in enumerate(way, 1) if turn in rows)
        if not forgotten:  # an index leads there that the rows do not bear out
            raise DamageError(
                f"the turns of session {name!r} are damaged; restore the store from a copy"
            )
        later = tuple(n for n in range(forgotten[0] + 1, len(way) + 1) if way[n - 1] not in rows)
        said = ledger.read(conn, vault, last) if quoting else []
        alike = quotes(said, forgotten, later)
        found.append(Taint(name, session, generation, forgotten, later, alike, states))
    return rows, found


def quotes(
    turns: Sequence[TurnRecord], forgotten: Collection[int], later: Iterable[int]
) -> tuple[int, ...]:
    """Which of `later` hold a word that `forgotten` have brought into the conversation.

    A hint for whoever decides what goes: what was said in other words is not found.
    """
    said = {turn.number: set(re.findall(r"\w+", turn.text.casefold())) for turn in turns}
    first = min(forgotten)
    before = set[str]().union(*(words for n, words in said.items() if n < first))
    brought = set[str]().union(*(said.get(n, set()) for n in forgotten)) - before
    return tuple(n for n in later if brought & said.get(n, set()))


def require_same(found: Iterable[Taint], made: Iterable[Head]) -> None:
    """ConflictError unless these are the heads of the sessions that were found, and of all."""
    if {t.session_id: t.generation for t in found} != {h.session_id: h.generation for h in made}:
        raise ConflictError(
            "the sessions that have these turns have moved on, by another writer: look again at "
            "what is tainted, and repeat this"
        )


def check_choice(choice: str, choices: object, what: str) -> None:
    """InputError for what is none of a Literal's: a slip must not pass for the last of them."""
    known = get_args(choices)
    if choice not in known:
        raise InputError(f"{what} is one of {', '.join(map(repr, known))}, and not {choice!r}")


def said_now(conn: sqlite3.Connection, tenant: int) -> set[int]:
    """The turns on the tenant's sessions' own ways, without what they have left by rewinding."""
    rows = conn.execute(
        "with recursive way (id) as (select turn from checkpoints c join sessions s"
        " on s.id = c.session and s.tenant = ? where s.draft_of is null and turn not null"
        " and c.generation = (select max(generation) from checkpoints where session = s.id)"
        " union select parent from way join turns using (id) where parent not null)"
        " select id from way",
        (tenant,),
    )
    return {row[0] for row in rows}


def drop_states(conn: sqlite3.Connection, vault: Vault, rows: Collection[int]) -> None:
    """Delete the kept states, and drafts, that were computed with these turns.

    No session's newest state may be among them.
    """
    ids = _ids(rows)
    drafts = conn.execute(
        f"{_LED} select distinct s.draft_of from sessions s join checkpoints c on c.session = s.id"
        " where s.draft_of not null and c.turn in (select id from led)",
        (ids,),
    ).fetchall()
    for (session,) in drafts:
        drafts_table.drop(conn, vault, session)
    conn.execute(f"{_LED} delete from checkpoints where turn in (select id from led)", (ids,))


def collect(conn: sqlite3.Connection) -> None:
    """Delete every turn and every span that no session leads to, whoever left them."""
    conn.execute(
        "delete from spans where not exists"
        " (select 1 from checkpoint_spans r where r.span = spans.id)"
    )
    ledger.collect(conn)


def told_shared(session: str, shared: Sequence[Taint]) -> str:
    """Why a session cannot be erased without a word about those that share its turns."""
    return (
        f"other sessions share turns of {session!r}, which would stay in the store: "
        f"{'; '.join(map(str, shared))}. Delete them too with forks='delete', or let them keep "
        "what they share with forks='keep'"
    )


def _ids(rows: Collection[int]) -> str:
    return to_json(sorted(rows), "ids of turns")


def _listed(numbers: Sequence[int]) -> str:
    """Numbers as a person writes them: turns 3, 5 to 9."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    said = [" to ".join(map(str, run)) for run in runs]
    return f"turn{'s' * (len(numbers) > 1)} {', '.join(said)}"
