"""Agents over the tiny model, and a compactor that uses all that spans allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from still_agent.agent import Agent
from still_agent.budget import Budget
from still_agent.ephemeral import EphemeralStore
from still_agent.models import FrozenModel
from still_agent.sampling import Sampling
from still_memory.compactors import StreamingCompactor
from still_memory.compactors.selection import join
from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts
from still_memory.span import Slots, Span
from still_memory.store import MemoryStore

MakeAgent = Callable[..., Agent]


class Pooling:
    """Means of neighbours with a bias; fewer slots in the last layer, an empty one in a head."""

    identity = CompactorIdentity(method="pooling", config="")

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        assert isinstance(slots, int)
        layers = []
        for index, parts in enumerate(zip(*(s.layers for s in spans), strict=True)):
            joined = join(parts)
            count = max(1, min(slots, len(joined)) - index)
            groups = torch.arange(len(joined)).tensor_split(count)
            pooled = {
                name: torch.stack([tensor[:, group].mean(1) for group in groups], dim=1)
                for name, tensor in joined.tensors().items()
                if name != "bias"
            }
            sizes = torch.tensor([len(g) for g in groups], dtype=torch.float32)
            bias = sizes.log().expand_as(pooled["positions"]).clone()
            if count > 2:
                bias[0, 1] = -torch.inf
            layers.append(Slots(**pooled, bias=bias))
        rounds = 1 + max(s.rounds for s in spans)
        address = self.identity.address
        return Span(spans[0].start, spans[-1].end, tuple(layers), None, rounds, address)


@pytest.fixture
def make_agent(tiny: FrozenModel) -> Iterator[MakeAgent]:
    """`make_agent(store, slots=, schedule=, horizon=, compactor=, ...)`; all are closed."""
    made: list[Agent] = []

    def make(
        store: Path | MemoryStore | None = None,
        *,
        slots: int = 64,
        schedule: Any = "rolling",
        horizon: int | None = None,
        compactor: Any = None,
        budget: Budget | None = None,
        **options: Any,
    ) -> Agent:
        kept: Any = MemoryStore(store) if isinstance(store, Path) else store or EphemeralStore()
        options.setdefault("sampling", Sampling(max_tokens=12))
        budget = budget or Budget(slots=slots, schedule=schedule, horizon=horizon)
        made.append(Agent(tiny, compactor or StreamingCompactor(), kept, budget=budget, **options))
        return made[-1]

    yield make
    for agent in made:
        agent.close()
