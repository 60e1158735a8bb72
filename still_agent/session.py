"""A conversation: messages in, replies out, saved turn by turn.

A turn happens whole or not at all. It is computed in the live state and then committed in one
transaction; whatever ends it before that (an error, Ctrl-C, a stream that is left early, a
full disk) puts the state back to the last checkpoint, which costs one filling of the cache,
since spans never change. The one exception is `read`, which saves a long text part by part.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from inspect import GEN_CLOSED, getgeneratorstate
from types import TracebackType
from typing import Any, Self

from still_agent.decode import answer
from still_agent.ephemeral import Store
from still_agent.reply import Reply, Usage
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_agent.stream import Pieces, Stream, pieces_of
from still_agent.text import check_message, parts
from still_memory.checkpoint import Checkpoint
from still_memory.errors import InputError, StillError, UnknownSessionError
from still_memory.records import Head, NewTurn, TurnRecord


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
    with `Agent.session`.
    """

    def __init__(
        self,
        state: RollingState,
        store: Store,
        head: Head,
        saved: Checkpoint,
        *,
        sampling: Sampling,
        longest_message: int,
    ) -> None:
        self.id = head.session
        self.last_reply: Reply | None = None
        self.lock = threading.RLock()
        self._state, self._store = state, store
        self._tokenizer = state.model.tokenizer
        self._head, self._saved = head, saved
        self._sampling, self._longest = sampling, longest_message
        self._open: Pieces | None = None  # a stream that has begun and not ended
        self._busy = False  # inside a turn's computation
        self._whole = True  # the live state is `_saved`, and not half a turn further
        self._committing = False
        self.closed = False

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
        """The turns, oldest first: role, text, tokens, time."""
        with self.lock:
            self._require_open()
            return self._store.history(self.id)

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
            head = self._store.head(self.id)
            if head is None:
                raise UnknownSessionError(f"session {self.id!r} has been deleted; begin it anew")
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
            told = NewTurn("assistant", found.text, found.tokens, usage=usage.to_json())
            self._commit([asked, told])
            self.last_reply = reply
        if held:
            yield held
        return reply

    def _read(self, role: str, text: str) -> Usage:
        state = self._state
        with self._whole_turn():
            reused, compactions = state.length, state.compactions
            message = self._tokenizer.message(role, text)
            state.extend(message)
            usage = Usage(reused, len(message), 0, state.compactions - compactions)
            self._commit([NewTurn(role, text, message, usage=usage.to_json())])
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

    def _commit(self, turns: Sequence[NewTurn]) -> None:
        checkpoint = self._state.checkpoint()
        self._committing = True
        try:
            self._head = self._store.commit(self._head, checkpoint, turns)
            self._saved = checkpoint
        except StillError:
            self._committing = False
            raise
        self._committing, self._whole = False, True

    def _put_back(self) -> None:
        """Make the live state the last checkpoint again."""
        if self._committing:  # interrupted: the turn is on disk or it is not, the store knows
            head = self._store.head(self.id)
            if head is not None:
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
        if self.closed:
            raise InputError(f"session {self.id!r} is closed; open it again with agent.session")
