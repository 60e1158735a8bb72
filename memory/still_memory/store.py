"""The store: sessions, their turns and their whole state, in one SQLite file.

Spans never change, so a turn writes only what is new, in one transaction: its turns, the spans
made since the last checkpoint, the checkpoint (a short list of entries) and the session's
head, moved by compare-and-swap on its generation. Nothing written depends on how long the
conversation has been. Older checkpoints go in the same transaction, and with them the spans
that nothing points at any more. Turns form a tree: a fork or a rewind is one more checkpoint at
an earlier turn. The file's layout is docs/store-format.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from pydantic import JsonValue

from still_memory import (
    checkpoints_table,
    drafts_table,
    erasure,
    ledger,
    recognition,
    taint,
    tenants,
    threads,
    vault,
    words,
)
from still_memory.checkpoint import Checkpoint
from still_memory.codec import CODECS, EXACT, check_codec
from still_memory.database import StoreFile, give_back_pages
from still_memory.errors import (
    DamageError,
    EncryptionError,
    InputError,
    StoreError,
    deleted,
)
from still_memory.graphs import Graphs
from still_memory.identity import ModelIdentity
from still_memory.prune import Pruned, prune
from still_memory.recognition import THREAD, Known
from still_memory.records import (
    Head,
    Match,
    NewTurn,
    SessionInfo,
    StoreStats,
    TurnRecord,
    check_limit,
    check_session_name,
    to_json,
)
from still_memory.retention import Retention
from still_memory.sessions_table import (
    STANDING,
    SessionsTable,
    damaged,
    moment,
    moved_on,
    stands,
    time_of,
    unknown,
)
from still_memory.space import Space, measure
from still_memory.span import Span
from still_memory.spans_table import Packed, SpansTable
from still_memory.taint import Deleted, Forks, Taint
from still_memory.vault import Key, Secret, user_key


class MemoryStore:
    """Conversations in one file, safe with several threads and processes.

    `tenant`: whose conversations; it sees no other's, and theirs may have the same names.
    `synchronous`: with FULL, a turn is on disk when its commit returns. With NORMAL the disk is
    not waited for, so a power cut may take the newest turns (never a part of one, and never one
    that the end of a process alone would take); it is faster where syncs are slow.
    `keep_checkpoints` newest checkpoints of each session are kept. `codec`, one of
    `codec.CODECS`, is what new spans are written in from now on, by every later opening too; None
    is the store's own, at first "exact". Spans that are there stay as they are.
    `key`, 32 bytes, encrypts a store that is made here, and opens one that is encrypted; None is
    the environment's STILL_AGENT_KEY, if that is set. A store stays what it was made as, and
    EncryptionError tells of a key that does not fit.
    `bytes_written` counts what this object has put into rows: tensors, text, token ids,
    checkpoints. Every method may raise StoreError.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tenant: str = "",
        synchronous: str = "FULL",
        timeout: float = 30.0,
        keep_checkpoints: int = 2,
        codec: str | None = None,
        key: Key | None = None,
    ) -> None:
        if keep_checkpoints < 1:
            raise InputError("keep_checkpoints must be at least 1: the head is a checkpoint")
        if codec is not None:
            check_codec(codec)
        self.tenant = tenants.check_tenant(tenant)
        secret = user_key(key)
        founding = None if secret is None else partial(vault.found, key=secret)
        admitting = partial(vault.unlocked, key=secret, path=Path(path).absolute())
        self._file = StoreFile(path, synchronous, timeout, founding, admitting)
        self._keep, self._synchronous, self._timeout = keep_checkpoints, synchronous, timeout
        self.bytes_written = 0
        try:
            with self._file.reading() as conn:
                whole = vault.unlocked(conn, secret, self.path)
            self.codec = self._settle_codec(codec)
            erasure.go_on(self._file)
        except BaseException:
            self._file.close()
            raise
        self._secret = secret
        self._vault = whole.of(self.tenant)
        self._owner_name = whole.name(self.tenant, *vault.TENANTS)
        self._spans = SpansTable(self._vault, self.codec)
        self._table = SessionsTable(self._vault, self._spans, self._owner_name)
        self.graphs = Graphs(self._file, self._vault, self._owner_name, self._table.standing)

    def of_tenant(self, tenant: str) -> MemoryStore:
        """The same file, opened for another tenant."""
        return MemoryStore(
            self.path,
            tenant=tenant,
            synchronous=self._synchronous,
            timeout=self._timeout,
            keep_checkpoints=self._keep,
            key=self._secret,
        )

    @property
    def encrypted(self) -> bool:
        """Whether what was said is nowhere in the file as it was said."""
        return self._vault.encrypted

    @property
    def secret(self) -> Secret | None:
        """The user's key, None in a plain store.

        EncryptionError if another process has put the store under another one: nothing is to be
        sealed with the old.
        """
        if self._secret is not None:
            with self._file.reading() as conn:
                vault.unlocked(conn, self._secret, self.path)
        return self._secret

    @property
    def path(self) -> Path:
        return self._file.path

    def create(
        self,
        session: str,
        model: ModelIdentity,
        *,
        checkpoint: Checkpoint,
        turns: Sequence[NewTurn],
        settings: Mapping[str, JsonValue],
    ) -> Head:
        """A new session with its first turns and state; ConflictError if the name is taken.

        Settings may name the `thread` that it is a branch of.
        """
        check_session_name(session)
        packed = self._pack(checkpoint, model)
        told = to_json(dict(settings), "settings")
        start = Head(session, 0, 0, 0, None, 0, 0, model, json.loads(told))
        text = self._vault.seal_text(told, "settings")
        with self._file.writing() as conn:
            head, written = self._table.begin(conn, start, text, checkpoint, packed, turns)
        self._committed(packed, model, written)
        return head

    def fork(
        self, head: Head, name: str, checkpoint: Checkpoint, thread: str | None = None
    ) -> Head:
        """A new session that begins at the turn of `head`, in the state `checkpoint`.

        Turns and spans are shared, not copied. `head` may stand at any turn on the session's
        way. It is a branch of `thread` or, without one, a conversation of its own. ConflictError
        if the name is taken or the session has moved on from `head`;
        UnknownSessionError if it was deleted.
        """
        check_session_name(name)
        packed = self._pack(checkpoint, head.model)
        with self._file.writing() as conn:
            told = json.loads(self._vault.open_text(self._table.vouched(conn, head), "settings"))
            told = {key: value for key, value in told.items() if key != THREAD}
            told |= {} if thread is None else {THREAD: thread}
            text = self._vault.seal_text(to_json(told, "settings"), "settings")
            start = replace(head, session=name, generation=0, settings=told)
            forked, written = self._table.begin(conn, start, text, checkpoint, packed, [])
        self._committed(packed, head.model, written)
        return forked

    def commit(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        """Save a turn after `head`, whole or not at all; on disk when this returns.

        Where `head` stands at an earlier turn of the session, this rewinds it: the later turns
        go with the checkpoints that lead to them. ConflictError if the session has moved on
        from `head`'s generation, UnknownSessionError if it was deleted. An interrupt that
        arrives as this returns may leave the turn saved; `head(session)` tells.
        """
        packed = self._pack(checkpoint, head.model)
        now = moment()
        with self._file.writing() as conn:
            settings = self._table.vouched(conn, head)
            self._table.move_on(conn, head, now)
            new, written = self._table.advance(conn, head, settings, checkpoint, packed, turns, now)
            self._table.drop_states(conn, head, new.generation - self._keep)
            give_back_pages(conn)
        self._committed(packed, head.model, written)
        return new

    def head(self, session: str) -> Head | None:
        """Where the session stands, or None if there is none. Reads no tensor."""
        check_session_name(session)
        with self._file.reading() as conn:
            tenant = self._table.owner(conn)
            row = conn.execute(
                f"{STANDING} and c.generation = s.generation where s.tenant = ? and s.name = ?",
                (tenant, self._table.stored(session)),
            ).fetchone()
            if row is None:
                self._table.require_absent(conn, tenant, session)
                return None
            head = self._table.sealed(conn, session, row)
            query = "select max(generation) from checkpoints where session = ?"
            (newest,) = conn.execute(query, (head.session_id,)).fetchone()
            # an older one is sealed too, so its seal does not tell that turns are left out
            if head.generation != newest:
                raise damaged(session, "its newest checkpoint is missing")
            return head

    def ledger(self, session: str) -> Head:
        """Where the session's turns end, also if its state is damaged.

        If the newest checkpoint is no longer what was written, an older one vouches for the turns
        up to its own, and for later ones that follow them, as many as they should be.
        UnknownSessionError if there is no such session, DamageError if nothing vouches for its
        turns.
        """
        try:
            return self._existing(session)
        except DamageError as damage:
            with self._file.reading() as conn:
                query = "select id from sessions where tenant = ? and name = ?"
                row = conn.execute(
                    query, (self._table.owner(conn), self._table.stored(session))
                ).fetchone()
                found = None if row is None else self._table.vouched_ledger(conn, session, *row)
            if found is None:
                raise damage
            return found

    def recognise(
        self, told: Sequence[tuple[str, str]], thread: str, model: ModelIdentity
    ) -> Known | None:
        """The branch of a conversation that has had the longest beginning of `told`.

        told: roles and texts, oldest first. thread: the conversation's name; the empty one is of
        those that have none. None if no session of this model has had its first turn.
        """
        with self._file.reading() as conn:
            where = self._table.owner(conn), self._table.stored(thread), model.address
            found = recognition.find(conn, self._vault, *where, told)
            return (
                None if found is None else replace(found, session=self._table.named(found.session))
            )

    def branches(self, thread: str) -> list[str]:
        """The sessions of a conversation, oldest first: of its name, and those forked from it."""
        with self._file.reading() as conn:
            stored = recognition.branches(conn, self._table.owner(conn), self._table.stored(thread))
        return [self._table.named(name) for name in stored]

    def kept(self, head: Head) -> list[Head]:
        """Where the session stood on its way to `head` and `load` still finds it, newest first."""
        with self._file.reading() as conn:
            rows = conn.execute(
                "select c.generation, c.id, turn, turns, tokens from checkpoints c"
                " join sessions s on s.id = c.session where s.id = ? and s.tenant = ?"
                " order by c.generation desc",
                (head.session_id, self._table.owner(conn)),
            ).fetchall()
            way = ledger.way(conn, head.turn)
        return [
            replace(
                head, generation=generation, checkpoint=row, turn=turn, turns=turns, tokens=tokens
            )
            for generation, row, turn, turns, tokens in rows
            if turn is None or turn in way
        ]

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint:
        """The whole state at `head`, bit for bit; every digest is checked before use.

        DamageError if anything is not as it was written; ConflictError if the session has
        moved on so far that `head` is no longer kept; UnknownSessionError if it was deleted.
        """
        with self._file.reading() as conn:
            tenant = self._table.owner(conn)
            row = conn.execute(
                "select s.settings, c.turn, c.digest, c.slots, c.bytes, c.entries, c.extra"
                " from checkpoints c join sessions s on s.id = c.session"
                " where c.id = ? and c.session = ? and c.generation = ? and s.tenant = ?",
                (head.checkpoint, head.session_id, head.generation, tenant),
            ).fetchone()
            if row is None:
                raise moved_on(conn, tenant, head)
            settings, turn, mark, *content = row
            last_turn = ledger.turn_digest(conn, tenant, turn)
            found = checkpoints_table.seal(
                self._vault.key, head, last_turn, settings, tuple(content)
            )
            if turn != head.turn or found != mark:
                raise damaged(head.session, "its checkpoint does not match its digest")
            try:
                entries, extra = checkpoints_table.open_state(self._vault, head, *content[2:])
                spans = {
                    address: self._spans.get(conn, address, head.model.address, device)
                    for address in checkpoints_table.addresses_in(entries)
                }
                return checkpoints_table.build(entries, extra, head.tokens, spans)
            except ValueError as error:
                raise damaged(head.session, f"its checkpoint is not valid ({error})") from None

    def history(self, session: str | Head) -> list[TurnRecord]:
        """Every turn of the session (up to a head), oldest first, with its text and token ids."""
        head = session if isinstance(session, Head) else self._existing(session)
        with self._file.reading() as conn:
            self._table.require_turn(conn, head)
            return ledger.read(conn, self._vault, head.turn)

    def search(self, head: Head, query: str, limit: int = 20) -> list[Match]:
        """The newest turns on the way to `head` that hold every word of `query`.

        Case and accents do not count. InputError for a query without a word. In a file of several
        tenants it takes time in proportion to the session's text, and to nothing of the others'; so
        it does in an encrypted one, which has no index.
        """
        with self._file.reading() as conn:
            self._table.require_turn(conn, head)
            # an index that all share tells how often others say a word
            if self.encrypted or tenants.several(conn):
                told = ledger.texts(conn, self._vault, head.turn)
                found = words.find_among(told, query, limit)
            else:
                found = words.find(conn, query, sorted(ledger.way(conn, head.turn)), limit)
            matches = []
            for number, turn, excerpt in found:
                record = ledger.read_one(conn, self._vault, turn, number)
                matches.append(Match(number, record.role, record.created, excerpt))
        return matches

    def sessions(self, limit: int | None = None, after: str | None = None) -> list[SessionInfo]:
        """The tenant's sessions, newest first. Reads no tensor and no turn.

        limit: the most of them. after: only those that follow the session of this name, which
        raises UnknownSessionError if there is none.
        """
        with self._file.reading() as conn:
            tenant, most = self._table.owner(conn), -1 if limit is None else check_limit(limit)
            query = "select updated, id from sessions where tenant = ? and name = ?"
            told = None if after is None else (tenant, self._table.stored(after))
            last = (None, None) if told is None else conn.execute(query, told).fetchone()
            if last is None:
                raise unknown(str(after))
            rows = conn.execute(
                "select s.name, c.turns, c.tokens, c.slots, c.bytes, s.created, s.updated,"
                " m.identity ->> 'name' from sessions s"
                " join checkpoints c on c.session = s.id and c.generation = s.generation"
                " join models m on m.id = s.model where s.tenant = ?1 and s.draft_of is null"
                " and (?2 is null or (s.updated, s.id) < (?2, ?3))"
                " order by s.updated desc, s.id desc limit ?4",
                (tenant, *last, most),
            ).fetchall()
        found = []
        for stored, turns, tokens, slots, size, created, updated, model in rows:
            name = self._table.named(stored)
            times = time_of(created, name), time_of(updated, name)
            found.append(SessionInfo(name, turns, tokens, slots, size, *times, model))
        return found

    def draft(self, head: Head) -> Head | None:
        """How far the state has come that is to take this session's place, if one is on its way."""
        name = drafts_table.name_of(head.session_id)
        with self._file.reading() as conn:
            row = conn.execute(
                f"{STANDING} and c.generation = s.generation where s.draft_of = ? and s.tenant = ?",
                (head.session_id, self._table.owner(conn)),
            ).fetchone()
            return None if row is None else self._table.sealed(conn, name, row)

    def save_draft(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head:
        """Save a state that is to take the place of `head`'s, after `turns` that follow `made`.

        `made` is the draft's own head or, at first, `head` with the draft's model and settings and
        the turn at which it stands. Raises what `commit` raises, of the draft.
        """
        if made.session_id != head.session_id:
            return self.commit(made, checkpoint, turns)
        packed = self._pack(checkpoint, made.model)
        settings = self._vault.seal_text(to_json(made.settings, "settings"), "settings")
        name = drafts_table.name_of(head.session_id)
        with self._file.writing() as conn:
            tenant = self._table.owner(conn)
            if not stands(conn, tenant, head):
                raise deleted(head.session)
            if head.turn is not None and not ledger.turn_exists(conn, tenant, head.turn):
                # rows of the draft's own must not bring back what was forgotten
                raise moved_on(conn, tenant, head)
            self._table.require_on_way(conn, head, made.turn)
            start = replace(made, session=name, generation=0)
            begun, written = self._table.begin(conn, start, settings, checkpoint, packed, turns)
            told = head.session_id, begun.session_id
            conn.execute("update sessions set draft_of = ? where id = ?", told)
        self._committed(packed, made.model, written)
        return begun

    def discard_draft(self, head: Head) -> None:
        """Forget the state that was on its way to this session's place, if there is one."""
        with self._file.writing() as conn:
            if stands(conn, self._table.owner(conn), head):
                drafts_table.drop(conn, self._vault, head.session_id)

    def adopt(
        self, head: Head, made: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]
    ) -> Head:
        """Put a state in place of the session's own, after `turns` that follow `made`.

        One transaction: the new head, with `made`'s model and turns; the states that were kept, and
        the draft, go. `made` as in `save_draft`. ConflictError if the session has moved on from
        `head`, or the draft from `made`; UnknownSessionError if the session was deleted.
        """
        packed = self._pack(checkpoint, made.model)
        now = moment()
        with self._file.writing() as conn:
            settings = self._table.settings(conn, head)
            if made.session_id != head.session_id:
                self._table.vouched(conn, made)
                self._table.require_on_way(conn, head, None)
            else:
                self._table.require_on_way(conn, head, made.turn)
            self._table.move_on(conn, head, now, made.model)
            start = replace(head, model=made.model, turn=made.turn, turns=made.turns)
            new, written = self._table.advance(
                conn, start, settings, checkpoint, packed, turns, now
            )
            drafts_table.drop(conn, self._vault, head.session_id)
            self._table.drop_states(conn, head, head.generation)
            give_back_pages(conn)
        self._committed(packed, made.model, written)
        return new

    def tainted(self, turns: Collection[int]) -> list[Taint]:
        """What each session has of the turns with these ids, and what followed them there.

        Also sessions that have copies of them, by an import or a rebuild. Reads their turns.
        """
        with self._file.reading() as conn:
            tenant = self._table.owner(conn)
            return taint.trace(conn, self._vault, tenant, turns, quoting=True)[1]

    def forget(self, turns: Collection[int], made: Sequence[tuple[Head, Head]]) -> list[Head]:
        """Take the turns with these ids out of the store, with all that was computed after them.

        `made`: for each session that `tainted` names its head, and that of the draft that was
        made without them. One transaction puts the drafts in the sessions' places and deletes the
        turns, every state and span that they entered, their words from the index, and all states
        of the graphs of their threads. What is deleted is in the file's bytes until `scrub`.

        ConflictError, and nothing is changed, if a session has moved on, or another one has the
        turns by now.
        """
        now = moment()
        with self._file.overwriting() as conn:
            rows, found = taint.trace(conn, self._vault, self._table.owner(conn), turns)
            taint.require_same(found, [head for head, _ in made])
            told = threads.of(conn, [session.session_id for session in found])
            threads.drop_graphs(conn, self._vault, self._table.owner(conn), told, always=True)
            heads = [self._table.put_draft(conn, head, draft, now) for head, draft in made]
            taint.drop_states(conn, self._vault, rows)
            taint.collect(conn)
            words.erase(conn, self._vault)
            erasure.mark(conn)
        return heads

    def delete(self, session: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted:
        """Forget a session: its text, words and spans are overwritten in the file.

        What other sessions share stays theirs, copies by an import or a rebuild too, unless
        `forks` is "delete", which deletes them with it; "refuse" is a TaintedError if there are
        any. With `erase`, what the file still holds of it, and of anything deleted before, is
        for `scrub`. The states of its thread's graph go with the thread's last session; with
        `erase` they go with any, for they say in their own way what it said. Takes time in
        proportion to the text that stays, whose words are indexed anew.
        """
        check_session_name(session)
        taint.check_choice(forks, Forks, "forks")
        with self._file.overwriting() if erase else self._file.erasing() as conn:
            tenant = self._table.owner(conn)
            query = "select id from sessions where tenant = ? and name = ?"
            row = conn.execute(query, (tenant, self._table.stored(session))).fetchone()
            if row is None:
                raise unknown(session)
            gone = [(row[0], session)]
            return threads.delete(conn, self._vault, tenant, gone, erase=erase, forks=forks)

    def delete_thread(self, thread: str, *, erase: bool = False, forks: Forks = "keep") -> Deleted:
        """Forget a conversation: its branches, and its graph's states. See `delete`."""
        return self.graphs.delete_thread(thread, erase=erase, forks=forks)

    def scrub(self) -> None:
        """Have the file hold nothing that no session leads to, whenever it was deleted.

        Writes it anew and empties its log. Takes time, and room on the disk, in proportion to
        it; writers wait meanwhile. Called after `forget` and `delete`; where it was not, the next
        to open the store does it.

        ErasureError if another process reads the store for longer than its timeout: then the log
        still holds what was deleted.
        """
        erasure.scrub(self._file)

    def reindex(self) -> None:
        """Build the index of words anew from the turns that are there.

        For an index that is damaged. Takes time in proportion to all text, and writers wait. An
        encrypted store has no index: what stands there in spite of that goes.
        """
        with self._file.erasing() as conn:
            words.renew(conn, self._vault)

    def rekey(self, key: Key) -> None:
        """Put the store under another user's key; the present one does not open it any more.

        It still opens copies of the file that were made before. No row is sealed again, but the
        file is written anew, as `scrub` does it: else a part of it might still hold what the
        present key opens.

        EncryptionError for a store that is not encrypted, and for what is no key. ErasureError if
        another process reads the store for longer than its timeout: the new key is in force then,
        and the log opens with the old one until `scrub`.
        """
        secret = user_key(key)
        if self._secret is None or secret is None:
            raise EncryptionError(
                f"the store {self.path} is not encrypted: export its sessions and import them into "
                "a new store that is"
            )
        with self._file.overwriting() as conn:
            vault.rewrap(conn, self._secret, secret, self.path)
            erasure.mark(conn)
        self._secret = secret
        erasure.scrub(self._file)

    def prune(
        self, retention: Retention, *, dry_run: bool = False, all_tenants: bool = False
    ) -> Pruned:
        """Take out what `retention` does not let stay, and give its room back to the disk.

        Of the tenant's sessions or, for the file's operator, of everyone's; `max_bytes` is the
        whole file's either way. Also what an earlier call that was stopped has left, whose ever
        it was. What goes is overwritten. Done in
        many short transactions, so that turns of other threads and processes wait for one of
        them at most; a session that has a turn meanwhile stays. A deleted session is one that
        `delete` has deleted: its objects raise UnknownSessionError. With `dry_run` nothing
        changes, and the result says what would go.
        """
        with self._file.reading() as conn:
            tenant = None if all_tenants else self._table.owner(conn)
        return prune(self._file, self._vault, retention, dry_run, tenant)

    def space(self, *, all_tenants: bool = False) -> Space:
        """What takes the space, by kind and by session. Reads the length of every text.

        Of the tenant's sessions or, for the file's operator, of everyone's.
        """
        with self._file.reading() as conn:
            tenant = None if all_tenants else self._table.owner(conn)
            return measure(conn, self._vault, self._log_bytes(), tenant)

    def stats(self) -> StoreStats:
        """How large the file is, and how much of what the tenant has in it."""
        with self._file.reading() as conn:
            tenant = self._table.owner(conn)
            (page,) = conn.execute("pragma page_size").fetchone()
            (free,) = conn.execute("pragma freelist_count").fetchone()
            sessions, turns, checkpoints, graphs, spans, size = conn.execute(
                "select (select count(*) from sessions where tenant = ?1 and draft_of is null),"
                " (select count(*) from turns where tenant = ?1),"
                " (select count(*) from checkpoints where session in"
                " (select id from sessions where tenant = ?1)),"
                " (select count(*) from graph_states where tenant = ?1),"
                " count(*), coalesce(sum(bytes), 0)"
                " from spans where model in (select id from models where tenant = ?1)",
                (tenant,),
            ).fetchone()
        return StoreStats(
            sessions=sessions,
            turns=turns,
            checkpoints=checkpoints,
            spans=spans,
            span_bytes=size,
            graph_states=graphs,
            file_bytes=self.path.stat().st_size,
            wal_bytes=self._log_bytes(),
            free_bytes=free * page,
        )

    def close(self) -> None:
        """Close the file; what was committed is on disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _settle_codec(self, chosen: str | None) -> str:
        """The codec of new spans; the choice is kept in the file."""
        query = "select value from meta where name = 'codec'"
        with self._file.reading() as conn:
            row = conn.execute(query).fetchone()
        known = EXACT if row is None else bytes(row[0]).decode("utf-8", "replace")
        if chosen not in (None, known):
            known = chosen
            with self._file.writing() as conn:
                conn.execute("insert or replace into meta values ('codec', ?)", [known.encode()])
        if known not in CODECS:
            raise StoreError(
                f"the store {self.path} writes new spans in {known[:20]!r}, which this version "
                "does not know: upgrade still-agent, or choose a codec"
            )
        return known

    def _log_bytes(self) -> int:
        log = self.path.with_name(self.path.name + "-wal")
        return log.stat().st_size if log.exists() else 0

    def _pack(self, checkpoint: Checkpoint, model: ModelIdentity) -> dict[Span, Packed]:
        return {e.span: self._spans.pack(e.span, model.address) for e in checkpoint.entries}

    def _committed(self, packed: Mapping[Span, Packed], model: ModelIdentity, written: int) -> None:
        for span, pack in packed.items():
            self._spans.learn(span, pack.address, model.address)
        self.bytes_written += written

    def _existing(self, session: str) -> Head:
        head = self.head(session)
        if head is None:
            raise unknown(session)
        return head
