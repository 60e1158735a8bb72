"""A conversation: messages in, replies out, saved turn by turn.

A turn happens whole or not at all. It is computed in the live state and then committed in one
transaction; whatever ends it before that (an error, Ctrl-C, a stream that is left early, a
full disk) puts the state back to the last checkpoint, which costs one filling of the cache,
since spans never change. The one exception is `read`, which saves a long text part by part.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from inspect import GEN_CLOSED, getgeneratorstate
from types import TracebackType
from typing import Any, Self

from pydantic import JsonValue

from still_agent.decode import answer
from still_agent.ephemeral import Store
from still_agent.events import OnReplay
from still_agent.forget import Forgotten
from still_agent.replay import Restored, replay
from still_agent.reply import Reply, Usage
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_agent.steps import Steps
from still_agent.stream import Pieces, Stream, pieces_of
from still_agent.text import check_message, parts
from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, InputError, StillError, deleted
from still_memory.records import Head, Match, NewTurn, TurnRecord
from still_memory.taint import Later

Forget = Callable[[str, Sequence[int], Later, OnReplay | None], Forgotten]  # turns by their ids


@dataclass(frozen=True)
class Stats:
    """A session's size."""

    logical_tokens: int
    slots: int
    pinned: int  # of these slots, those of the pinned prefix,
    memory: int  # of compacted memory,
    tail: int  # and of raw tokens
    held_bytes: int  # the live cache and the spans it is filled from
    full_bytes: int  # what a full cache of `logical_tokens` would take
    rounds: int  # the most compactions behind any token
    turns: int


