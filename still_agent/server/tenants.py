"""An agent for each tenant: they share the model, the compactor and the file, and nothing else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from still_agent.agent import Agent


class Agents:
    """Agents by tenant, opened when they are first asked for.

    first: of the tenant whose name is empty; the others are like it. `agent_of` may raise
    StoreError.
    """

    def __init__(self, first: Agent) -> None:
        self.first = first
        self._agents = {"": first}
        self._lock = threading.Lock()

    def agent_of(self, tenant: str) -> Agent:
        with self._lock:
            if tenant not in self._agents:
                self._agents[tenant] = self.first.of_tenant(tenant)
            return self._agents[tenant]

    @property
    def open_sessions(self) -> int:
        with self._lock:
            return sum(agent.open_sessions for agent in self._agents.values())

    def close(self) -> None:
        with self._lock:
            for agent in self._agents.values():
                agent.close()
