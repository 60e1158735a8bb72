"""States of a graph in the store: what a graph engine keeps of a thread, as opaque bytes.

A state is small: what its engine says of it, and the addresses of the values that it holds, which
other states share (`values_table`). Its digest covers both, and so every value. A write is what a
task of the engine has left for the state that comes next; it may come before the state that it
belongs to, so it names the place and not the row. Threads are named as sessions are: a thread's
states and its sessions bear one name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from still_memory import values_table
from still_memory.digests import digest
from still_memory.errors import DamageError
from still_memory.records import to_json
from still_memory.vault import Vault, sessions_of

Otherwise = Callable[[str], Sequence[bytes] | None]

STATE = "thread, space, name, parent, run, holds, about, body, digest"  # columns, as `opened` reads
WRITE = "thread, space, state, name, data, digest"
_AT = "tenant = ? and thread = ? and space = ?"
_HOLDS = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


@dataclass(frozen=True)
class Place:
    """Where a state stands: in a thread, in a space of it, under an id. Later ids sort later."""

    thread: str
    space: str
    id: str


@dataclass(frozen=True)
class GraphState:
    """A state, as its engine gave it."""

    place: Place
    parent: str | None  # the id of the state before it, in its thread and space
    run: str  # the engine's run that made it, by which it can be deleted; empty: none
    about: bytes  # by which an engine chooses from many; read without the rest
    body: bytes
    # Each a run of pieces, at least one. None, in a state to be put: as its parent has it.
    values: Mapping[str, Sequence[bytes] | None]
    writes: Mapping[str, bytes] = field(default_factory=dict)  # by name, of a state that was read


class GraphsTable:
    """The states of one tenant, within one transaction. `owner`: its name as it is stored."""

    def __init__(self, conn: sqlite3.Connection, vault: Vault, tenant: int, owner: str) -> None:
        self._conn, self._vault, self._owner = conn, vault, owner
        self.tenant = tenant

    def put(self, state: GraphState, otherwise: Otherwise) -> int:
        """Save a state, in place of one that stands there; how many bytes were written.

        A value that is None is the parent's of that name; where the parent has none, it is what
        `otherwise` says, or there is none.
        """
        above = self._row(replace(state.place, id=state.parent or ""))
        told = {} if above is None else self._opened(above)[1]
        holds: dict[str, bytes] = {}
        written = 0
        for name, pieces in state.values.items():
            if pieces is None and name in told:
                holds[name] = told[name]
                continue
            pieces = otherwise(name) if pieces is None else pieces
            if pieces is not None:
                held = values_table.put(self._conn, self._vault, self.tenant, pieces)
                holds[name], new = held
                written += new
        return written + self._insert(state, holds)

    def get(self, place: Place) -> GraphState | None:
        """The state at a place, with its values and writes; each is checked before it is used."""
        row = self._row(place)
        if row is None:
            return None
        state, holds = self._opened(row)
        values = {
            name: values_table.get(self._conn, self._vault, self.tenant, address)
            for name, address in holds.items()
        }
        return replace(state, values=values, writes=self._writes(place))

    def about(self, place: Place) -> bytes | None:
        """What its engine says of the state at a place, if there is one."""
        row = self._row(place)
        return None if row is None else self._opened(row)[0].about

    def latest(self, thread: str, space: str) -> Place | None:
        """The place of the latest state of a space."""
        (name,) = self._conn.execute(
            f"select max(name) from graph_states where {_AT}",
            (self.tenant, *self._stored(Place(thread, space, ""))[:2]),
        ).fetchone()
        return None if name is None else Place(thread, space, name)

    def places(self, thread: str | None, space: str | None = None) -> list[Place]:
        """Where states stand, the latest id first. None: in every thread, in every space."""
        stored = None if thread is None else self.thread(thread)
        rows = self._conn.execute(
            "select thread, space, name from graph_states where tenant = ?1"
            " and (?2 is null or thread = ?2) order by name desc",
            (self.tenant, stored),
        ).fetchall()
        found = (self.place(*row) for row in rows)
        return [place for place in found if space is None or place.space == space]

    def of_runs(self, runs: Collection[str]) -> list[Place]:
        """The states that these runs have made, in every thread."""
        stored = to_json([self._run(run) for run in runs if run], "runs")
        rows = self._conn.execute(
            "select thread, space, name from graph_states where tenant = ? and run != ''"
            " and run in (select value from json_each(?))",
            (self.tenant, stored),
        ).fetchall()
        return [self.place(*row) for row in rows]

    def put_writes(self, place: Place, writes: Mapping[str, bytes], again: Collection[str]) -> int:
        """Save writes by name; one that is there stays, but for those named in `again`."""
        at = self._stored(place)
        written = 0
        for name, data in writes.items():
            told = self._vault.name(name, "write", self._owner, at[0])
            if name in again:
                query = f"delete from graph_writes where {_AT} and state = ? and name = ?"
                self._conn.execute(query, (self.tenant, *at, told))
            sealed = self._vault.seal(data, "write", *_parts(place), name)
            mark = digest(self._vault.key, b"still write", *at, told, sealed)
            new = self._conn.execute(
                f"insert into graph_writes (tenant, {WRITE}) values (?, ?, ?, ?, ?, ?, ?)"
                " on conflict (tenant, thread, space, state, name) do nothing",
                (self.tenant, *at, told, sealed, mark),
            ).rowcount
            written += len(sealed) * new
        return written

    def delete(self, places: Iterable[Place]) -> None:
        """Delete states with their writes, and the values that no other state holds."""
        freed: set[int] = set()
        for place in places:
            at = self.tenant, *self._stored(place)
            query = f"delete from graph_writes where {_AT} and state = ?"
            self._conn.execute(query, at)
            freed |= self._remove(at)
        values_table.collect(self._conn, freed)

    def copy(self, source: str, target: str) -> int:
        """A thread's states and writes once more, under another name; their values are shared."""
        written = 0
        for place in self.places(source):
            row = self._row(place)
            assert row is not None
            state, holds = self._opened(row)
            written += self._insert(replace(state, place=replace(place, thread=target)), holds)
        query = "select distinct space, state from graph_writes where tenant = ? and thread = ?"
        stored = self.thread(source)
        for space, name in self._conn.execute(query, (self.tenant, stored)).fetchall():
            place = self.place(stored, space, name)
            written += self.put_writes(replace(place, thread=target), self._writes(place), ())
        return written

    def thread(self, name: str) -> str:
        """A thread's name as its rows have it."""
        return self._vault.name(name, *sessions_of(self._owner))

    def place(self, thread: str, space: str, state: str) -> Place:
        """The place of a row. DamageError if its names are not as they were written."""
        try:
            name = self._vault.open_name(thread, *sessions_of(self._owner))
            return Place(name, self._vault.open_name(space, "space", self._owner, thread), state)
        except ValueError as error:
            raise _damaged("a graph's state", error) from None

    def opened(self, row: tuple[Any, ...]) -> tuple[GraphState, dict[str, bytes]]:
        """A state without its values, and their addresses. ValueError if it is damaged."""
        *told, mark = row
        thread, space, name, parent, run, holds, about, body = told
        if digest(self._vault.key, b"still graph", *told) != mark:
            raise ValueError("it does not match its digest")
        place = self.place(thread, space, name)
        parts = _parts(place)
        state = GraphState(
            place,
            parent,
            self._vault.open_name(run, "run", self._owner),
            self._vault.open(about, "about", *parts),
            self._vault.open(body, "body", *parts),
            {},
        )
        held = _HOLDS.validate_json(self._vault.open_text(holds, "holds", *parts))
        return state, {name: bytes.fromhex(address) for name, address in held.items()}

    def opened_write(self, row: tuple[Any, ...]) -> tuple[Place, str, bytes]:
        """A write with its place and name. ValueError if it is damaged."""
        thread, space, state, stored, data, mark = row
        if digest(self._vault.key, b"still write", *row[:-1]) != mark:
            raise ValueError("it does not match its digest")
        place = self.place(thread, space, state)
        name = self._vault.open_name(stored, "write", self._owner, thread)
        return place, name, self._vault.open(data, "write", *_parts(place), name)

    def _insert(self, state: GraphState, holds: Mapping[str, bytes]) -> int:
        place, parts = state.place, _parts(state.place)
        at = self._stored(place)
        told = (
            *at,
            state.parent,
            self._run(state.run),
            self._vault.seal_text(
                to_json({name: a.hex() for name, a in holds.items()}, "values"), "holds", *parts
            ),
            self._vault.seal(state.about, "about", *parts),
            self._vault.seal(state.body, "body", *parts),
        )
        freed = self._remove((self.tenant, *at))
        row = self._conn.execute(
            f"insert into graph_states (tenant, {STATE}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.tenant, *told, digest(self._vault.key, b"still graph", *told)),
        ).lastrowid
        self._conn.executemany(
            "insert into graph_holds (state, value)"
            " select ?, id from graph_values where address = ? and tenant = ?",
            [(row, address, self.tenant) for address in set(holds.values())],
        )
        values_table.collect(self._conn, freed)
        return sum(map(len, told[-3:]))

    def _remove(self, at: tuple[int, str, str, str]) -> set[int]:
        """Delete a state's row, if there is one: the values that it held."""
        state = f"(select id from graph_states where {_AT} and name = ?)"
        query = f"select value from graph_holds where state in {state}"
        held = {value for (value,) in self._conn.execute(query, at)}
        self._conn.execute(f"delete from graph_states where {_AT} and name = ?", at)
        return held

    def _row(self, place: Place) -> tuple[Any, ...] | None:
        query = f"select {STATE} from graph_states where {_AT} and name = ?"
        row: tuple[Any, ...] | None = self._conn.execute(
            query, (self.tenant, *self._stored(place))
        ).fetchone()
        return row

    def _opened(self, row: tuple[Any, ...]) -> tuple[GraphState, dict[str, bytes]]:
        try:
            return self.opened(row)
        except ValueError as error:
            raise _damaged("a graph's state", error) from None

    def _writes(self, place: Place) -> dict[str, bytes]:
        query = f"select {WRITE} from graph_writes where {_AT} and state = ?"
        rows = self._conn.execute(query, (self.tenant, *self._stored(place)))
        try:
            return {name: data for _, name, data in map(self.opened_write, rows)}
        except ValueError as error:
            raise _damaged("a write to a graph's state", error) from None

    def _stored(self, place: Place) -> tuple[str, str, str]:
        """A place as its rows have it; ids, by which states are put in order, as they are."""
        thread = self.thread(place.thread)
        return thread, self._vault.name(place.space, "space", self._owner, thread), place.id

    def _run(self, run: str) -> str:
        return self._vault.name(run, "run", self._owner)


def delete_thread(conn: sqlite3.Connection, tenant: int, thread: str) -> int:
    """Delete every state and write of a thread, damaged ones too; how many states.

    thread: as it is stored.
    """
    at = tenant, thread
    conn.execute("delete from graph_writes where tenant = ? and thread = ?", at)
    states = "from graph_states where tenant = ? and thread = ?"
    query = f"select value from graph_holds where state in (select id {states})"
    freed = {value for (value,) in conn.execute(query, at)}
    many = conn.execute(f"delete {states}", at).rowcount
    values_table.collect(conn, freed)
    return many


def _parts(place: Place) -> tuple[str, str, str]:
    return place.thread, place.space, place.id


def _damaged(what: str, error: ValueError) -> DamageError:
    return DamageError(
        f"{what} is damaged ({error}); restore the store from a copy, or delete its thread"
    )
