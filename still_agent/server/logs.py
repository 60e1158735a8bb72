"""One line of JSON a request, on stderr; never a word that was said, a key, or a session's name.

So the route is logged as it is declared, and of an error its kind and place, without its message.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
import traceback

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from still_agent.server.metrics import Metrics
from still_agent.server.replies import HungUp

HUNG_UP = 499


def setup() -> None:
    """Every line of the process as JSON, uvicorn's too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _log.setLevel(logging.INFO)


class Observed:
    """The application, each of its requests logged and counted, whatever becomes of it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), HUNG_UP
        id = f"req_{secrets.token_hex(8)}"
        told: dict[str, object] = {}

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        # Routes see the path as it was sent, so that a name may hold a slash.
        raw = scope.get("raw_path")
        scope = {**scope, "path": raw.decode("ascii", "replace") if raw else scope["path"]}
        scope["state"] = {}
        try:
            await self._app(scope, receive, noted)
        except HungUp:
            status = HUNG_UP
        except Exception as error:  # it was answered with a 500
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told["at"] = f"{frame.filename}:{frame.lineno}"
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            line = {
                "id": id, "method": scope["method"], "route": route, "status": status,
                "ms": round((time.monotonic() - began) * 1000, 1),
                **scope["state"], **told,
            }  # fmt: skip
            _log.info("request", extra={"fields": line})


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__  # its message may quote what was said
        return json.dumps(line, ensure_ascii=True)


_log = logging.getLogger("still_agent.server")
