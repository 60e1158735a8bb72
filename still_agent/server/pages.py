"""The page at `/`: static files of the package, which ask nobody but this server for anything.

The page shows names and texts that others wrote. So its policy lets no inline script or style run
and nothing come from elsewhere, and where the browser knows trusted types, no text become markup.
The files themselves tell nothing, and are given without a key; what they ask the API for is not.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from still_agent.server.errors import ApiError

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked for again each time, and mostly answered with a 304
}


def routes() -> APIRouter:
    router = APIRouter()
    found = {
        file.name: (file.read_bytes(), _TYPES[suffix])
        for file in files(__package__).joinpath("page").iterdir()
        if (suffix := file.name.rpartition(".")[2]) in _TYPES
    }

    def serve(request: Request, name: str) -> Response:
        if name not in found:
            raise ApiError(404, "There is no such file; the page is at /.")
        content, kind = found[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**_HEADERS, "content-type": kind, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    @router.get("/")
    async def page(request: Request) -> Response:
        return serve(request, "index.html")

    @router.get("/page/{name}")
    async def part(request: Request, name: str) -> Response:
        return serve(request, name)

    return router
