"""The application: routes put together, and every failure told in OpenAI's shape."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from still_agent.server import completions, pages, reading, sessions
from still_agent.server.errors import ApiError, kind_of, told
from still_agent.server.guard import tenant_of
from still_agent.server.logs import Observed
from still_agent.server.metrics import TYPE
from still_agent.server.replies import HungUp, Json
from still_agent.server.service import Service
from still_memory.errors import StillError


def make_app(service: Service) -> ASGIApp:
    """The server, as an ASGI application."""
    app = FastAPI(openapi_url=None)  # its pages would load scripts from elsewhere
    app.include_router(completions.routes(service, int(time.time())))
    app.include_router(sessions.routes(service))
    app.include_router(reading.routes(service))
    app.include_router(pages.routes())

    @app.get("/healthz")
    async def health() -> Response:
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if tenant_of(request, service.keys) != "":  # sums over all tenants are the operator's
            raise ApiError(403, "The figures are for keys of the tenant without a name.")
        page = await service.turns.look(service.metrics.page)  # which waits for agents
        return Response(page, media_type=TYPE)

    async def fail(request: Request, error: Exception) -> Response:
        if not isinstance(error, HungUp):
            request.scope["state"]["error"] = kind_of(error)
        failure = told(_translated(error), service.hidden)
        return Json(failure.body(), failure.status, failure.headers)

    for kind in (ApiError, StillError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, fail)
    return Observed(app, service.metrics)


def _translated(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return ApiError(400, f"{first['loc'][-1]}: {first['msg']}", param=str(first["loc"][-1]))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return error
