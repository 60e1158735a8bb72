"""The rows of one tenant's sessions: what a head rests on, and how it moves on.

A session is a row that names its newest checkpoint, whose digest covers the session's settings, its
turns and its spans. So whatever is about to seal a new one looks first, under the write lock,
whether the old one still vouches for all of that: else it would make good whatever has become of
it since.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pydantic import JsonValue

from still_memory import checkpoints_table, drafts_table, ledger, tenants, vault, words
from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, DamageError, UnknownSessionError, deleted
from still_memory.identity import ModelIdentity
from still_memory.recognition import thread_of
from still_memory.records import Head, NewTurn, to_json
from still_memory.span import Span
from still_memory.spans_table import Packed, SpansTable
from still_memory.vault import Vault

# A session and one of its checkpoints, as `sealed` reads them.
STANDING = (
    "select s.id, coalesce(c.generation, s.generation), s.settings, m.address, m.identity, c.id,"
    " c.turn, c.turns, c.tokens, c.slots, c.bytes, c.entries, c.extra, c.digest from sessions s"
    " left join models m on m.id = s.model and m.tenant = s.tenant"
    " left join checkpoints c on c.session = s.id"
)


class SessionsTable:
    """The sessions of one tenant, whose name is as the store has it."""

    def __init__(self, vault: Vault, spans: SpansTable, tenant: str) -> None:
        self._vault, self._spans, self._tenant = vault, spans, tenant

    def owner(self, conn: sqlite3.Connection) -> int:
        """The tenant's row. Not kept: another process may make it, or a rollback undo it."""
        return tenants.find(conn, self._tenant)

    def stored(self, session: str) -> str:
        """A session's name as its row has it."""
        return self._vault.name(session, *vault.sessions_of(self._tenant))

    def named(self, stored: str) -> str:
        """A session's name, from what its row has; as it is there, if that is damaged."""
        return self._vault.names(self._tenant, stored)[1]

    def require_absent(self, conn: sqlite3.Connection, tenant: int, session: str) -> None:
        """DamageError for a session that is there, and that the index of names has lost.

        Else a damaged byte would begin a conversation anew that has months behind it.
        """
        query = "select 1 from sessions not indexed where tenant = ? and name = ?"
        if conn.execute(query, (tenant, self.stored(session))).fetchone() is not None:
            raise damaged(session, "the index of names has lost it")

    def standing(
        self, conn: sqlite3.Connection, session: int, name: str
    ) -> tuple[Head, checkpoints_table.Content]:
        """The head of a session's row, and what the row of its newest checkpoint holds."""
        query = f"{STANDING} and c.generation = s.generation where s.id = ?"
        row = conn.execute(query, (session,)).fetchone()
        return self.sealed(conn, name, row), row[9:13]

    def sealed(self, conn: sqlite3.Connection, session: str, row: tuple[Any, ...]) -> Head:
        """The head of a row of `STANDING`, if its checkpoint is as it was written."""
        identity, generation, settings, address, made_by, *saved = row
        checkpoint, turn, turns, tokens, slots, size, entries, extra, mark = saved
        if checkpoint is None or made_by is None:
            raise damaged(session, "its newest checkpoint is missing")
        last_turn = ledger.turn_digest(conn, self.owner(conn), turn)
        try:
            model = ModelIdentity.model_validate_json(made_by)
            told = self._vault.open_text(settings, "settings")
            known: dict[str, JsonValue] = json.loads(told)
        except (ValueError, TypeError):  # a damaged row may hold values of any type
            raise damaged(session, "its description cannot be read") from None
        head = Head(session, identity, generation, checkpoint, turn, turns, tokens, model, known)
        content = slots, size, entries, extra
        found = checkpoints_table.seal(self._vault.key, head, last_turn, settings, content)
        if found != mark or model.address != address:
            raise damaged(session, "its newest checkpoint does not match its digest")
        return head

    def settings(self, conn: sqlite3.Connection, head: Head) -> str:
        """The session's settings as they are stored, if it still stands at `head`'s generation."""
        tenant = self.owner(conn)
        query = "select settings from sessions where id = ? and generation = ? and tenant = ?"
        row = conn.execute(query, (head.session_id, head.generation, tenant)).fetchone()
        if row is None:
            raise moved_on(conn, tenant, head)
        settings: str = row[0]
        return settings

    def vouched(self, conn: sqlite3.Connection, head: Head) -> str:
        """What `settings` gives, if the session is as its newest checkpoint vouches for it.

        The next seal will cover these settings and the digest of the turn at `head`. Were they not
        looked at here, under the lock, it would make good whatever has become of them since.
        """
        tenant = self.owner(conn)
        row = conn.execute(
            f"{STANDING} and c.generation = s.generation"
            " where s.id = ? and s.generation = ? and s.tenant = ?",
            (head.session_id, head.generation, tenant),
        ).fetchone()
        if row is None:
            raise moved_on(conn, tenant, head)
        newest = self.sealed(conn, head.session, row)
        if head.turn not in (None, newest.turn):
            query = (
                "select o.id, o.name from sessions s join sessions o on o.id = s.draft_of"
                " where s.id = ?"
            )
            origin = conn.execute(query, (head.session_id,)).fetchone()
            if origin is None:
                self.require_among(conn, head, newest.turn)
            else:  # a draft may go on with turns of the session that it is of
                source = replace(head, session=self.named(origin[1]), session_id=origin[0])
                self.require_on_way(conn, source, head.turn)
        settings: str = row[2]
        return settings

    def vouched_ledger(self, conn: sqlite3.Connection, session: str, identity: int) -> Head | None:
        """Where the session's turns end, as its newest checkpoint that is whole vouches for it."""
        query = f"{STANDING} where s.id = ? order by c.generation desc"
        rows = conn.execute(query, (identity,)).fetchall()
        for row in rows:
            try:
                head = self.sealed(conn, session, row)
            except DamageError:
                continue
            turn, turns = rows[0][6:8]
            way = ledger.way(conn, turn)
            if len(way) == turns and (head.turn is None or head.turn in way):
                head = replace(head, turn=turn, turns=turns)
            query = "select generation from sessions where id = ?"
            (generation,) = conn.execute(query, (identity,)).fetchone()
            return replace(head, generation=generation)
        return None

    def require_on_way(self, conn: sqlite3.Connection, head: Head, turn: int | None) -> None:
        """As `vouched`, for what mends a session: an older checkpoint may vouch for it."""
        known = self.vouched_ledger(conn, head.session, head.session_id)
        if known is None:
            raise damaged(head.session, "none of its checkpoints matches its digest")
        if turn is not None:
            self.require_among(conn, replace(head, turn=turn), known.turn)

    def require_among(self, conn: sqlite3.Connection, head: Head, last: int | None) -> None:
        """The turn of `head` leads to `last`, and each turn on that way is as it was written."""
        if head.turn not in {turn.id for turn in ledger.read(conn, self._vault, last)}:
            self.settings(conn, head)
            raise damaged(head.session, f"turn {head.turn} does not lead to where it stands")

    def require_turn(self, conn: sqlite3.Connection, head: Head) -> None:
        """Tell a turn that another writer has rewound or deleted from one that is damaged."""
        tenant = self.owner(conn)
        if head.turn is not None and not ledger.turn_exists(conn, tenant, head.turn):
            self.settings(conn, head)
            raise ledger.missing(head.turn)

    def begin(
        self,
        conn: sqlite3.Connection,
        start: Head,
        settings: str,
        checkpoint: Checkpoint,
        packed: Mapping[Span, Packed],
        turns: Sequence[NewTurn],
    ) -> tuple[Head, int]:
        """The rows of a new session that begins at the turn of `start`."""
        name, tenant = start.session, tenants.enter(conn, self._tenant)
        thread = thread_of(start.settings)
        query = "select 1 from sessions where tenant = ? and name = ?"
        if conn.execute(query, (tenant, self.stored(name))).fetchone():
            raise ConflictError(
                f"session {name!r} exists already: choose another name, or resume it"
            )
        now = moment()
        (identity,) = conn.execute(
            "insert into sessions"
            " (tenant, name, generation, model, created, updated, settings, thread)"
            " values (?, ?, 1, ?, ?, ?, ?, ?) returning id",
            (
                tenant, self.stored(name), self.model_id(conn, start.model), now, now, settings,
                None if thread is None else self.stored(thread),
            ),
        ).fetchone()  # fmt: skip
        start = replace(start, session_id=identity)
        head, written = self.advance(conn, start, settings, checkpoint, packed, turns, now)
        return head, written + len(settings)

    def advance(
        self,
        conn: sqlite3.Connection,
        head: Head,
        settings: str,
        checkpoint: Checkpoint,
        packed: Mapping[Span, Packed],
        turns: Sequence[NewTurn],
        now: str,
    ) -> tuple[Head, int]:
        """The rows of the next generation: the head that they make, and their bytes."""
        tenant = self.owner(conn)
        turn, last_turn, written = ledger.append(conn, self._vault, tenant, head.turn, turns, now)
        model_id = self.model_id(conn, head.model)
        held: dict[int, int] = {}
        for span, pack in packed.items():
            row, size, new = self._spans.put(conn, span, pack, head.model.address, model_id)
            held[row] = size
            written += new
        addresses = {span: pack.address for span, pack in packed.items()}
        entries = checkpoints_table.dump_entries(checkpoint, addresses)
        extra = to_json(dict(checkpoint.extra), "a checkpoint's extra state")
        new_head = replace(
            head,
            generation=head.generation + 1,
            turn=turn,
            turns=head.turns + len(turns),
            tokens=checkpoint.length,
        )
        stored = checkpoints_table.seal_state(self._vault, new_head, entries, extra)
        content = checkpoint.slots, sum(held.values()), *stored
        mark = checkpoints_table.seal(self._vault.key, new_head, last_turn, settings, content)
        identity = checkpoints_table.insert(conn, new_head, content, mark)
        conn.executemany(
            "insert into checkpoint_spans (checkpoint, span) values (?, ?)",
            [(identity, row) for row in held],
        )
        return replace(new_head, checkpoint=identity), written + len(entries) + len(extra)

    def move_on(
        self, conn: sqlite3.Connection, head: Head, now: str, model: ModelIdentity | None = None
    ) -> None:
        """Have the session name the next generation, whose checkpoint is about to be written."""
        conn.execute(
            "update sessions set generation = ?, updated = ? where id = ?",
            (head.generation + 1, now, head.session_id),
        )
        if model is not None:
            query = "update sessions set model = ? where id = ?"
            conn.execute(query, (self.model_id(conn, model), head.session_id))

    def drop_states(self, conn: sqlite3.Connection, head: Head, newest: int) -> None:
        """Delete the session's states up to a generation, and what they alone lead to."""
        for turn in checkpoints_table.collect(conn, head.session_id, newest):
            words.remove(conn, self._vault, *turn)

    def put_draft(self, conn: sqlite3.Connection, head: Head, draft: Head, now: str) -> Head:
        """Put a saved draft in place of the session's own state; its spans are not read."""
        settings = self.settings(conn, head)
        self.require_on_way(conn, head, None)
        self.settings(conn, draft)
        made, content = self.standing(conn, draft.session_id, draft.session)
        self.move_on(conn, head, now, made.model)
        new = replace(
            head,
            generation=head.generation + 1,
            turn=made.turn,
            turns=made.turns,
            tokens=made.tokens,
            model=made.model,
        )
        last_turn = ledger.turn_digest(conn, self.owner(conn), new.turn)
        new = checkpoints_table.again(
            conn, self._vault, made, new, last_turn, settings, content, "{}"
        )
        drafts_table.drop(conn, self._vault, head.session_id)
        self.drop_states(conn, head, head.generation)
        return new

    def model_id(self, conn: sqlite3.Connection, model: ModelIdentity) -> int:
        query = "select id, identity from models where tenant = ? and address = ?"
        owned = self.owner(conn), model.address
        row: tuple[int, str] | None = conn.execute(query, owned).fetchone()
        told = model.model_dump_json()
        if row is None:
            row = conn.execute(
                "insert into models (tenant, address, identity) values (?, ?, ?)"
                " returning id, identity",
                (*owned, told),
            ).fetchone()
            assert row is not None
        elif row[1] != told and row[1] == model.unnamed.model_dump_json():
            conn.execute("update models set identity = ? where id = ?", (told, row[0]))
        return row[0]


