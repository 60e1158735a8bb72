"""The reply to a whole list of messages, of which a session has had most.

Clients that keep no state send a conversation as a list, each time. The store recognises the
longest beginning of it that a session has had (see `still_memory.recognition`): that session goes
on, and only the new messages are read. Where the list is no continuation, because a message was
edited or left out, or the system prompt or the tools are others, a branch is forked from the last
turn in common, or begun anew. Nothing of this is unsaid: `Answering` tells what was known, which
session it is, and what it was forked from.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from still_agent.decode import Choose
from still_agent.events import OnToken
from still_agent.messages import Message
from still_agent.reply import Reply
from still_agent.sampling import Sampling
from still_agent.session import Session
from still_agent.stream import Stream, pieces_of
from still_agent.text import check_message
from still_agent.tools import Tool, ToolFormat
from still_memory.errors import ConflictError, InputError
from still_memory.records import MAX_SESSION_NAME, Head, check_session_name, check_text

ROOM = 16  # characters that a branch's number may take
_TRIES = 32  # for sessions that others move on meanwhile: each is a turn of theirs


@dataclass(frozen=True)
class Place:
    """Where a conversation goes on."""

    session: Session
    head: Head  # where it stands
    known: int  # of its turns, those that the session has
    read_tokens: int = 0  # taken in to come there: a new session's prefix, what a fork has replayed
    forked_from: str | None = None


class Sessions(Protocol):
    """What is asked of an agent here."""

    def place(self, thread: str, told: Sequence[tuple[str, str]]) -> Place:
        """The session that has had exactly the beginning of `told`; made, if there is none."""
        ...


def turns_of(
    messages: Sequence[Message], tools: Sequence[Tool], form: ToolFormat, longest: int
) -> list[tuple[str, str]]:
    """Roles and texts, as a ledger has them; the first is the system prompt, if there is one.

    It tells of the tools, too. The last may be an assistant's: another agent's, in a graph of them.
    InputError where nothing but system prompts is given, and for broken text.
    """
    if all(message.role == "system" for message in messages):
        raise InputError("nothing to reply to: give a message of a user, a tool or an assistant")
    told: list[tuple[str, str]] = [
        (m.role, form.text(m.text, m.tool_calls) if m.tool_calls else m.text) for m in messages
    ]
    if tools:
        first = told.pop(0)[1] if messages[0].role == "system" else None
        told.insert(0, ("system", form.system(first, tools)))
    for role, text in told:
        if role == "user":
            check_message(text, longest)
        elif len(check_text(text, "a message")) > longest:
            raise InputError(
                f"a {role} message has {len(text):,} characters and {longest:,} are allowed: "
                "shorten it, or load the agent with a larger longest_message"
            )
    return told


def check_thread(name: str | None) -> str:
    """A conversation's name, which leaves room for its branches'; empty: it has none."""
    if name is None:
        return ""
    if len(check_session_name(name)) > MAX_SESSION_NAME - ROOM:
        raise InputError(
            f"a conversation's name has at most {MAX_SESSION_NAME - ROOM} characters, and this one "
            f"has {len(name)}"
        )
    return name


def branch_name(thread: str, number: int) -> str:
    """What the `number`th session of a conversation is called; 1 is the first."""
    if not thread:
        return f"chat-{secrets.token_hex(8)}"
    return thread if number == 1 else f"{thread}~{number}"


class Answering(Iterator[str]):
    """Text pieces of a reply; the last one comes after the turn is saved. See `Agent.answer`.

    It begins with the first piece. If it is left early (closed, or nothing refers to it any more),
    the turn is undone. ConflictError if another writer moves the session on meanwhile.
    """

    def __init__(
        self,
        sessions: Sessions,
        thread: str,
        told: Sequence[tuple[str, str]],
        sampling: Sampling,
        choose: Choose | None,
        tools: ToolFormat | None,
        on_token: OnToken | None = None,
    ) -> None:
        self._sessions, self._thread, self._told = sessions, thread, told
        self._options = sampling, choose, tools, on_token
        self._stream: Stream | None = None
        self.place: Place | None = None  # once it has begun

    @property
    def reply(self) -> Reply | None:
        """What was answered, once it is saved."""
        return None if self._stream is None else self._stream.reply

    def __next__(self) -> str:
        if self._stream is None:
            with self.alone() as stream:
                return next(stream)
        return next(self._stream)

    def finish(self) -> Reply:
        """Run to the end."""
        with self.alone() as stream:
            for _ in stream:
                pass
        assert self.reply is not None  # the loop has ended, so the turn is saved
        return self.reply

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces, computed in a worker thread. Leaving them undoes the turn."""
        async with aclosing(pieces_of(self, self.alone)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def close(self) -> None:
        """Undo the turn, unless it has ended."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def alone(self) -> Iterator[Stream]:
        """In here no other thread has a turn of the session, which is found first: see `place`."""
        for _ in range(_TRIES if self._stream is None else 1):
            if self._stream is None:
                self.place = self._sessions.place(self._thread, self._told)
            assert self.place is not None
            session = self.place.session
            # Of nameless lists that begin alike, none waits for another's turn.
            patient = bool(self._thread) or self._stream is not None
            if not session.lock.acquire(blocking=patient):
                continue
            try:
                if self._stream is None:
                    if session.head != self.place.head or not (patient or session.idle):
                        continue  # somebody was first: the list goes on from elsewhere now
                    told = self._told[self.place.known :]
                    self._stream = session.reply_to(told, self.place.head, *self._options)
                yield self._stream
                return
            finally:
                session.lock.release()
        raise ConflictError(
            f"conversation {self._thread!r} is written by others all the while; try again"
        )
