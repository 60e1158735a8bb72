"""A conversation: messages in, replies out, saved turn by turn.

A turn happens whole or not at all. It is computed in the live state and then committed in one
transaction; whatever ends it before that (an error, Ctrl-C, a stream that is left early, a
full disk) puts the state back to the last checkpoint, which costs one filling of the cache,
since spans never change. The one exception is `read`, which saves a long text part by part.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass
from inspect import GEN_CLOSED, getgeneratorstate
from types import TracebackType
from typing import Any, Self

from pydantic import JsonValue

from still_agent.decode import Choose, answer
from still_agent.ephemeral import Store
from still_agent.events import OnCompaction, OnReplay, OnToken
from still_agent.forget import Forgotten
from still_agent.past import stand_at
from still_agent.replay import Restored
from still_agent.reply import Reply, Shown, Usage
from still_agent.rolling import RollingState, Standing
from still_agent.sampling import Sampling
from still_agent.steps import Steps
from still_agent.stream import Pieces, Stream, pieces_of
from still_agent.text import check_message, parts
from still_agent.tools import ToolFormat
from still_memory.checkpoint import Checkpoint
from still_memory.errors import ConflictError, InputError, StillError, deleted
from still_memory.records import Head, Match, NewTurn, TurnRecord
from still_memory.taint import Later

Forget = Callable[[str, Sequence[int], Later, OnReplay | None], Forgotten]  # turns by their ids
Fork = Callable[[Head, str, int, str | None, OnReplay | None], "Session"]  # name, turn, thread


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
        fork: Fork,
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
        self._fork, self._forget = fork, forget
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

    def stream(
        self, text: str, *, role: str = "user", on_token: OnToken | None = None, **sampling: Any
    ) -> Stream:
        """Say something and get the reply in pieces, the last one after the turn is saved.

        The turn begins with the first piece. A stream that is left early is undone.
        """
        check_message(text, self._longest)
        drawn = self._sampling.but(**sampling)
        return Stream(self, self._turn([(role, text)], drawn, on_token=on_token))

    async def asend(self, text: str, *, role: str = "user", **sampling: Any) -> Reply:
        """`send`, in a worker thread. Cancelling undoes the turn, unless it is saved by then."""
        stream = self.stream(text, role=role, **sampling)
        async with aclosing(pieces_of(stream, self._alone)) as pieces:  # type: ignore[type-var]
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
        async with aclosing(pieces_of(stream, self._alone)) as pieces:  # type: ignore[type-var]
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
          machine, and not in one batch with other sessions'; `restored.differs` names what the
          ledger shows to be otherwise.
          `on_replay` hears of the progress, and `on_compaction` of each compaction.

        Counts as a turn: an open stream is abandoned, and if anything is raised the session is
        what it was. InputError for a turn that is not there; ConflictError if another process
        has moved the session on.
        """
        with self._computing(None), self._whole_turn():
            head = self._unmoved()
            past, restored = stand_at(self._state, self._steps, self._store, head, at, on_replay)
            self._commit(past, [])
            self.last_reply, self.restored = None, restored

    def fork(
        self, name: str, at: int | None = None, *, on_replay: OnReplay | None = None
    ) -> Session:
        """A new session that begins where this one stood after turn `at` (None: now).

        It shares this one's turns and spans, and neither sees what the other does from then on:
        system prompt and settings are this one's. How its state is come by, what is exact, and
        what is raised: see `rewind`; but an open stream of this one goes on. ConflictError too if
        the name is taken.
        """
        with self.lock:
            self._require_open()
            head = self._unmoved()
        return self._fork(head, name, head.turns if at is None else at, None, on_replay)

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

        - "refuse": if there is any, or another session that had them, or a graph of their thread
          (whose states go), a TaintedError lists it.
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

    @property
    def layout(self) -> list[Standing]:
        """What the slots are: spans, oldest first; the newest raw tokens are the last."""
        with self.lock:
            self._require_open()
            return self._state.layout

    @property
    def on_compaction(self) -> OnCompaction | None:
        """Called after each compaction of this session, beside the agent's own observer."""
        return self._steps.watcher

    @on_compaction.setter
    def on_compaction(self, watcher: OnCompaction | None) -> None:
        self._steps.watcher = watcher

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

    def reply_to(
        self,
        told: Sequence[tuple[str, str]],
        after: Head,
        sampling: Sampling,
        choose: Choose | None = None,
        tools: ToolFormat | None = None,
        on_token: OnToken | None = None,
    ) -> Stream:
        """Read messages, roles and texts, and reply to the last one: one turn, all or nothing.

        It follows `after`, or a ConflictError comes with the first piece. choose: takes logits
        `(vocab,)` to the next token. tools: the form that calls have, if there may be any.
        """
        return Stream(self, self._turn(told, sampling, choose, tools, after, on_token))

    @property
    def head(self) -> Head:
        """What the next turn of this object follows."""
        return self._head

    @property
    def idle(self) -> bool:
        """Whether no other thread computes a turn of it, and no stream is open."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            return self._open is None
        finally:
            self.lock.release()

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

    def _turn(
        self,
        told: Sequence[tuple[str, str]],
        sampling: Sampling,
        choose: Choose | None = None,
        tools: ToolFormat | None = None,
        after: Head | None = None,
        on_token: OnToken | None = None,
    ) -> Pieces:
        state = self._state
        with self._whole_turn():
            if after not in (None, self._head):
                raise ConflictError(f"session {self.id!r} has moved on; say it again after that")
            *before, (role, text) = told
            read = [self._take_in(*message) for message in before]
            reused, compactions = state.length, state.compactions
            self._steps.begin()
            state.batched = False
            message = self._tokenizer.message(role, text)
            shown = Shown(tools)
            held = ""  # the newest piece waits for the next one, and the last for the commit
            replying = answer(state, self._tokenizer, message, sampling, choose, on_token=on_token)
            while True:
                try:
                    piece = shown.push(next(replying))
                except StopIteration as end:
                    found = end.value
                    break
                if piece:
                    if held:
                        yield held
                    held = piece
            said, rest = shown.finish(found.text)
            if held and rest:
                yield held
            held = rest or held
            usage = Usage(reused, found.prefilled, found.generated, state.compactions - compactions)
            logged: dict[str, JsonValue] = {**usage.to_json(), **self._steps.log()}
            if state.batched:  # its last bits are not those of a reply alone
                logged["batched"] = True
            if sampling.stop:  # which may have cut the reply: a replay needs them
                logged["stop"] = [*sampling.stop]
            if tools is not None and said.text != found.text:  # it has their form: likewise
                logged["tools"] = tools.name
            turns = [turn for turn, _ in read]
            turns.append(NewTurn(role, text, message))
            turns.append(NewTurn("assistant", said.text, found.tokens, usage=logged))
            self._commit(self._head, turns)
            reply = Reply(
                said.content,
                sum((one for _, one in reversed(read)), usage),
                "tool_calls" if said.calls else found.finish,
                found.reasoning,
                said.calls,
            )
            self.last_reply = reply
        if held:
            yield held
        return reply

    def _read(self, role: str, text: str) -> Usage:
        with self._whole_turn():
            turn, usage = self._take_in(role, text)
            self._commit(self._head, [turn])
        return usage

    def _take_in(self, role: str, text: str) -> tuple[NewTurn, Usage]:
        """Read a message, to be committed; the state is sealed after it, as in a replay."""
        state = self._state
        reused, compactions = state.length, state.compactions
        self._steps.begin()
        message = self._tokenizer.message(role, text)
        state.extend(message)
        state.checkpoint()
        usage = Usage(reused, len(message), 0, state.compactions - compactions)
        logged: dict[str, JsonValue] = {**usage.to_json(), **self._steps.log()}
        return NewTurn(role, text, message, usage=logged), usage

    def _alone(self) -> AbstractContextManager[object]:
        return self.lock

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

    def _unmoved(self) -> Head:
        """Where this object has the session, and the store too."""
        if self._current() != self._head:
            raise ConflictError(
                f"session {self.id!r} was moved on by another writer: open it again, and see "
                "which turns it has now"
            )
        return self._head

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
        turns = self._store.history(self._unmoved())
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
