"""A LangGraph agent whose state and memory are one file: resumed, copied, gone back in, forgotten.

Run it with `python examples/langgraph_memory.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from langchain_still import ChatStill, StillCheckpointer


@contextmanager
def opened(store: Path) -> Iterator[tuple[Any, StillCheckpointer]]:
    """An agent and its checkpoints, as a process opens them."""
    model = ChatStill(model="reference", store=store, max_tokens=48)
    with closing(model), closing(StillCheckpointer(store)) as checkpoints:
        yield (
            create_agent(model, system_prompt="You are brief.", checkpointer=checkpoints),
            checkpoints,
        )


def say(agent: Any, thread: Any, text: str | None = None) -> None:
    said = None if text is None else {"messages": [HumanMessage(text)]}
    reply = agent.invoke(said, thread)["messages"][-1]
    cached = reply.usage_metadata["input_token_details"]["cache_read"]
    read = reply.usage_metadata["input_tokens"] - cached
    session = reply.response_metadata["session"]
    print(f"{session}: {reply.text}  ({read} tokens read, {cached} not again)")


def named(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "memory.db"
        with opened(store) as (agent, _):
            say(agent, named("alice"), "My sister Ana lives in Porto.")

        with opened(store) as (agent, checkpoints):  # another process
            say(agent, named("alice"), "Where does my sister live?")

            checkpoints.copy_thread("alice", "bob")  # state and memory at once; nothing is read
            say(agent, named("bob"), "My brother Max lives in Rome.")
            say(agent, named("bob"), "Where does my brother live?")

            # Time travel: the question is put otherwise, and the session is forked before it.
            history = agent.get_state_history(named("alice"))
            asked = next(past for past in history if past.next == ("model",))
            other = HumanMessage("Where does Ana live?", id=asked.values["messages"][-1].id)
            past = agent.update_state(asked.config, {"messages": [other]}, as_node="__start__")
            say(agent, past)
            say(agent, named("alice"), "Where does my sister live?")  # and the thread goes on there

            checkpoints.delete_thread("alice", erase=True)
            print("left:", [row.name for row in checkpoints.store.sessions()])


if __name__ == "__main__":
    main()
