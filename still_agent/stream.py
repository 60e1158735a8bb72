"""A reply's text as it comes, from ordinary and from async code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Protocol, Self

from still_agent.reply import Reply
from still_memory.errors import InputError

Pieces = Generator[str, None, Reply]


class Conversation(Protocol):
    """What a stream needs of its session."""

    lock: threading.RLock

    def advance(self, pieces: Pieces) -> str: ...

    def abandon(self, pieces: Pieces) -> None: ...


class Stream(Iterator[str]):
    """Text pieces of one reply. After the last one the turn is saved, and `reply` is there.

    A stream that is left early is undone: when it is closed, when nothing refers to it any
    more, or when another turn of its session begins.
    """

    def __init__(self, conversation: Conversation, pieces: Pieces) -> None:
        self._conversation = conversation
        self._pieces = pieces
        self._ended = False
        self.reply: Reply | None = None

    def __next__(self) -> str:
        try:
            return self._conversation.advance(self._pieces)
        except StopIteration as end:
            if end.value is None and not self._ended:
                raise InputError(
                    "this stream was abandoned, and its turn undone: it was closed, or another "
                    "turn began. Send the message again"
                ) from None
            self._ended, self.reply = True, end.value or self.reply
            raise

    def finish(self) -> Reply:
        """Run to the end."""
        for _ in self:
            pass
        assert self.reply is not None  # the loop has ended, so the turn is saved
        return self.reply

    def close(self) -> None:
        """Abandon the stream: unless it has ended, its turn is undone."""
        self._conversation.abandon(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A garbage collection may come in any thread, the model's too (see `batch`), for which
        # whoever has the session may be waiting: so not a moment is waited here.
        lock = self._conversation.lock
        if lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                lock.release()
        else:
            left = threading.Thread(target=self._conversation.abandon, args=(self._pieces,))
            with suppress(RuntimeError):  # the interpreter ends, and the session with it
                left.start()


class Leavable(Iterator[str], Protocol):
    """Pieces that can be left: what was begun is undone then."""

    def close(self) -> None: ...


async def pieces_of(
    stream: Leavable, alone: Callable[[], AbstractContextManager[object]]
) -> AsyncIterator[str]:
    """The stream's pieces, computed in a worker thread, inside `alone()`.

    That keeps the session to itself, so that async turns of one session wait for each other.
    Leaving early, or being cancelled, abandons the stream; that takes effect at the next token.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    left = threading.Event()

    def work() -> None:
        try:
            with alone():
                while not left.is_set() and (piece := next(stream, None)) is not None:
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
                if left.is_set():
                    stream.close()
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    worker = asyncio.create_task(asyncio.to_thread(work))
    try:
        while (piece := await queue.get()) is not None:
            yield piece
        await worker  # raises what the turn raised
    finally:
        left.set()
        await asyncio.wait({worker})
        worker.exception()  # of a stream that was left, nobody else asks