def moment() -> str:
    return datetime.now(UTC).isoformat()


def time_of(written: str, session: str) -> datetime:
    try:
        return datetime.fromisoformat(written)
    except (ValueError, TypeError):  # a damaged row may hold values of any type
        raise damaged(session, "its times cannot be read") from None


def stands(conn: sqlite3.Connection, tenant: int, head: Head) -> bool:
    """Whether the tenant has the session, at whichever generation."""
    query = "select 1 from sessions where id = ? and tenant = ?"
    return conn.execute(query, (head.session_id, tenant)).fetchone() is not None


def moved_on(
    conn: sqlite3.Connection, tenant: int, head: Head
) -> ConflictError | UnknownSessionError:
    """Why there is nothing at `head`."""
    if not stands(conn, tenant, head):
        return deleted(head.session)
    return ConflictError(
        f"session {head.session!r} has moved on from generation {head.generation}, by another "
        "writer: open it again, and repeat the turn there"
    )


def unknown(session: str) -> UnknownSessionError:
    return UnknownSessionError(
        f"the store holds no session {session!r}; sessions() lists those that it holds"
    )


def damaged(session: str, how: str) -> DamageError:
    return DamageError(
        f"session {session!r} is damaged: {how}. Restore the store from a copy, or have its state "
        "computed anew from its text, by Agent.rebuild or `still-agent sessions rebuild`"
    )
