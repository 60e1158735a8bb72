"""What a graph engine keeps in a store, as `MemoryStore.graphs`: each call is one transaction.

The engine's states are opaque here. Whatever deletes or copies a thread does so with its sessions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from still_memory import erasure, tenants, threads
from still_memory.checkpoints_table import Content
from still_memory.database import StoreFile
from still_memory.errors import ConflictError, InputError, UnknownSessionError
from still_memory.graphs_table import GraphsTable, GraphState, Otherwise, Place
from still_memory.records import Head, check_session_name, check_text
from still_memory.taint import Deleted, Forks, check_choice
from still_memory.vault import Vault

# A session's row and name to its head, and what the row of its newest checkpoint holds
Standing = Callable[[sqlite3.Connection, int, str], tuple[Head, Content]]


class Graphs:
    """The states of a tenant's graphs. Every method may raise StoreError.

    bytes_written: what this object has put into rows.
    """

    def __init__(self, file: StoreFile, vault: Vault, owner: str, standing: Standing) -> None:
        self._file, self._vault, self._owner = file, vault, owner
        self._standing = standing
        self.bytes_written = 0

    def put(self, state: GraphState, otherwise: Otherwise = lambda name: None) -> None:
        """Save a state, in place of one that stands there; on disk when this returns.

        A value that is None is the parent's of that name; where the parent has none, it is what
        `otherwise` says, or there is none. Only pieces that no state has are written.
        """
        _check(state.place)
        check_text(state.run, "a run")
        with self._writing() as table:
            written = table.put(state, otherwise)
        self.bytes_written += written

    def put_writes(
        self, place: Place, writes: Mapping[str, bytes], again: Collection[str] = ()
    ) -> None:
        """Save writes by name, for a state that may come later.

        One that is there already stays as it is, but for those named in `again`.
        """
        _check(place)
        for name in writes:
            check_text(name, "a write's name")
        with self._writing() as table:
            written = table.put_writes(place, writes, again)
        self.bytes_written += written

    def get(self, thread: str, space: str, id: str | None = None) -> GraphState | None:
        """A state with its values and writes; without an id, the latest of the space.

        DamageError if anything of it is not as it was written.
        """
        _check(Place(thread, space, id or "latest"))
        with self._reading() as table:
            place = table.latest(thread, space) if id is None else Place(thread, space, id)
            return None if place is None else table.get(place)

    def about(self, place: Place) -> bytes | None:
        """What its engine says of the state at a place, if there is one; reads no value."""
        with self._reading() as table:
            return table.about(place)

    def places(self, thread: str | None = None, space: str | None = None) -> list[Place]:
        """Where states stand, the latest id first. None: in every thread, in every space."""
        if thread is not None:
            check_session_name(thread)
        with self._reading() as table:
            return table.places(thread, space)

    def delete_thread(self, thread: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted:
        """Forget a thread: its states, and its sessions as `MemoryStore.delete` does each.

        What other threads share stays theirs. A thread that there is not is deleted already.
        """
        check_session_name(thread)
        check_choice(forks, Forks, "forks")
        with self._file.overwriting() if erase else self._file.erasing() as conn:
            if erase:
                erasure.mark(conn)
            return self._delete_thread(conn, thread, erase, forks)

    def copy_thread(self, source: str, target: str) -> None:
        """A thread once more, under another name: its states, and its sessions where they stand.

        Turns, spans and the values of states are shared, and nothing of them is read. Branches are
        called `target~2`, `target~3`, ... ConflictError if there is a thread `target` already,
        UnknownSessionError if there is no `source`; DamageError if it is not as it was written.
        """
        check_session_name(source)
        check_session_name(target)
        with self._file.writing() as conn:
            table = self._table(conn, tenants.find)
            stored, tenant = table.thread, table.tenant
            old, taken = (
                threads.sessions(conn, self._vault, tenant, stored(name))
                for name in (source, target)
            )
            if taken or table.places(target) or threads.taken(conn, tenant, stored(target)):
                raise ConflictError(f"there is a thread {target!r} already: choose another name")
            if not old and not table.places(source):
                raise UnknownSessionError(f"the store holds no thread {source!r}")
            names = (check_session_name(f"{target}~{n}") for n in count(2))
            free = (name for name in names if not threads.taken(conn, tenant, stored(name)))
            for row, name in old:
                head, content = self._standing(conn, row, name)
                called = target if name == source else next(free)
                branch_of = None if name == source else target
                threads.copy(conn, self._vault, head, content, called, branch_of, stored)
            table.copy(source, target)

    def trim_thread(self, thread: str, places: Collection[Place]) -> None:
        """Delete these states of a thread, and of its sessions every state but the newest.

        Turns stay, but for those that were left by rewinding.
        """
        check_session_name(thread)
        with self._file.erasing() as conn:
            table = self._table(conn, tenants.find)
            table.delete(places)
            stored = table.thread(thread)
            for session, _ in threads.sessions(conn, self._vault, table.tenant, stored):
                threads.trim(conn, self._vault, session)

    def delete_runs(self, runs: Collection[str]) -> Deleted:
        """Delete the states that these runs have made, in every thread.

        A thread that is left without a state is deleted with its sessions. Those of others keep
        what they have read: the engine's runs are not known to them.
        """
        with self._reading() as table:
            if not table.of_runs(runs):
                return Deleted((), (), ())
        told = Deleted((), (), ())
        with self._file.erasing() as conn:
            table = self._table(conn, tenants.find)
            places = table.of_runs(runs)
            table.delete(places)
            for thread in sorted({place.thread for place in places}):
                if not table.places(thread):
                    told = _both(told, self._delete_thread(conn, thread, False, "keep"))
        return told

    def _delete_thread(
        self, conn: sqlite3.Connection, thread: str, erase: bool, forks: Forks
    ) -> Deleted:
        table = self._table(conn, tenants.find)
        tenant, stored = table.tenant, table.thread(thread)
        graphs = threads.drop_graphs(conn, self._vault, tenant, [stored], always=True)
        gone = threads.sessions(conn, self._vault, tenant, stored)
        told = Deleted((), (), ())
        if gone:
            told = threads.delete(conn, self._vault, tenant, gone, erase=erase, forks=forks)
        return replace(told, graphs=(*graphs, *told.graphs))

    @contextmanager
    def _reading(self) -> Iterator[GraphsTable]:
        with self._file.reading() as conn:
            yield self._table(conn, tenants.find)

    @contextmanager
    def _writing(self) -> Iterator[GraphsTable]:
        with self._file.writing() as conn:
            yield self._table(conn, tenants.enter)

    def _table(
        self, conn: sqlite3.Connection, tenant: Callable[[sqlite3.Connection, str], int]
    ) -> GraphsTable:
        return GraphsTable(conn, self._vault, tenant(conn, self._owner), self._owner)


def _both(one: Deleted, other: Deleted) -> Deleted:
    return Deleted(
        one.sessions + other.sessions,
        one.session_ids + other.session_ids,
        one.shared + other.shared,
        one.graphs + other.graphs,
    )


def _check(place: Place) -> None:
    check_session_name(place.thread)
    check_text(place.space, "a namespace")
    if not check_text(place.id, "a state's id"):
        raise InputError("a state's id has at least one character")
