"""Policy for the memory of an agent: how many slots it may hold, and what became of them.

What LangChain's SummarizationMiddleware is for, without what it does. That one rewrites the list
of messages when it grows too long, which costs a call to a model and breaks every cached prefix.
Here the messages stay as they are, and memory is compacted under them: a thread's whole history is
in its graph's state, and what the model holds of it never passes the budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NotRequired, TypedDict

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ModelRequest,
    ModelResponse,
    OmitFromInput,
)
from langchain_core.messages import AIMessage

from langchain_still.chat_model import ChatStill
from still_agent.budget import Budget
from still_memory.errors import InputError


class KVMemory(TypedDict):
    """An agent's memory after its newest reply, in its state as `kv_memory`."""

    session: str
    slots: int  # held, of the budget
    logical_tokens: int  # that the conversation has had
    cached_tokens: int  # of the newest call: not read again,
    read_tokens: int  # and read
    compactions: int  # so far, in this thread


class KVMemoryState(AgentState[Any]):
    """What the middleware adds to an agent's state."""

    kv_memory: NotRequired[Annotated[KVMemory, OmitFromInput]]


class KVMemoryMiddleware(AgentMiddleware[KVMemoryState, Any, Any]):
    """A bounded memory for `create_agent`, in place of SummarizationMiddleware.

    ```python
    create_agent(
        model=ChatStill(model="reference", store="memory.db"),
        middleware=[KVMemoryMiddleware(budget=Budget(slots=2048))],
        checkpointer=...,
    )
    ```

    budget: a `Budget`, or its number of slots. None leaves the model's own.
    on_compaction: called after each compaction, see `still_agent.events.OnCompaction`.

    What SummarizationMiddleware takes is taken too. `trigger=("tokens", n)` is a budget of n slots,
    for a raw token is one slot, and `keep=("tokens", n)` is its look-ahead, the newest tokens that
    are never compacted. The rest has no meaning here, the `model` that writes summaries first of
    all: a warning names what is not used.

    InputError for an agent whose model is no ChatStill; BudgetError for shares that do not fit.
    """

    state_schema = KVMemoryState

    def __init__(
        self,
        model: object = None,
        *,
        budget: Budget | int | None = None,
        on_compaction: Callable[[Any], None] | None = None,
        trigger: Any = None,
        keep: Any = None,
        **summaries: Any,
    ) -> None:
        super().__init__()
        unused = dict(summaries) if model is None else {"model": model, **summaries}
        slots, unused_trigger = _tokens(trigger)
        lookahead, unused_keep = _tokens(keep)
        unused |= {"trigger": trigger} if unused_trigger else {}
        unused |= {"keep": keep} if unused_keep else {}
        if budget is not None and (slots, lookahead) != (None, None):
            raise InputError("budget says what trigger and keep would: leave these out")
        if slots is not None:
            budget = Budget(slots=slots, lookahead=lookahead)
        elif lookahead is not None:
            unused["keep"] = keep
        if unused:
            warnings.warn(
                f"KVMemoryMiddleware writes no summaries, so it does not use "
                f"{', '.join(sorted(unused))}; budget= is what bounds memory",
                stacklevel=2,
            )
        self.budget = Budget(slots=budget) if isinstance(budget, int) else budget
        self._on_compaction = on_compaction

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with this budget."""
        return handler(request.override(model=self._within(request.model)))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Call the model with this budget."""
        return await handler(request.override(model=self._within(request.model)))

    def after_model(self, state: KVMemoryState, runtime: object) -> dict[str, Any] | None:
        """Tell the state what memory is like now."""
        reply = next((m for m in reversed(state["messages"]) if isinstance(m, AIMessage)), None)
        if reply is None or "slots" not in reply.response_metadata or reply.usage_metadata is None:
            return None
        about, usage = reply.response_metadata, reply.usage_metadata
        cached = usage.get("input_token_details", {}).get("cache_read", 0)
        before = state["kv_memory"]["compactions"] if "kv_memory" in state else 0
        memory = KVMemory(
            session=about["session"],
            slots=about["slots"],
            logical_tokens=about["logical_tokens"],
            cached_tokens=cached,
            read_tokens=usage["input_tokens"] - cached,
            compactions=before + about["compactions"],
        )
        return {"kv_memory": memory}

    def _within(self, model: object) -> ChatStill:
        """The model with this budget; a copy shares what is loaded."""
        if not isinstance(model, ChatStill):
            raise InputError(
                f"KVMemoryMiddleware keeps the memory of a ChatStill, and this agent's model is a "
                f"{type(model).__name__}: create_agent(model=ChatStill(...)), or leave it out"
            )
        changes: dict[str, Any] = {}
        if self.budget is not None:
            changes |= {"budget": self.budget, "slots": None}
        if self._on_compaction is not None:
            changes["on_compaction"] = self._on_compaction
        if changes and model.agent is not None:
            raise InputError(
                "the model's agent= has its own budget and on_compaction: give these to "
                "Agent.load, or to the model in place of agent="
            )
        return model.model_copy(update=changes) if changes else model


def _tokens(size: Any) -> tuple[int | None, bool]:
    """The fewest tokens among SummarizationMiddleware's sizes; whether one is of another kind."""
    clauses = size if isinstance(size, list) else [] if size is None else [size]
    pairs = [
        pair
        for clause in clauses
        for pair in (clause.items() if isinstance(clause, dict) else [clause])
    ]
    tokens = [value for kind, value in pairs if kind == "tokens"]
    return min(tokens, default=None), len(tokens) < len(pairs)