class Session:
    """One conversation, as `Agent.session` opens it.

    Safe with threads: turns wait for each other, but an open stream does not keep others out
    between its pieces: a turn that begins then abandons it. Every method may raise a
    StillError; after ConflictError (another process has moved the session on) open it again
    with `Agent.session`. UnknownSessionError tells that the session was deleted: this object
    never brings it back.
    """

    def __init__(
        self,
        state: RollingState,
        steps: Steps,
        store: Store,
        head: Head,
        saved: Checkpoint,
        *,
        reopen: Callable[[Head], Session],
        forget: Forget,
        sampling: Sampling,
        longest_message: int,
    ) -> None:
        self.id = head.session
        self.last_reply: Reply | None = None
        self.restored: Restored | None = None  # how this state was come by, unless by living it
        self.lock = threading.RLock()
        self._state, self._steps, self._store = state, steps, store
        self._tokenizer = state.model.tokenizer
        self._head, self._saved = head, saved
        self._reopen, self._forget = reopen, forget
        self._sampling, self._longest = sampling, longest_message
        self._open: Pieces | None = None  # a stream that has begun and not ended
        self._busy = False  # inside a turn's computation
        self._whole = True  # the live state is `_saved`, and not half a turn further
        self._committing = False
        self.closed = self._deleted = False

    # -- turns --------------------------------------------------------------------------------

    def send(self, text: str, *, role: str = "user", **sampling: Any) -> Reply:
        """Say something and wait for the reply. Options of `Sampling` hold for this call.

        InputError for an empty, oversized or broken message, or an unknown role.
        """
        stream = self.stream(text, role=role, **sampling)
        with self.lock:
            return stream.finish()

    def stream(self, text: str, *, role: str = "user", **sampling: Any) -> Stream:
        """Say something and get the reply in pieces, the last one after the turn is saved.

        The turn begins with the first piece. A stream that is left early is undone.
        """
        check_message(text, self._longest)
        return Stream(self, self._turn(role, text, self._sampling.but(**sampling)))

    async def asend(self, text: str, *, role: str = "user", **sampling: Any) -> Reply:
        """`send`, in a worker thread. Cancelling undoes the turn, unless it is saved by then."""
        stream = self.stream(text, role=role, **sampling)
        async with aclosing(pieces_of(stream, self.lock)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                pass
        assert stream.reply is not None  # the pieces have ended, so the turn is saved
        return stream.reply

    async def astream(
        self, text: str, *, role: str = "user", **sampling: Any
    ) -> AsyncIterator[str]:
        """`stream`, in a worker thread; `last_reply` after.

        The thread computes ahead of the reader. Leaving early undoes the turn, unless the thread
        has ended and saved it by then.
        """
        stream = self.stream(text, role=role, **sampling)
        async with aclosing(pieces_of(stream, self.lock)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def read(self, text: str, *, role: str = "user") -> Usage:
        """Take text in without answering; what it cost.

        A long text is cut at the ends of paragraphs and sentences into parts of at most 4,096
        tokens. Each is a turn of its own, saved as it is read: what interrupts `read` undoes
        only the part it is in, and `history` shows how far it came. Blanks at a cut, and
        around the whole, are dropped.
        """
        check_message(text)
        with self._computing(None):
            usage = [self._read(role, part) for part in parts(text, self._tokenizer.encode)]
        return Usage(
            reused_tokens=usage[0].reused_tokens,
            prefilled_tokens=sum(u.prefilled_tokens for u in usage),
            compactions=sum(u.compactions for u in usage),
        )

    # -- other turns --------------------------------------------------------------------------

    def rewind(self, at: int, *, on_replay: OnReplay | None = None) -> None:
        """Go back to where the session stood after turn `at`, as `history` numbers turns.

        Nothing is copied; the later turns leave the session, and the store with the checkpoints
        that lead to them, unless a fork shares them. `restored` tells how the state was come by:

        - Where the store keeps a checkpoint of that turn, it is that state, bit for bit.
        - Where it does not (see `keep_checkpoints`; and never inside an exchange, between a
          message and its reply), the ledger's token ids are taken in again from the nearest
          checkpoint before it, or from the start, by the steps of the first time. That is the
          same state bit for bit if the turns were made with this model, compactor, budget and
          machine; `restored.differs` names what the ledger shows to be otherwise.
          `on_replay` hears of the progress, and `on_compaction` of each compaction.

        Counts as a turn: an open stream is abandoned, and if anything is raised the session is
        what it was. InputError for a turn that is not there; ConflictError if another process
        has moved the session on.
        """
        with self._computing(None), self._whole_turn():
            past, restored = self._go_back(at, on_replay)
            self._commit(past, [])
            self.last_reply, self.restored = None, restored

    def fork(
        self, name: str, at: int | None = None, *, on_replay: OnReplay | None = None
    ) -> Session:
        """A new session that begins where this one stood after turn `at` (None: now).

        It shares this one's turns and spans, and neither sees what the other does from then on:
        system prompt and settings are this one's. How its state is come by, what is exact, and
        what is raised: see `rewind`. ConflictError too if the name is taken.
        """
        with self._computing(None), self._whole_turn():  # not committed: the state is put back
            past, restored = self._go_back(self._head.turns if at is None else at, on_replay)
            begun = self._store.fork(past, name, self._state.checkpoint())
        forked = self._reopen(begun)
        forked.restored = restored
        return forked

    def forget(
        self, *turns: int, later: Later = "refuse", on_replay: OnReplay | None = None
    ) -> Forgotten:
        """Take turns out of the store for good, by their numbers in `history`; in forks too.

        Their text, their token ids, their words in the full-text index, and every state and span
        that was computed from them are gone from the file's bytes when this returns. Sessions
        that had them get a memory computed anew, without them, by this agent's parts; `restored`
        tells how this one's was come by, and `on_replay` hears of the progress.

        What was said later was computed from them and may quote them. later: what becomes of it,
        in every session that had them:

        - "refuse": if there is any, or another session that had them, a TaintedError lists it.
        - "keep": the later words stay, and are read again. A reply whose message is forgotten
          stays as text that was read.
        - "forget": the later turns go too.

        A message and the reply to it are two turns: name both to forget an exchange. Turns that
        were left by rewinding go with the sessions' older states. What stops this has changed
        nothing, and the same call goes on from its work; only an ErasureError comes when all is
        done but for the bytes, because another process was reading the store.

        Counts as a turn of another writer: an open stream is abandoned, and other processes'
        objects of these sessions get a ConflictError. InputError for a turn that is not there and
        for the system prompt, which is pinned; ConflictError if others write the sessions all
        the while; IdentityError if one of them is of another model.
        """
        with self.lock:
            self._require_idle()
            self._require_open()
            rows = self._rows_of(turns)
        return self._forget(self.id, rows, later, on_replay)

    # -- what there is ------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        with self.lock:
            self._require_open()
            state = self._state
            return Stats(
                logical_tokens=state.length,
                slots=state.slots,
                **state.shares,
                held_bytes=state.held_bytes,
                full_bytes=state.length * state.model.bytes_per_slot,
                rounds=state.rounds,
                turns=self._head.turns,
            )

    def history(self) -> list[TurnRecord]:
        """The turns, oldest first: number, role, text, tokens, time."""
        with self.lock:
            self._require_open()
            return self._store.history(self._current())

    def search(self, query: str, limit: int = 20) -> list[Match]:
        """The newest turns in which every word of `query` was said: number, role, date, excerpt.

        Also in what was compacted long ago: the ledger is searched, not memory. Case and accents
        do not count. InputError for a query without a word.
        """
        with self.lock:
            self._require_open()
            return self._store.search(self._current(), query, limit)

    def close(self) -> None:
        """End the use of this object; an open stream is undone, and what was saved stays."""
        with self.lock:
            if not self.closed:
                self._require_idle()
                self._abandon_open()
                self.closed = True
                del self._state, self._saved  # free the cache now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- for streams and agents ---------------------------------------------------------------

    def close_deleted(self) -> None:
        """The session was deleted: close this object, and have it say so."""
        self._deleted = True
        self.close()

    def advance(self, pieces: Pieces) -> str:
        """The next piece of a stream; beginning one abandons a stream that is open."""
        with self._computing(pieces):
            return next(pieces)

    def abandon(self, pieces: Pieces) -> None:
        """Close a stream; its turn is undone unless it was saved."""
        if self._open is not pieces:  # not begun, or ended
            pieces.close()
            return
        with self.lock:
            self._require_idle()
            self._abandon_open()

    def refresh(self) -> None:
        """Follow the store, if another process has moved the session on."""
        with self.lock:
            self._require_open()
            head = self._current()
            if head != self._head:
                self._require_idle()
                self._abandon_open()
                self._follow(head)
                self._put_back()

    # -- inside -------------------------------------------------------------------------------

    def _turn(self, role: str, text: str, sampling: Sampling) -> Pieces:
        state = self._state
        with self._whole_turn():
            reused, compactions = state.length, state.compactions
            self._steps.begin()
            message = self._tokenizer.message(role, text)
            held = ""  # the newest piece waits for the next one, and the last for the commit
            replying = answer(state, self._tokenizer, message, sampling)
            while True:
                try:
                    piece = next(replying)
                except StopIteration as end:
                    found = end.value
                    break
                if held:
                    yield held
                held = piece
            usage = Usage(reused, found.prefilled, found.generated, state.compactions - compactions)
            reply = Reply(found.text, usage, found.finish, found.reasoning)
            asked = NewTurn(role, text, message)
            logged: dict[str, JsonValue] = {**usage.to_json(), **self._steps.log()}
            if sampling.stop:  # which may have cut the reply: a replay needs them
                logged["stop"] = [*sampling.stop]
            told = NewTurn("assistant", found.text, found.tokens, usage=logged)
            self._commit(self._head, [asked, told])
            self.last_reply = reply
        if held:
            yield held
        return reply

    def _read(self, role: str, text: str) -> Usage:
        state = self._state
        with self._whole_turn():
            reused, compactions = state.length, state.compactions
            self._steps.begin()
            message = self._tokenizer.message(role, text)
            state.extend(message)
            usage = Usage(reused, len(message), 0, state.compactions - compactions)
            logged: dict[str, JsonValue] = {**usage.to_json(), **self._steps.log()}
            self._commit(self._head, [NewTurn(role, text, message, usage=logged)])
        return usage

    @contextmanager
    def _computing(self, pieces: Pieces | None) -> Iterator[None]:
        """The session's lock, for the turn of `pieces` (None: of `read`)."""
        with self.lock:
            self._require_idle()
            self._require_open()
            if pieces is None or pieces is not self._open:  # another turn begins
                self._abandon_open()
                if not self._whole:  # an earlier one could not even be undone
                    self._put_back()
            self._busy = True
            self._open = pieces  # who abandons it meanwhile waits for the lock
            try:
                yield
            finally:
                self._busy = False
                ended = pieces is None or getgeneratorstate(pieces) == GEN_CLOSED
                self._open = None if ended else pieces

    @contextmanager
    def _whole_turn(self) -> Iterator[None]:
        """All or nothing: unless the turn is committed, the state is put back."""
        self._whole = False
        try:
            yield
        finally:
            if not self._whole:
                self._put_back()

    def _go_back(self, at: int, on_replay: OnReplay | None) -> tuple[Head, Restored]:
        """Make the live state that of turn `at`; the head there, and how it was come by."""
        state, head = self._state, self._head
        pinned = int(head.settings.get("system") is not None)
        if not (isinstance(at, int) and pinned <= at <= head.turns):
            raise InputError(
                f"session {self.id!r} has turns {pinned} to {head.turns} to go back to, and not "
                f"{at!r}; history() numbers them"
            )
        if self._current() != head:
            raise ConflictError(
                f"session {self.id!r} was moved on by another writer: open it again, and see "
                "whether there is still something to go back to"
            )
        turns = self._store.history(head)[:at]
        compactions = state.compactions
        kept = next((k for k in self._store.kept(head) if k.turns <= at), None)
        if kept is None:
            state.restore(Checkpoint((), 0))
            state.pin(
                [*self._tokenizer.start, *(t for turn in turns[:pinned] for t in turn.tokens)]
            )
            reused, begun = 0, pinned
        else:
            state.restore(self._store.load(kept, device=state.model.device))
            reused, begun = kept.tokens, kept.turns
        differs = replay(state, self._tokenizer, turns[begun:], self._steps, on_replay)
        restored = Restored(reused, state.length - reused, state.compactions - compactions, differs)
        return replace(head, turn=turns[-1].id if turns else None, turns=at), restored

    def _rows_of(self, numbers: Sequence[int]) -> list[int]:
        """The ids of turns that may be forgotten."""
        head = self._head
        first = 1 + int(head.settings.get("system") is not None)
        if not numbers or not all(isinstance(n, int) and first <= n <= head.turns for n in numbers):
            raise InputError(
                f"session {self.id!r} has turns {first} to {head.turns} to forget, and not "
                f"{', '.join(map(repr, numbers))}; history() numbers them. What is pinned goes "
                "with the session: agent.delete(id, erase=True)"
            )
        if self._current() != head:
            raise ConflictError(
                f"session {self.id!r} was moved on by another writer: open it again, and see "
                "which turns it has now"
            )
        turns = self._store.history(head)
        return [turns[n - 1].id for n in numbers]

    def _current(self) -> Head:
        """Where the store has the session now."""
        head = self._store.head(self.id)
        if head is None or head.session_id != self._head.session_id:
            raise deleted(self.id)
        return head

    def _commit(self, after: Head, turns: Sequence[NewTurn]) -> None:
        checkpoint = self._state.checkpoint()
        self._committing = True
        try:
            self._head = self._store.commit(after, checkpoint, turns)
            self._saved = checkpoint
        except StillError:
            self._committing = False
            raise
        self._committing, self._whole = False, True

    def _put_back(self) -> None:
        """Make the live state the last checkpoint again."""
        if self._committing:  # interrupted: the turn is on disk or it is not, the store knows
            head = self._store.head(self.id)
            if head is not None and head.session_id == self._head.session_id:
                self._follow(head)
            self._committing = False
        self._state.restore(self._saved)
        self._whole = True

    def _follow(self, head: Head) -> None:
        self._saved = self._store.load(head, device=self._state.model.device)
        self._head = head

    def _abandon_open(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _require_idle(self) -> None:
        if self._busy:
            raise InputError(
                f"a turn of session {self.id!r} is running in this very thread (is this a "
                "callback?); come back when it has ended"
            )

    def _require_open(self) -> None:
        if self._deleted:
            raise deleted(self.id)
        if self.closed:
            raise InputError(f"session {self.id!r} is closed; open it again with agent.session")
