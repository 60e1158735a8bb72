"""A request's body: read within its limits, and checked; whatever is wrong is said with its place.

Not left to FastAPI, which would read all of it first, whatever its size.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from still_agent.server.errors import ApiError
from still_agent.server.limits import Limits

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, model: type[M], limits: Limits) -> M:
    """The body as `model` has it. ApiError 400, 408 or 413."""
    try:
        async with asyncio.timeout(limits.body_s):
            body = await _bytes(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.") from None
    except ClientDisconnect:
        raise ApiError(499, "The client has hung up.") from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "The request's body is no JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The request's body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as problem:
        raise _invalid(problem) from None


async def _bytes(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"The request's body is larger than {most:,} bytes.", code="request_too_large"
    )


def _invalid(problem: ValidationError) -> ApiError:
    """The first mistake, with its place as OpenAI writes one: messages[0].role."""
    first: Any = problem.errors(include_url=False, include_input=False)[0]
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():  # a union's member is named by its type, which is no field
            place += f".{part}" if place else part
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return ApiError(400, message, param=place or None)
