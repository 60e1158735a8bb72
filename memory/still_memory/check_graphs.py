"""Of a check: the states of graphs, against their digests, their values and each other."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from still_memory import values_table
from still_memory.errors import StoreError
from still_memory.findings import Noted
from still_memory.graphs_table import STATE, WRITE, GraphsTable
from still_memory.vault import Vault

TABLES = ("graph_states", "graph_values", "graph_holds", "graph_writes")


def states(conn: sqlite3.Connection, vaults: Mapping[int, Vault], noted: Noted) -> Iterator[int]:
    """Each state matches its digest, and holds the values that it names, and no others."""
    rows = _rows(conn, vaults, "states", "id", STATE)
    for done, (row, thread, table, told) in enumerate(rows, 1):
        try:
            if table is None:
                raise ValueError("its tenant is not known")
            _, holds = table.opened(told)
            held = {
                address
                for (address,) in conn.execute(
                    "select v.address from graph_holds h join graph_values v on v.id = h.value"
                    " where h.state = ? and v.tenant = ?",
                    (row, table.tenant),
                )
            }
            if held != set(holds.values()):
                raise ValueError("the values that it holds are not those that it names")
        except (ValueError, StoreError) as error:
            noted.graph(f"a state is damaged: {error}", row, thread)
        yield done


def values(conn: sqlite3.Connection, vaults: Mapping[int, Vault], noted: Noted) -> None:
    """Each piece matches its address, and follows one that was there before it."""
    rows = conn.execute(
        "select v.id, v.tenant, v.parent, p.id, p.tenant, p.address, v.address, v.data"
        " from graph_values v left join graph_values p on p.id = v.parent order by v.id"
    )
    for row, tenant, parent, there, its, above, address, data in rows:
        try:
            if tenant not in vaults:
                raise ValueError("its tenant is not known")
            if parent is not None and (there is None or its != tenant or there >= row):
                raise ValueError("what it follows is not there")
            values_table.opened(vaults[tenant], above or b"", address, data)
        except ValueError as error:
            noted.graph(f"a value is damaged: {error}", row, _holder(conn, row))


def writes(conn: sqlite3.Connection, vaults: Mapping[int, Vault], noted: Noted) -> None:
    """Each write matches its digest."""
    for row, thread, table, told in _rows(conn, vaults, "writes", "null", WRITE):
        try:
            if table is None:
                raise ValueError("its tenant is not known")
            table.opened_write(told)
        except (ValueError, StoreError) as error:
            noted.graph(f"a write is damaged: {error}", row, thread)


def leftovers(conn: sqlite3.Connection) -> int:
    """How many values no state holds, and no other value goes on from."""
    query = f"select count(*) from graph_values where {values_table.FREE}"
    (many,) = conn.execute(query).fetchone()
    return int(many)


def _rows(
    conn: sqlite3.Connection, vaults: Mapping[int, Vault], table: str, row: str, columns: str
) -> Iterator[tuple[int | None, tuple[str, str], GraphsTable | None, tuple[Any, ...]]]:
    """Rows with their id, their tenant's and thread's stored names, and what reads them."""
    owners = dict(conn.execute("select id, name from tenants"))
    query = f"select {row}, tenant, {columns} from graph_{table}"
    for identity, tenant, *told in conn.execute(query):
        owner, vault = owners.get(tenant, ""), vaults.get(tenant)
        reader = None if vault is None else GraphsTable(conn, vault, tenant, owner)
        yield identity, (owner, told[0]), reader, tuple(told)


def _holder(conn: sqlite3.Connection, value: int) -> tuple[str, str]:
    """The stored names of the tenant and of a thread whose states hold a value."""
    row: tuple[str, str] | None = conn.execute(
        "with recursive led (id) as (select ?1"
        " union select v.id from led join graph_values v on v.parent = led.id)"
        " select n.name, s.thread from graph_holds h join graph_states s on s.id = h.state"
        " join tenants n on n.id = s.tenant where h.value in (select id from led) limit 1",
        (value,),
    ).fetchone()
    return row or ("", "")
