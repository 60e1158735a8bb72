"""A turn as a response: one object, or server-sent events.

"Answered" means saved. The event with the reason of the end, and `[DONE]`, come after the turn's
commit; so does the one object. A client that hangs up before has its turn undone. The status is
that of the turn's beginning; what fails later is told as an event, and no `[DONE]` follows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from still_agent.events import Compaction
from still_agent.server.errors import kind_of, told
from still_agent.server.metrics import Metrics
from still_agent.server.openai import Answered, Placed, Shape
from still_agent.server.turns import Turn, Turns

_UNCHANGED = "!#$&'()*+,-./:;<=>?@[]^_`{|}~\""  # of ASCII, all but blanks and the percent sign


class HungUp(Exception):
    """The client has gone; nobody reads an answer."""


class Json(Response):
    """Any JSON, also of text that is not well formed."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return _json(content)


class TurnResponse(Response):
    """Runs `job` as a turn, and answers with what it emits: a `Placed`, texts, an `Answered`."""

    def __init__(
        self,
        turns: Turns,
        metrics: Metrics,
        job: Callable[[Turn], None],
        shape: Shape,
        *,
        stream: bool,
        hidden: Sequence[str],
    ) -> None:
        super().__init__()
        self._turns, self._metrics, self._job = turns, metrics, job
        self._shape, self._stream, self._hidden = shape, stream, hidden
        self._began = time.monotonic()
        self._texts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _connected(receive) as watcher, self._turns.run(self._job) as turn:
            events = self._noted(turn, scope)
            last = await (self._as_events if self._stream else self._as_one)(events, scope, send)
            watcher.cancel()  # from its last part on, the end of a response looks like a hang-up
            await last(scope, receive, send)

    async def _as_one(self, events: AsyncIterator[object], scope: Scope, send: Send) -> ASGIApp:
        """Wait for the reply; the response."""
        (answered,) = [event async for event in events if isinstance(event, Answered)]
        headers = session_header(answered.placed.session)
        return Json(self._shape.whole(answered), headers=headers)

    async def _as_events(self, events: AsyncIterator[object], scope: Scope, send: Send) -> ASGIApp:
        """Send the response; what sends its end."""
        early: list[Compaction] = []  # of what had to be read again before
        async for event in events:
            if isinstance(event, Placed):
                break
            if isinstance(event, Compaction) and self._shape.compactions:
                early.append(event)
        assert isinstance(event, Placed)  # no turn ends without: it raises
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **session_header(event.session),
        }
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await self._send(send, self._shape.first(event), *map(self._shape.compaction, early))
        try:
            async for event in events:
                if isinstance(event, str):
                    await self._send(send, self._shape.piece(event))
                elif isinstance(event, Compaction) and self._shape.compactions:
                    await self._send(send, self._shape.compaction(event))
                elif isinstance(event, Answered):
                    await self._send(send, *self._shape.last(event))
                    await send(_body(b"data: [DONE]\n\n"))
        except Exception as error:
            scope["state"]["error"] = kind_of(error)
            await self._send(send, told(error, self._hidden).body())
        return _end

    async def _send(self, send: Send, *events: Mapping[str, Any]) -> None:
        data = b"".join(b"data: " + _json(event) + b"\n\n" for event in events)
        if data:
            await send(_body(data))

    async def _noted(self, turn: Turn, scope: Scope) -> AsyncIterator[object]:
        """The events, measured on their way."""
        async for event in turn:
            if isinstance(event, str) and not self._texts:
                self._texts = 1
                self._metrics.first_token.observe(time.monotonic() - self._began)
            if isinstance(event, Answered):
                self._metrics.turn.observe(time.monotonic() - self._began)
                usage = event.reply.usage
                counts = {
                    "reused": usage.reused_tokens - event.read_tokens,
                    "prefilled": usage.prefilled_tokens + event.read_tokens,
                    "generated": usage.generated_tokens,
                }
                for kind, tokens in counts.items():
                    self._metrics.tokens.labels(kind).inc(tokens)
                scope["state"]["tokens"] = counts
            yield event


def session_header(name: str) -> dict[str, str]:
    """A session's name as a header: percent-encoded UTF-8, plain ASCII as it is."""
    return {"x-session-id": quote(name.encode("utf-8"), safe=_UNCHANGED)}


async def _end(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


@asynccontextmanager
async def _connected(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """Cancels what runs in here when the client hangs up, and raises HungUp for it.

    The request's body must have been read, for then the next message is the end. What it gives is
    the task that waits for that.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield watcher
    except asyncio.CancelledError:
        if not gone or task.uncancel():
            raise
        raise HungUp from None
    finally:
        watcher.cancel()
