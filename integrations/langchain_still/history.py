"""A conversation's messages for `RunnableWithMessageHistory`, out of the store's own ledger.

For code that still wraps its chain in that class, which LangChain has deprecated. It asks for the
history, hands it to the model with the new message, and adds both to the history when they are
answered. Where the model is a ChatStill, all of that is in the store by then; so there is nothing
left to do here but to read it, and to see that nothing is told twice. New code needs no history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import tool_call

from langchain_still.chat_model import ChatStill
from langchain_still.messages import to_still
from still_agent.tools import ToolFormat, format_for
from still_memory.errors import InputError
from still_memory.records import TurnRecord

if TYPE_CHECKING:
    from still_agent.ephemeral import Store


class StillChatMessageHistory(BaseChatMessageHistory):
    """The messages of one conversation, as `get_session_history` is to return them.

    session_id: its name; of several branches, the one that was written last is shown.
    store: the ChatStill that answers, or a store's file, to read it without a model.
    tenant: of a file.

    What is pinned, the system prompt, is no part of it: the chain's prompt says it.
    """

    def __init__(self, session_id: str, store: ChatStill | str | Path, *, tenant: str = "") -> None:
        super().__init__()
        self.session_id = session_id
        self._from, self._tenant = store, tenant

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """What was said, oldest first. Calls have ids of their own, for no model writes one."""
        with self._store() as store:
            return list(_messages(self._turns(store), self._form()))

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add what is not there yet: a ChatStill has committed what it answered.

        Whatever else there is, is read by the model as turns, not answered. InputError for that
        where only a file was given.
        """
        form = self._form()
        told = [(m.role, form.text(m.text, m.tool_calls)) for m in to_still(messages)]
        with self._store() as store:
            had = [(turn.role, turn.text) for turn in self._turns(store)]
            name = self._name(store)
        there = next(n for n in range(len(told), -1, -1) if had[len(had) - n :] == told[:n])
        # What is asked may have been other words, out of the chain's prompt; the reply is the same.
        replied = (
            n
            for n, message in enumerate(messages, 1)
            if message.response_metadata.get("session") == name and had[-1:] == [told[n - 1]]
        )
        there = max(there, *replied, 0)
        if there == len(told):
            return
        if not isinstance(self._from, ChatStill):
            raise InputError(
                "these messages were not answered from this store, and a model must read them: "
                "give the ChatStill in place of the file"
            )
        agent = self._from.open()
        # A conversation that is begun gets a name of its own: its own may be another's branch.
        begun = [("user", "")]
        chat = agent.session(name) if name else agent.place(self.session_id, begun).session
        for role, text in told[there:]:
            chat.read(text, role=role)

    def clear(self) -> None:
        """Delete the conversation with all its branches, and a graph's states of that thread."""
        if isinstance(self._from, ChatStill):
            self._from.open().delete_thread(self.session_id)
            return
        with self._store() as store:
            store.delete_thread(self.session_id)

    @contextmanager
    def _store(self) -> Iterator[Store]:
        if isinstance(self._from, ChatStill):
            yield self._from.open().store
            return
        from still_memory.store import MemoryStore  # loads torch

        with closing(MemoryStore(self._from, tenant=self._tenant)) as store:
            yield store

    def _name(self, store: Store) -> str | None:
        """The branch that was written last."""
        names = store.branches(self.session_id)
        return next((info.name for info in store.sessions() if info.name in names), None)

    def _turns(self, store: Store) -> list[TurnRecord]:
        name = self._name(store)
        head = None if name is None else store.head(name)
        if head is None:
            return []
        pinned = int(head.settings.get("system") is not None)
        return store.history(head)[pinned:]

    def _form(self) -> ToolFormat:
        """How calls are written; a file alone does not tell, so most models' way is assumed."""
        if isinstance(self._from, ChatStill):
            return format_for(self._from.open().model.model.config.model_type)
        return format_for("")


def _messages(turns: Sequence[TurnRecord], form: ToolFormat) -> Iterator[BaseMessage]:
    waiting: list[str] = []  # ids of calls that have no result yet
    for turn in turns:
        match turn.role:
            case "assistant":
                content, calls = form.parse(turn.text)
                if form.text(content, calls) != turn.text:  # it only looks like calls
                    content, calls = turn.text, ()
                waiting = [f"call_{turn.id}_{n}" for n in range(len(calls))]
                named = [
                    tool_call(name=call.name, args=call.arguments, id=id)
                    for call, id in zip(calls, waiting, strict=True)
                ]
                yield AIMessage(content, tool_calls=named)
            case "tool":
                yield ToolMessage(turn.text, tool_call_id=waiting.pop(0) if waiting else "")
            case "system":
                yield SystemMessage(turn.text)
            case _:
                yield HumanMessage(turn.text)
