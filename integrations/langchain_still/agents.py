"""Agents, loaded when they are first needed and shared by all who ask for the same.

LangChain copies models freely: `configurable_fields` makes a new one for each call, and programs
write `ChatStill(...)` wherever they need one, as if it were a client. So the weights do not live in
the model object. Every object has a lease, which its copies share, and leases for the same options
come to the same agent. It is closed when the last of them is given up. A store without a file is no
two leases' at once: it would mix their conversations.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet, WeakValueDictionary

from pydantic import SecretStr

if TYPE_CHECKING:
    from still_agent.agent import Agent
    from still_agent.budget import Budget
    from still_agent.events import OnCompaction


@dataclass(frozen=True)
class Options:
    """What `Agent.load` is told."""

    model: str
    store: str | None
    tenant: str
    budget: Budget | None
    compactor: Any
    codec: str | None
    device: str | None
    dtype: str | None
    key: SecretStr | None
    on_compaction: OnCompaction | None

    def load(self) -> Agent:
        from still_agent.agent import Agent  # loads torch

        key = None if self.key is None or self.store is None else self.key.get_secret_value()
        return Agent.load(
            self.model,
            store=self.store,
            tenant=self.tenant,
            budget=self.budget,
            compactor=self.compactor,
            codec=self.codec,
            device=self.device,
            dtype=self.dtype,
            key=key or None,
            on_compaction=self.on_compaction,
        )


class _Shared:
    """One agent, once it is loaded, and who uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.agent: Agent | None = None
        self.leases: WeakSet[Lease] = WeakSet()


class Lease:
    """What one model object and its copies have open. Safe for threads."""

    def __init__(self) -> None:
        self._held: dict[Options, _Shared] = {}

    def agent(self, options: Options) -> Agent:
        """The agent of these options. Raises what `Agent.load` does."""
        with _LOCK:
            shared = self._held.get(options)
            if shared is None:
                shared = _SHARED.setdefault(self._place(options), _Shared())
                self._held[options] = shared
                shared.leases.add(self)
        with shared.lock:
            if shared.agent is None:
                shared.agent = options.load()
            return shared.agent

    def close(self) -> None:
        """Give up the agents; the next use loads them anew."""
        with _LOCK:
            held, self._held = self._held, {}
            left = []
            for options, shared in held.items():
                shared.leases.discard(self)
                if not shared.leases:  # whoever comes next gets another
                    left.append(shared)
                    _SHARED.pop(self._place(options), None)
        for shared in left:
            with shared.lock:
                if shared.agent is not None:
                    shared.agent.close()

    def _place(self, options: Options) -> Hashable:
        return (id(self) if options.store is None else None, options)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()  # in another process: loaded there when it is first needed


_SHARED: WeakValueDictionary[Hashable, _Shared] = WeakValueDictionary()
_LOCK = threading.Lock()
