"""Tenants: a namespace inside every key of a store.

A tenant's sessions, models and turns are rows under its number, and its digests and addresses are
made with a key of its own. So two tenants may use the same names and say the same words: nothing
of either is found, shared, or even quicker to write because of the other. A row that was moved
from one to another no longer matches its digest.
"""

from __future__ import annotations

import sqlite3

from still_memory.digests import digest
from still_memory.errors import DamageError, InputError
from still_memory.records import check_text

MAX_TENANT_NAME = 512
NOBODY, DEFAULT = 0, 1  # rows of `tenants`: one that there never is, and that of the empty name


def check_tenant(name: str) -> str:
    """Any Unicode text of at most 512 characters names a tenant; texts that differ are others.

    The empty one is the default tenant, and a store from before there were tenants is its.
    """
    name = check_text(name, "a tenant")
    if len(name) > MAX_TENANT_NAME:
        raise InputError(
            f"a tenant has at most {MAX_TENANT_NAME} characters, and this one has {len(name)}"
        )
    return name


def key_of(store_key: bytes, tenant: str) -> bytes:
    """The key of a tenant's digests and addresses; the default tenant has the store's own."""
    return digest(store_key, b"still tenant", tenant) if tenant else store_key


def find(conn: sqlite3.Connection, tenant: str) -> int:
    """The tenant's row, or `NOBODY`, who has none: whoever only looks leaves no trace.

    DamageError if the index of names has lost it, or its sessions would be begun anew.
    """
    if not tenant:
        return DEFAULT
    row = conn.execute("select id from tenants where name = ?", (tenant,)).fetchone()
    if row is not None:
        return int(row[0])
    query = "select 1 from tenants not indexed where name = ?"
    if conn.execute(query, (tenant,)).fetchone() is not None:
        raise DamageError("the index of tenants is damaged; restore the store from a copy")
    return NOBODY


def enter(conn: sqlite3.Connection, tenant: str) -> int:
    """The tenant's row, made with its first session."""
    row = find(conn, tenant)
    if row == NOBODY:
        query = "insert into tenants (name) values (?) returning id"
        (row,) = conn.execute(query, (tenant,)).fetchone()
    return row


def several(conn: sqlite3.Connection) -> bool:
    """Whether the file has had sessions of another tenant than the default one."""
    return conn.execute("select 1 from tenants where id > ?", (DEFAULT,)).fetchone() is not None


def label(tenant: str, session: str) -> str:
    """What an operator, who sees all tenants, is told of a session."""
    return f"{session} (tenant {tenant!r})" if tenant else session
