"""Turns in threads, a bounded number of them, and what they tell on its way to the event loop.

A turn computes and writes to the store, so it has a thread of its own, in which it may wait for
another turn of its session. What it tells goes through a buffer of a few events: a client that
reads slowly slows its own turn. Whoever leaves a turn has it end at its next token, undone, and
waits for that: nothing runs on unseen.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from still_agent.events import Compaction
from still_agent.server.errors import STAY, ApiError
from still_agent.server.limits import Limits
from still_agent.server.metrics import Metrics

BUFFER = 64  # events between a turn's thread and the loop
LOOKS = 8  # threads for what reads the store and waits for no turn
_TICK = 0.1  # seconds: a turn that is left looks for it so often while its reader reads nothing

_END = object()

T = TypeVar("T")


class Turn:
    """One turn: `emit` and `check` in its thread, the rest in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._room = threading.Semaphore(BUFFER)
        self._left: ApiError | None = None
        self.worker: asyncio.Future[None] | None = None

    def emit(self, event: object) -> None:
        """Hand an event to the loop; waits where its reader is behind.

        Raises what `check` does, but only while it waits: what is saved by now was not undone.
        """
        while not self._room.acquire(timeout=_TICK):
            self.check()
        self._put(event)

    def end(self) -> None:
        """Nothing follows."""
        self._put(_END)

    def check(self) -> None:
        """Raise the reason, if the turn was left."""
        if self._left is not None:
            raise self._left

    def leave(self, why: ApiError) -> None:
        """Have it end at its next token. The first reason counts."""
        self._left = self._left or why

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        """The next event; after the last one, what the turn has raised."""
        event = await self._events.get()
        if event is _END:
            assert self.worker is not None
            await asyncio.wait({self.worker})  # a cancelled `await` of it would cancel it
            self.worker.result()
            raise StopAsyncIteration
        self._room.release()
        return event

    def _put(self, event: object) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _hung_up() -> ApiError:
    return ApiError(499, "The client has hung up.")


def _too_long() -> ApiError:
    message = "The turn took too long and was undone: send less at once, or ask for fewer tokens."
    return ApiError(504, message, code="turn_timeout", headers=STAY)


def _closing() -> ApiError:
    message = "The server is shutting down; what was not answered is undone."
    return ApiError(503, message, code="shutting_down", headers={"retry-after": "5"})


class Turns:
    """Runs turns, `limits.concurrency` at once; more wait in a line of `limits.waiting`."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._threads = ThreadPoolExecutor(limits.concurrency, "turn")
        self._looks = ThreadPoolExecutor(LOOKS, "look")
        self._free = limits.concurrency
        self._line: deque[asyncio.Future[None]] = deque()
        self._running: set[Turn] = set()
        self._closing = False
        self._here = threading.local()

    async def look(self, read: Callable[..., T], *arguments: object) -> T:
        """What a quick function returns, called in a thread: the loop never waits for the store."""
        return await asyncio.get_running_loop().run_in_executor(self._looks, read, *arguments)

    @asynccontextmanager
    async def run(self, job: Callable[[Turn], None]) -> AsyncIterator[Turn]:
        """A turn that runs `job` in a thread. Leaving the block leaves the turn.

        ApiError 429 if too many wait, 503 after waiting too long or at a shutdown.
        """
        await self._enter()
        loop = asyncio.get_running_loop()
        turn = Turn(loop)
        worker = turn.worker = loop.run_in_executor(self._threads, self._work, turn, job)
        self._running.add(turn)
        self._metrics.in_progress.set(len(self._running))
        worker.add_done_callback(lambda _: self._ended(turn))
        timer = loop.call_later(self._limits.turn_s, turn.leave, _too_long())
        try:
            yield turn
        finally:
            timer.cancel()
            turn.leave(_hung_up())
            await asyncio.wait({worker})
            worker.exception()  # of a turn that was left, nobody else asks

    def on_compaction(self, event: Compaction) -> None:
        """The agents' observer: it is called in the thread of the turn that compacts."""
        self._metrics.compactions.inc()
        turn: Turn | None = getattr(self._here, "turn", None)
        if turn is not None:
            turn.check()
            turn.emit(event)

    def drain(self) -> None:
        """Begin no more turns, and end the line."""
        self._closing = True
        for place in self._line:
            if not place.done():
                place.set_exception(_closing())

    def leave_all(self) -> None:
        """Have every turn end at its next token, undone."""
        for turn in list(self._running):
            turn.leave(_closing())

    def close(self) -> None:
        """Wait for the threads to end."""
        self._threads.shutdown()
        self._looks.shutdown()

    def _work(self, turn: Turn, job: Callable[[Turn], None]) -> None:
        self._here.turn = turn
        try:
            turn.check()
            job(turn)
        finally:
            self._here.turn = None
            turn.end()

    async def _enter(self) -> None:
        if self._closing:
            raise _closing()
        if self._free:
            self._free -= 1
            return
        if len(self._line) >= self._limits.waiting:
            raise ApiError(
                429, "Too many requests wait for a turn already; try again in a moment.",
                code="too_many_requests", headers={"retry-after": "1"},
            )  # fmt: skip
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            async with asyncio.timeout(self._limits.waiting_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._leave_place()  # it was given just then
            elif place in self._line:
                self._line.remove(place)
            if isinstance(error, TimeoutError):
                raise ApiError(
                    503, "The server is busy, and no turn ended in time; try again later.",
                    code="busy", headers={"retry-after": "5"},
                ) from None  # fmt: skip
            raise

    def _leave_place(self) -> None:
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _ended(self, turn: Turn) -> None:
        self._running.discard(turn)
        self._metrics.in_progress.set(len(self._running))
        self._leave_place()
