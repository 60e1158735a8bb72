"""An agent's memory is bounded, and its messages are left as they are."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from langchain_still import ChatStill, KVMemoryMiddleware
from still_agent import Budget, Compaction
from still_memory.errors import BudgetError, InputError

THREAD: Any = {"configurable": {"thread_id": "alice"}}
SAID = "The wind rose, the sea was long and grey, and nobody on the quay spoke a word. " * 3


def agent_of(chat: Any, *middleware: KVMemoryMiddleware) -> Any:
    return create_agent(chat, middleware=middleware, checkpointer=InMemorySaver())


def test_memory_stays_within_the_budget_and_the_state_tells_of_it(store: Path) -> None:
    seen: list[Compaction] = []
    chat = ChatStill(store=store, max_tokens=8)
    agent = agent_of(chat, KVMemoryMiddleware(budget=128, on_compaction=seen.append))
    for turn in range(8):
        state = agent.invoke({"messages": [HumanMessage(f"{turn}. {SAID}")]}, THREAD)
        memory = state["kv_memory"]
        assert memory["slots"] <= 128 and memory["session"] == "alice"
        assert memory["read_tokens"] < 80
        assert [m.text for m in state["messages"][::2]] == [f"{n}. {SAID}" for n in range(turn + 1)]
    assert memory["logical_tokens"] > 400
    assert memory["compactions"] == len(seen) > 2
    assert memory["cached_tokens"] + memory["read_tokens"] <= memory["logical_tokens"]
    chat.close()


def test_async_agents_are_bounded_too(store: Path) -> None:
    chat = ChatStill(store=store, max_tokens=8)
    agent = agent_of(chat, KVMemoryMiddleware(budget=Budget(slots=128, schedule="tiered")))

    async def main() -> int:
        for turn in range(4):
            state = await agent.ainvoke({"messages": [HumanMessage(f"{turn}. {SAID}")]}, THREAD)
        return int(state["kv_memory"]["slots"])

    assert asyncio.run(main()) <= 128
    chat.close()


def test_without_a_budget_the_model_keeps_its_own(chat: ChatStill) -> None:
    state = agent_of(chat, KVMemoryMiddleware()).invoke({"messages": [HumanMessage("Hi.")]}, THREAD)
    assert state["kv_memory"]["compactions"] == 0


def test_the_sizes_of_summarization_are_those_of_the_budget() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        middleware = KVMemoryMiddleware(trigger=("tokens", 2048), keep=("tokens", 100))
    assert middleware.budget == Budget(slots=2048, lookahead=100)
    with pytest.warns(UserWarning, match="trigger"):
        several = KVMemoryMiddleware(trigger=[("messages", 9), {"tokens": 700}, ("tokens", 900)])
    assert several.budget == Budget(slots=700)


def test_what_only_summaries_need_is_said_to_be_unused(chat: ChatStill) -> None:
    with pytest.warns(UserWarning, match="keep, model, summary_prompt, trigger") as warned:
        middleware = KVMemoryMiddleware(
            chat, trigger=("fraction", 0.5), keep=("messages", 20), summary_prompt="Sum up."
        )
    assert middleware.budget is None
    assert warned[0].filename == __file__


def test_mistakes_are_refused(chat: ChatStill) -> None:
    with pytest.raises(BudgetError):
        KVMemoryMiddleware(budget=4)
    with pytest.raises(InputError, match="leave these out"):
        KVMemoryMiddleware(budget=512, trigger=("tokens", 512))
    said = {"messages": [HumanMessage("Hi.")]}
    with pytest.raises(InputError, match="FakeListChatModel"):
        agent_of(FakeListChatModel(responses=["x"]), KVMemoryMiddleware()).invoke(said, THREAD)
    with pytest.raises(InputError, match="agent="):
        agent_of(chat, KVMemoryMiddleware(budget=512)).invoke(said, THREAD)
    assert chat.open().sessions() == []
