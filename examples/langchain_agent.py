"""A LangChain agent whose memory never fills: only its model is another.

Run it with `python examples/langchain_agent.py`.

The reference model was not trained to call tools, so a middleware says when it must. What it calls
is well formed all the same: the grammar lets nothing else through.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from langchain_still import ChatStill, KVMemoryMiddleware


def clock() -> str:
    """The time."""
    return "It is noon."


@wrap_model_call
def when_to_call(
    request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]
) -> ModelResponse:
    asked = request.messages[-1]
    call = isinstance(asked, HumanMessage) and "time" in asked.text
    return handler(request.override(tool_choice="clock" if call else "none"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = ChatStill(model="reference", store=Path(folder) / "memory.db", max_tokens=48)
        agent: Any = create_agent(
            model,
            tools=[clock],
            system_prompt="You are brief.",
            middleware=[KVMemoryMiddleware(budget=1024), when_to_call],
            checkpointer=InMemorySaver(),
        )
        alice: Any = {"configurable": {"thread_id": "alice"}}
        for said in (
            "My sister Ana lives in Porto.",
            "What time is it?",
            "Where does my sister live?",
        ):
            had = len(agent.get_state(alice).values.get("messages", []))
            state = agent.invoke({"messages": [HumanMessage(said)]}, alice)
            for message in state["messages"][had:]:
                calls = [call["name"] for call in getattr(message, "tool_calls", [])]
                print(f"{message.type}: {message.text or calls}")
                if isinstance(message, AIMessage) and (usage := message.usage_metadata):
                    cached = usage["input_token_details"]["cache_read"]
                    print(f"    {usage['input_tokens'] - cached} tokens read, {cached} not again")
        print(state["kv_memory"])
        model.close()


if __name__ == "__main__":
    main()
