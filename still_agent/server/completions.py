"""`/v1/chat/completions` and `/v1/models`: OpenAI's routes, over `Agent.answer`.

The session is the one that the header `X-Session-Id` or the field `session_id` names, else the one
that is recognised by its messages. A name that a response gave, a branch's or a nameless
conversation's, leads back to its conversation.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request
from starlette.responses import Response

from still_agent.agent import Agent
from still_agent.server import bodies
from still_agent.server.errors import ApiError
from still_agent.server.openai import Answered, ChatRequest, Placed, Shape
from still_agent.server.replies import Json
from still_agent.server.service import Service
from still_agent.server.turns import Turn
from still_memory.recognition import thread_of
from still_memory.records import check_text


def routes(service: Service, started: int) -> APIRouter:
    """started: when the server did, in seconds since 1970."""
    router = APIRouter(prefix="/v1")
    model = {"id": service.model, "object": "model", "created": started, "owned_by": "still-agent"}

    @router.get("/models")
    async def models(request: Request) -> Response:
        await service.agent(request)
        return Json({"object": "list", "data": [model]})

    @router.get("/models/{id:path}")
    async def one_model(request: Request, id: str) -> Response:
        await service.agent(request)
        _require_model(service, unquote(id))
        return Json(model)

    @router.post("/chat/completions")
    async def complete(request: Request) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, ChatRequest, service.limits)
        _require_model(service, asked.model)
        asked.require_possible()
        name = session_named(request.headers.get("x-session-id"), asked.session_id)
        options = {
            "messages": asked.conversation(service.limits.message_chars),
            "tools": asked.declared(),
            "tool_choice": asked.choice(),
            "schema": asked.schema_asked(),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            **asked.sampling(service.limits.max_tokens),
        }

        def job(turn: Turn) -> None:
            _answer(agent, name, options, turn)

        shape = Shape(service.model, asked.include_usage)
        return service.reply(job, shape, stream=bool(asked.stream))

    return router


def session_named(header: str | None, field: str | None) -> str | None:
    """The session that a request names. ApiError 400 if it names two."""
    told = None if header is None else unquote(header, errors="replace")
    if told is not None and field is not None and told != field:
        raise ApiError(
            400, "X-Session-Id and session_id name different sessions.", param="session_id"
        )
    return field if told is None else told


def _require_model(service: Service, name: str) -> None:
    if name != service.model:
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist; this server has {service.model!r}.",
            code="model_not_found",
            param="model",
        )


def _answer(agent: Agent, name: str | None, options: dict[str, Any], turn: Turn) -> None:
    """One reply; in its thread."""
    thread = None if name is None else _conversation(agent, name)
    with agent.answer(session=thread, on_token=turn.check, **options) as answering:
        with answering.alone():  # waits for the session's other turns
            turn.check()
            place = answering.place
            assert place is not None  # it is found by now
            session = place.session
            placed = Placed(session.id, place.known, place.forked_from)
            turn.emit(placed)
            for piece in answering:
                turn.emit(piece)
            stats = session.stats
        reply = answering.reply
    assert reply is not None  # its pieces have ended
    turn.emit(Answered(reply, placed, place.read_tokens, stats.slots, stats.logical_tokens))


def _conversation(agent: Agent, name: str) -> str | None:
    """The conversation that a session is a branch of; None for one without a name."""
    check_text(name, "a session name")
    head = agent.store.head(name)
    if head is None or (thread := thread_of(head.settings)) is None:
        return name
    return thread or None
