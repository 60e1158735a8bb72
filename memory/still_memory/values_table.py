"""Values of a graph's states: runs of opaque pieces, each piece a row that is never written twice.

A piece's row names the one that it follows, as turns do, and its address is a keyed digest of both.
So a list of two hundred messages that gains one gains one row, whichever states hold its beginning,
in whichever thread; and the address of a run's last piece vouches for every piece of it. A row
goes when no state holds it and none follows it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import accumulate

from still_memory.digests import digest
from still_memory.errors import DamageError, InputError
from still_memory.vault import Vault

# Of a row of `graph_values`: no state holds it, and none follows it.
FREE = (
    "not exists (select 1 from graph_holds h where h.value = graph_values.id)"
    " and not exists (select 1 from graph_values after where after.parent = graph_values.id)"
)


def put(
    conn: sqlite3.Connection, vault: Vault, tenant: int, pieces: Sequence[bytes]
) -> tuple[bytes, int]:
    """The address of a run's last piece, and how many bytes this call wrote."""
    if not pieces:
        raise InputError("a value of a graph's state is at least one piece")
    addresses = list(accumulate(pieces, lambda above, p: _address(vault, above, p), initial=b""))
    known, row, written = len(pieces), None, 0
    while known:  # from its end: what a run gains, it mostly gains there
        query = "select id from graph_values where address = ? and tenant = ?"
        row = conn.execute(query, (addresses[known], tenant)).fetchone()
        if row is not None:
            break
        known -= 1
    last: int | None = None if row is None else row[0]
    for piece, address in zip(pieces[known:], addresses[known + 1 :], strict=True):
        data = vault.seal(piece, "value", address)
        last = conn.execute(
            "insert into graph_values (tenant, parent, address, data) values (?, ?, ?, ?)",
            (tenant, last, address, data),
        ).lastrowid
        written += len(data)
    return addresses[-1], written


def get(conn: sqlite3.Connection, vault: Vault, tenant: int, address: bytes) -> list[bytes]:
    """The pieces of the run that ends at `address`. DamageError if any is not as it was written."""
    rows = conn.execute(
        "with recursive run (id, parent) as ("
        "  select id, parent from graph_values where address = ? and tenant = ?"
        "  union select v.id, v.parent from run join graph_values v on v.id = run.parent)"
        " select v.id, v.parent, v.address, v.data from run join graph_values v using (id)"
        " order by v.id",
        (address, tenant),
    ).fetchall()
    above, last, pieces = b"", None, []
    try:
        for row, parent, stored, data in rows:
            if parent != last:
                raise ValueError("a piece follows another than it did")
            pieces.append(opened(vault, above, stored, data))
            above, last = stored, row
        if above != address or not pieces:
            raise ValueError("it is missing")
    except ValueError as error:
        raise DamageError(
            f"a value of a graph's state is damaged ({error}); restore the store from a copy, or "
            "delete its thread"
        ) from None
    return pieces


def opened(vault: Vault, above: bytes, address: bytes, data: bytes) -> bytes:
    """A piece as it was before it was sealed. ValueError if it is not what its address tells.

    above: the address of the piece that it follows, empty for a first one.
    """
    piece = vault.open(data, "value", address)
    if _address(vault, above, piece) != address:
        raise ValueError("a piece does not match its address")
    return piece


def collect(conn: sqlite3.Connection, rows: Iterable[int]) -> None:
    """Delete of these runs what no state holds and no other run goes on from."""
    for last in rows:
        row: int | None = last
        while row is not None:
            found = conn.execute(
                f"delete from graph_values where id = ? and {FREE} returning parent", (row,)
            ).fetchone()
            row = None if found is None else found[0]


def _address(vault: Vault, above: bytes, piece: bytes) -> bytes:
    return digest(vault.key, b"still value", above, piece)
