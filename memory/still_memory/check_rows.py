"""The rows of a store, one after another: each is what its digest says, and none is alone.

What a session reads when it resumes is checked by the functions that it is read with.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import datetime

from still_memory import checkpoints_table, drafts_table, erasure, ledger
from still_memory.errors import StoreError
from still_memory.findings import Noted
from still_memory.identity import ModelIdentity
from still_memory.recognition import thread_of
from still_memory.records import Head, check_session_name
from still_memory.span import Span
from still_memory.spans_table import SpansTable
from still_memory.tenants import DEFAULT, check_tenant
from still_memory.vault import TENANTS, Vault, sessions_of


def tenants(conn: sqlite3.Connection, vault: Vault, noted: Noted) -> dict[int, Vault]:
    """The tenants' vaults, by row; of those whose names can be read."""
    found: dict[int, Vault] = {}
    for row, name in conn.execute("select id, name from tenants"):
        try:
            if (name == "") != (row == DEFAULT):
                raise ValueError("the default tenant alone has no name")
            found[row] = vault.of(check_tenant(vault.open_name(name, *TENANTS)))
        except ValueError as error:
            noted.add("tenant", f"its name cannot be used ({error})", row=row)
    return found


def models(conn: sqlite3.Connection, noted: Noted) -> dict[int, ModelIdentity]:
    """The models that are whole, by row."""
    found: dict[int, ModelIdentity] = {}
    for row, address, identity in conn.execute("select id, address, identity from models"):
        try:
            found[row] = ModelIdentity.model_validate_json(identity)
            if found[row].address == address:
                continue
            how = "it does not match its address"
        except ValueError:
            how = "its description cannot be read"
        found.pop(row, None)
        held = conn.execute(
            "select c.id from checkpoints c join sessions s on s.id = c.session where s.model = ?",
            (row,),
        ).fetchall()
        noted.add("model", how, checkpoints=[c for (c,) in held], row=row)
    return found


def sessions(conn: sqlite3.Connection, vault: Vault, noted: Noted) -> None:
    """Names, times and settings can be read, and the head is the newest checkpoint."""
    rows = conn.execute(
        "select s.id, n.name, s.name, m.tenant != s.tenant, o.tenant != s.tenant, s.generation,"
        " s.created, s.updated, s.settings, s.thread,"
        " (select max(c.generation) from checkpoints c where c.session = s.id)"
        " from sessions s left join tenants n on n.id = s.tenant"
        " left join models m on m.id = s.model left join sessions o on o.id = s.draft_of"
    )
    for row, tenant, stored, model, origin, generation, *times, settings, thread, newest in rows:
        name = noted.named(tenant or "", stored)
        if model:
            noted.add("session", "its model is another tenant's", sessions=[name], row=row)
        if origin:
            how = "it is a draft of another tenant's session"
            noted.add("session", how, sessions=[name], row=row)
        try:
            own = vault.open_name(stored, *sessions_of(tenant or ""))
            if not (type(own) is str and drafts_table.is_name(own)):
                check_session_name(own)
            for time in times:
                datetime.fromisoformat(time)
            whose = vault.of(vault.open_name(tenant or "", *TENANTS))
            told = thread_of(json.loads(whose.open_text(settings, "settings")))
            if thread != (None if told is None else vault.name(told, *sessions_of(tenant or ""))):
                raise ValueError("it is not listed under its thread")
        except (ValueError, RecursionError) as error:
            noted.add("session", f"it cannot be read ({error})", sessions=[name], row=row)
        if newest is None or newest < generation:
            noted.add("session", "its newest checkpoint is missing", sessions=[name], row=row)
        elif newest > generation:
            noted.add(
                "session", f"its head is {generation}, and checkpoint {newest} is newer",
                sessions=[name], row=row,
            )  # fmt: skip


def turns(conn: sqlite3.Connection, vaults: Mapping[int, Vault], noted: Noted) -> Iterator[int]:
    """Each turn matches its digest, and follows one that was there before it."""
    rows = conn.execute(
        "select t.id, t.tenant, t.parent, p.id, p.tenant, p.digest, t.digest, t.said, t.role,"
        " t.created, t.usage, t.tokens, t.text from turns t left join turns p on p.id = t.parent"
        " order by t.id"
    )
    for done, (row, tenant, parent, there, its, above, mark, told, *said) in enumerate(rows, 1):
        try:
            if tenant not in vaults:
                raise ValueError("its tenant is not known")
            if there is not None and its != tenant:
                raise ValueError("it follows a turn of another tenant")
            if parent is not None and parent >= row:
                raise ValueError("it follows a turn that is later than itself")
            if parent is not None and there is None:
                continue  # told with the references
            if ledger.mark(vaults[tenant], above or b"", told, said) != mark:
                raise ValueError("it does not match its digest")
            said = [*ledger.opened(vaults[tenant], above or b"", said)]
            datetime.fromisoformat(said[1]), json.loads(said[2])
            if len(said[3]) % 4:
                raise ValueError(f"{len(said[3])} bytes of tokens")
        except (ValueError, RecursionError) as error:
            noted.turn(str(error), row)
        yield done


