"""Chat models of one reference model, which is loaded once a test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_still import ChatStill
from still_agent import Agent, Budget
from still_agent.compactor import choose_compactor
from still_agent.models import FrozenModel, load_model
from still_memory.store import MemoryStore

MakeChat = Callable[..., ChatStill]


@pytest.fixture(scope="session")
def reference() -> FrozenModel:
    return load_model("reference")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def make_chat(reference: FrozenModel, store: Path) -> Iterator[MakeChat]:
    """`make_chat(slots=, **options)`: of one agent, on a file of the test's own."""
    made: list[Agent] = []

    def make(slots: int = 1024, model: FrozenModel | None = None, **options: Any) -> ChatStill:
        if not made:
            compactor = choose_compactor(None, "reference", reference)
            kept = MemoryStore(store)
            made.append(Agent(model or reference, compactor, kept, budget=Budget(slots=slots)))
        return ChatStill(agent=made[0], **{"max_tokens": 24, **options})

    yield make
    for agent in made:
        agent.close()


@pytest.fixture
def chat(make_chat: MakeChat) -> ChatStill:
    return make_chat()
