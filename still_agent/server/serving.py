"""The process: a socket, uvicorn, its timeouts, and an orderly end.

uvicorn gives a request's headers all the time that they take, and a reader that does not read all
the time that it wants; here both end. At SIGTERM or SIGINT nothing new is begun, running turns have
some seconds to end, and what has not ended by then is undone.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from still_agent.server.limits import Limits
from still_agent.server.service import Service

SEND_BUFFER = 64 * 1024  # bytes that the kernel holds for a reader; it doubles them
LINGER = (
    2.0  # seconds in which the rest of a refused body is thrown away, so that a client reads why
)
_MORE = 10.0  # seconds past the grace, for turns that end at their next token


def listen(host: str, port: int) -> socket.socket:
    """A socket at the address. OSError if it is taken."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    # With its protocol named, asyncio sends each piece at once: 40 ms less for a small answer.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def serve(service: Service, app: ASGIApp, listener: socket.socket) -> None:
    """Answer until a signal ends it; then all is saved or undone, and the store closed."""
    # uvicorn raises the signal anew when it has ended, which must not cut short what follows.
    before = {one: signal.signal(one, _ignore) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(service, app).answer(listener)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class Server(uvicorn.Server):
    """uvicorn, which ends turns before it ends; `should_exit` ends it from another thread."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=_connection(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle_s,
                timeout_graceful_shutdown=int(limits.grace_s + _MORE) + 1,
                limit_concurrency=limits.connections,
            )
        )
        self._service = service

    def answer(self, listener: socket.socket) -> None:
        """Run to the end, and close what the service has open."""
        turns = self._service.turns
        try:
            self.run(sockets=[listener])
        finally:
            turns.drain()
            turns.leave_all()
            turns.close()
            self._service.agents.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        turns = self._service.turns
        turns.drain()
        asyncio.get_running_loop().call_later(self._service.limits.grace_s, turns.leave_all)
        await super().shutdown(sockets)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _connection(limits: Limits) -> type[H11Protocol]:
    """uvicorn's connection, which waits for a client only so long."""

    class Connection(H11Protocol):
        _headers: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._headers, self._reader)
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            unread = self.cycle.more_body
            super().on_response_complete()
            if unread and self._headers is None:
                self._headers = self.loop.call_later(LINGER, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self.loop.call_later(limits.reader_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._reader)

        def _await_headers(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                _stop(self._headers)
                self._headers = None
            elif self._headers is None:
                self._headers = self.loop.call_later(limits.header_s, self.transport.close)

    return Connection


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
