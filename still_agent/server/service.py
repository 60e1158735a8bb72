"""What every route works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

from still_agent.agent import Agent
from still_agent.server.guard import tenant_of
from still_agent.server.keys import Keys
from still_agent.server.limits import Limits
from still_agent.server.metrics import Metrics
from still_agent.server.openai import Shape
from still_agent.server.replies import TurnResponse
from still_agent.server.tenants import Agents
from still_agent.server.turns import Turn, Turns
from still_memory.store import MemoryStore


@dataclass(frozen=True)
class Service:
    """The server's parts. `model`: what clients call the model."""

    agents: Agents
    turns: Turns
    limits: Limits
    metrics: Metrics
    keys: Keys | None
    model: str
    hidden: tuple[str, ...]  # the store's paths, which no client is told

    @classmethod
    def of(
        cls,
        load: Callable[..., Agent],
        limits: Limits,
        keys: Keys | None = None,
        model: str | None = None,
    ) -> Service:
        """load: gives the agent of the first tenant, with a file, from options of `Agent.load`."""
        metrics = Metrics()
        turns = Turns(limits, metrics)
        agent = load(
            on_compaction=turns.on_compaction,
            open_sessions=limits.open_sessions,
            longest_message=limits.message_chars,
        )
        agents = Agents(agent)
        metrics.watch_open_sessions(lambda: agents.open_sessions)
        assert isinstance(agent.store, MemoryStore)
        path = agent.store.path
        hidden = (str(path.absolute()), str(path))
        return cls(agents, turns, limits, metrics, keys, model or agent.model.name, hidden)

    async def agent(self, request: Request) -> Agent:
        """The agent of whoever asks. ApiError 401, 403."""
        tenant = tenant_of(request, self.keys)
        return await self.turns.look(self.agents.agent_of, tenant)

    def reply(self, job: Callable[[Turn], None], shape: Shape, *, stream: bool) -> TurnResponse:
        """The response that runs a turn."""
        return TurnResponse(self.turns, self.metrics, job, shape, stream=stream, hidden=self.hidden)
