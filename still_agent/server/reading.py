"""`/v1/sessions/{id}/read`: a text of any length, taken in without a reply.

A long one is several turns, each saved as it is read: whoever hangs up undoes only the part that is
being read. Compactions are told as they happen, like those of a reply.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import unquote

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from still_agent.agent import Agent
from still_agent.reply import Reply
from still_agent.server import bodies
from still_agent.server.openai import Answered, Placed, Shape
from still_agent.server.service import Service
from still_agent.server.turns import Turn


class _Read(BaseModel):
    text: str
    role: Literal["user", "tool"] = "user"
    stream: bool = False


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/sessions")

    @router.post("/{id}/read")
    async def read(request: Request, id: str) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, _Read, service.limits)

        def job(turn: Turn) -> None:
            _take_in(agent, unquote(id), asked, turn)

        shape = Shape(service.model, include_usage=True, compactions=True)
        return service.reply(job, shape, stream=asked.stream)

    return router


def _take_in(agent: Agent, name: str, asked: _Read, turn: Turn) -> None:
    """In its thread; what it reads is bounded by the body's size and the turn's time."""
    session = agent.resume(name)
    agent.keep_open(session)
    with session.lock:  # other turns of the session wait
        turn.check()
        session.refresh()
        placed = Placed(session.id, session.stats.turns)
        turn.emit(placed)
        usage = session.read(asked.text, role=asked.role)
        stats = session.stats
    reply = Reply("", usage, "stop")
    turn.emit(Answered(reply, placed, 0, stats.slots, stats.logical_tokens))
