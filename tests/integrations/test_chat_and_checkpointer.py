"""A thread's state and its memory: one file, one life."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from langchain_still import ChatStill, KVMemoryMiddleware, StillCheckpointer

from .conftest import MakeChat


@pytest.fixture
def checkpoints(store: Path) -> Iterator[StillCheckpointer]:
    opened = StillCheckpointer(store)
    yield opened
    opened.close()


@pytest.fixture
def agent(chat: ChatStill, checkpoints: StillCheckpointer) -> Any:
    middleware = [KVMemoryMiddleware()]
    return create_agent(
        chat, system_prompt="You are brief.", middleware=middleware, checkpointer=checkpoints
    )


def named(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def say(agent: Any, thread: str, text: str) -> Any:
    return agent.invoke({"messages": [HumanMessage(text)]}, named(thread))["messages"][-1]


def test_a_copied_thread_goes_on_in_its_own_session_without_reading(
    agent: Any, checkpoints: StillCheckpointer, chat: ChatStill
) -> None:
    say(agent, "alice", "My sister Ana lives in Porto.")
    checkpoints.copy_thread("alice", "bob")
    reply = say(agent, "bob", "Where does my sister live?")
    about = reply.response_metadata
    assert "Porto" in reply.text and (about["session"], about["known"]) == ("bob", 3)
    assert about["forked_from"] is None
    assert chat.open().branches("alice") == ["alice"]


def test_a_deleted_thread_begins_anew_while_the_model_is_open(
    agent: Any, checkpoints: StillCheckpointer, chat: ChatStill
) -> None:
    say(agent, "alice", "My sister Ana lives in Porto.")
    checkpoints.delete_thread("alice", erase=True)
    assert chat.open().sessions() == []
    about = say(agent, "alice", "Hello.").response_metadata
    assert (about["session"], about["known"], about["begun_anew"]) == ("alice", 1, False)
    assert agent.get_state(named("alice")).values["kv_memory"]["session"] == "alice"


def test_a_thread_whose_memory_is_forgotten_is_read_anew_from_its_messages(
    make_chat: MakeChat, store: Path
) -> None:
    """Not with this checkpointer, which forgets both: with one of another file."""
    chat = make_chat()
    other = StillCheckpointer(store.with_name("graphs.db"))
    agent = create_agent(chat, checkpointer=other)
    say(agent, "alice", "My sister Ana lives in Porto.")
    chat.open().delete_thread("alice")
    reply = say(agent, "alice", "Where does my sister live?")
    assert "Porto" in reply.text and reply.response_metadata["known"] == 0
    other.close()


def test_async_graphs_share_the_file_too(agent: Any, chat: ChatStill) -> None:
    async def main() -> list[Any]:
        said = {"messages": [HumanMessage("Hello.")]}
        return await asyncio.gather(*(agent.ainvoke(said, named(str(n))) for n in range(4)))

    sessions = [s["messages"][-1].response_metadata["session"] for s in asyncio.run(main())]
    assert sessions == ["0", "1", "2", "3"] == sorted(i.name for i in chat.open().sessions())