def checkpoints(
    conn: sqlite3.Connection,
    vaults: Mapping[int, Vault],
    models: Mapping[int, ModelIdentity],
    noted: Noted,
) -> Iterator[int]:
    """Each checkpoint matches its digest, makes a state, and holds the spans that it names."""
    rows = conn.execute(
        "select c.id, s.tenant, s.name, s.model, s.settings, c.generation, c.turn, t.digest,"
        " t.tenant, c.turns, c.tokens, c.digest, c.slots, c.bytes, c.entries, c.extra, n.name"
        " from checkpoints c join sessions s on s.id = c.session"
        " left join tenants n on n.id = s.tenant"
        " left join turns t on t.id = c.turn order by c.id"
    )
    for done, row in enumerate(rows, 1):
        identity, tenant, stored, model, settings, generation, turn, last, its, *rest, owner = row
        turns, tokens, mark, *rest = rest
        if model in models and (turn is None or last is not None):  # else that was told
            try:
                if tenant not in vaults:
                    raise ValueError("its session's tenant is not known")
                if turn is not None and its != tenant:
                    raise ValueError("its last turn is another tenant's")
                content, vault = tuple(rest), vaults[tenant]
                name = vault.open_name(stored, *sessions_of(owner))
                head = Head(name, 0, generation, identity, turn, turns, tokens, models[model], {})
                if checkpoints_table.seal(vault.key, head, last or b"", settings, content) != mark:
                    raise ValueError("it does not match its digest")
                state = checkpoints_table.open_state(vault, head, *rest[2:])
                _check_entries(noted, conn, identity, model, tokens, *state)
            except (ValueError, RecursionError) as error:
                noted.checkpoint(str(error), identity)
        yield done


def spans(conn: sqlite3.Connection, vaults: Mapping[int, Vault], noted: Noted) -> Iterator[int]:
    """Every layer of every span is what was written. Yields the bytes that are read."""
    tables = {tenant: SpansTable(vault) for tenant, vault in vaults.items()}
    rows = conn.execute(
        "select s.id, s.address, m.tenant, m.address, s.bytes from spans s"
        " join models m on m.id = s.model order by s.id"
    )
    done = 0
    for row, address, tenant, model, size in rows:
        try:
            if tenant not in tables:
                raise ValueError("its model's tenant is not known")
            for layer, how in tables[tenant].faults(conn, address, model):
                noted.span(how, row, address, layer)
        except (StoreError, ValueError) as error:
            noted.span(str(error), row, address, None)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_NOMEM")):
                raise
            noted.span(f"SQLite cannot read it: {error}", row, address, None)
        done += size if type(size) is int else 0  # a damaged row may hold values of any type
        yield done


def leftovers(conn: sqlite3.Connection, noted: Noted) -> None:
    """What a prune that was stopped has still to collect, or an erasure to overwrite."""
    many, size = conn.execute(
        "select count(*), coalesce(sum(bytes), 0) from spans where not exists"
        " (select 1 from checkpoint_spans r where r.span = spans.id)"
    ).fetchone()
    if many:
        noted.add("leftover", f"{many} spans of {size:,} bytes, which no session holds")
    (many,) = conn.execute(
        "with recursive led (id) as (select turn from checkpoints"
        " union select t.parent from led join turns t using (id) where t.parent not null)"
        " select count(*) from turns where id not in (select id from led where id not null)"
    ).fetchone()
    if many:
        noted.add("leftover", f"{many} turns that no session leads to")
    if erasure.marked(conn) is not None:
        noted.add("leftover", "an erasure did not end: the file may hold what was erased")


def _check_entries(
    noted: Noted,
    conn: sqlite3.Connection,
    checkpoint: int,
    model: int,
    tokens: int,
    entries: str,
    extra: str,
) -> None:
    """The entries are a state of spans that are there, of this model, and held by references."""
    query = "select span from checkpoint_spans where checkpoint = ?"
    held = {span for (span,) in conn.execute(query, (checkpoint,))}
    hollow: dict[str, Span] = {}
    for address in checkpoints_table.addresses_in(entries):
        row = conn.execute(
            'select id, model, start, "end", rotated_at, rounds from spans where address = ?',
            (address,),
        ).fetchone()
        if row is None:
            noted.checkpoint("a span that it names is missing", checkpoint, span=address)
            continue
        span, made_by, start, end, rotated_at, rounds = row
        if made_by != model:
            noted.checkpoint("a span of another model", checkpoint, span=address)
        if span not in held:
            noted.checkpoint(
                "its reference to a span is missing", checkpoint, "reference", span=address
            )
        held.discard(span)
        hollow[address] = Span(start, end, (), rotated_at, rounds)
    for span in sorted(held):
        how = f"it holds span row {span}, which it does not name"
        noted.checkpoint(how, checkpoint, "reference")
    if len(hollow) == len(checkpoints_table.addresses_in(entries)):
        checkpoints_table.build(entries, extra, tokens, hollow)
