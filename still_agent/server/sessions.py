"""`/v1/sessions`: what the store holds of a tenant, and turns of one session by its name.

An id stands percent-encoded in the path, slashes too, so that every name has one address. What only
looks reads the store as it was saved last, and waits for no turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from still_agent.agent import Agent
from still_agent.server import bodies
from still_agent.server.errors import ApiError, unknown_session
from still_agent.server.openai import Answered, Placed, Shape, TurnRequest, Wire, require_length
from still_agent.server.replies import Json
from still_agent.server.service import Service
from still_agent.server.turns import Turn
from still_memory.checkpoint import SHARES
from still_memory.records import Head, SessionInfo, TurnRecord
from still_memory.taint import Forks

PAGE, LARGEST_PAGE = 20, 1000
T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE)]


class _New(Wire):
    id: str
    system: str | None = None


class _Fork(Wire):
    name: str
    at: int | None = None


class _Rewind(Wire):
    at: int


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/sessions")
    look = service.turns.look

    async def compute(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a job returns that may take a turn's time; it ends when the request does."""

        def work(turn: Turn) -> None:
            turn.emit(job())

        async with service.turns.run(work) as turn:
            (found,) = [event async for event in turn if isinstance(event, dict)]
        return found

    @router.get("")
    async def every(
        request: Request, limit: Limit = PAGE, after: str | None = None, q: str = ""
    ) -> Response:
        agent = await service.agent(request)

        def read() -> list[SessionInfo]:
            if not q:
                return agent.store.sessions(limit + 1, after)
            wanted = q.casefold()  # of names that may be sealed: SQL cannot look for it
            found = (i for i in agent.store.sessions(None, after) if wanted in i.name.casefold())
            return list(islice(found, limit + 1))

        infos = await look(read)
        return Json(_page([_line(info) for info in infos[:limit]], more=len(infos) > limit))

    @router.post("")
    async def begin(request: Request) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, _New, service.limits)
        require_length(asked.system or "", service.limits.message_chars, "system")

        def job() -> dict[str, Any]:
            if agent.store.head(asked.id) is not None:
                raise ApiError(409, "There is a session of that name.", code="session_exists")
            agent.keep_open(agent.session(asked.id, system=asked.system))
            return _shown(agent, asked.id)

        return Json(await compute(job), status_code=201)

    @router.get("/{id}")
    async def show(request: Request, id: str) -> Response:
        agent = await service.agent(request)
        return Json(await look(_shown, agent, unquote(id)))

    @router.delete("/{id}")
    async def delete(
        request: Request, id: str, erase: bool = False, forks: Forks | None = None
    ) -> Response:
        agent = await service.agent(request)
        name = unquote(id)

        def job() -> dict[str, Any]:
            gone = agent.delete(name, erase=erase, forks=forks)
            return {"id": name, "object": "session.deleted", "deleted": True,
                    "sessions": gone.sessions}  # fmt: skip

        return Json(await compute(job))

    @router.get("/{id}/turns")
    async def turns(
        request: Request,
        id: str,
        limit: Limit = 100,
        after: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        agent = await service.agent(request)

        def read() -> Sequence[TurnRecord]:
            return agent.store.history(_head(agent, unquote(id)))

        told = (await look(read))[after:]
        return Json(_page([_turn(turn) for turn in told[:limit]], len(told) > limit))

    @router.get("/{id}/search")
    async def search(request: Request, id: str, q: str, limit: Limit = PAGE) -> Response:
        agent = await service.agent(request)

        def read() -> list[dict[str, Any]]:
            found = agent.store.search(_head(agent, unquote(id)), q, limit)
            return [
                {"number": m.number, "role": m.role, "created": _seconds(m.created),
                 "excerpt": m.excerpt} for m in found
            ]  # fmt: skip

        return Json(_page(await look(read), more=False))

    @router.post("/{id}/fork")
    async def fork(request: Request, id: str) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, _Fork, service.limits)

        def job() -> dict[str, Any]:
            agent.keep_open(agent.resume(unquote(id)).fork(asked.name, asked.at))
            return _shown(agent, asked.name)

        return Json(await compute(job), status_code=201)

    @router.post("/{id}/rewind")
    async def rewind(request: Request, id: str) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, _Rewind, service.limits)

        def job() -> dict[str, Any]:
            agent.resume(unquote(id)).rewind(asked.at)
            return _shown(agent, unquote(id))

        return Json(await compute(job))

    @router.post("/{id}/turns")
    async def say(request: Request, id: str) -> Response:
        agent = await service.agent(request)
        asked = await bodies.read(request, TurnRequest, service.limits)
        require_length(asked.text, service.limits.message_chars, "text")
        options = asked.sampling(service.limits.max_tokens)

        def job(turn: Turn) -> None:
            _say(agent, unquote(id), asked, options, turn)

        shape = Shape(service.model, asked.include_usage, compactions=True)
        return service.reply(job, shape, stream=bool(asked.stream))

    return router


def _say(agent: Agent, name: str, asked: TurnRequest, options: dict[str, Any], turn: Turn) -> None:
    """One message, and the reply to it; in its thread."""
    session = agent.resume(name)
    agent.keep_open(session)
    with session.lock:  # other turns of the session wait
        turn.check()
        session.refresh()
        placed = Placed(session.id, session.stats.turns)
        turn.emit(placed)
        with session.stream(asked.text, role=asked.role, on_token=turn.check, **options) as stream:
            for piece in stream:
                turn.emit(piece)
            stats = session.stats
    assert stream.reply is not None  # its pieces have ended
    turn.emit(Answered(stream.reply, placed, 0, stats.slots, stats.logical_tokens))


# -- what is shown ----------------------------------------------------------------------------


def _head(agent: Agent, name: str) -> Head:
    head = agent.store.head(name)
    if head is None:
        raise unknown_session()
    return head


def _shown(agent: Agent, name: str) -> dict[str, Any]:
    """A session's figures and the spans that it consists of, as it was saved last."""
    head = _head(agent, name)
    entries = agent.store.load(head).entries
    layout = [
        {
            "share": e.share, "level": e.level, "slots": e.slots, "tokens_start": e.low,
            "tokens_end": e.high, "rounds": e.span.rounds,
        }
        for e in entries
    ]  # fmt: skip
    spans = {id(e.span): e.span.nbytes for e in entries}
    return {
        "id": head.session,
        "object": "session",
        "model": head.model.name,
        "system": head.settings.get("system"),
        "turns": head.turns,
        "tokens": head.tokens,
        "slots": sum(e.slots for e in entries),
        "budget": agent.budget.slots,
        **{share: sum(e.slots for e in entries if e.share == share) for share in SHARES},
        "rounds": max((e.span.rounds for e in entries), default=0),
        "bytes": sum(spans.values()),
        "full_bytes": head.tokens * agent.model.bytes_per_slot,
        "layout": layout,
    }


def _line(info: SessionInfo) -> dict[str, Any]:
    return {
        "id": info.name, "object": "session", "model": info.model, "turns": info.turns,
        "tokens": info.tokens, "slots": info.slots, "bytes": info.bytes,
        "created": _seconds(info.created), "updated": _seconds(info.updated),
    }  # fmt: skip


def _turn(turn: TurnRecord) -> dict[str, Any]:
    return {
        "number": turn.number, "role": turn.role, "text": turn.text, "tokens": len(turn.tokens),
        "created": _seconds(turn.created),
        "usage": {
            key: turn.usage[key]
            for key in ("reused_tokens", "prefilled_tokens", "generated_tokens", "compactions",
                        "steps")
            if key in turn.usage
        },
    }  # fmt: skip


def _seconds(time: datetime) -> float:
    return time.timestamp()


def _page(data: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": more}
