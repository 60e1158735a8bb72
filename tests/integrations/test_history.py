"""Code on `RunnableWithMessageHistory` goes on, and nothing is told twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory

from langchain_still import ChatStill, StillChatMessageHistory
from still_memory.errors import InputError

CONFIG: Any = {"configurable": {"session_id": "alice"}}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def chain_of(chat: ChatStill, *after: Any) -> Any:
    prompt = ChatPromptTemplate.from_messages(
        [("system", "You are brief."), MessagesPlaceholder("history"), ("human", "{said}")]
    )
    chain = prompt | chat
    for step in after:
        chain = chain | step
    return RunnableWithMessageHistory(
        chain,
        lambda session_id: StillChatMessageHistory(session_id, chat),
        input_messages_key="said",
        history_messages_key="history",
    )


@pytest.mark.parametrize("after", [(), (StrOutputParser(),)])
def test_each_turn_is_told_once_and_read_once(chat: ChatStill, after: Any) -> None:
    chain = chain_of(chat, *after)
    chain.invoke({"said": "My sister Ana lives in Porto."}, CONFIG)
    reply = chain.invoke({"said": "Where does my sister live?"}, CONFIG)
    assert "Porto" in (reply if isinstance(reply, str) else reply.text)
    history = StillChatMessageHistory("alice", chat).messages
    assert [type(m) for m in history] == [HumanMessage, AIMessage] * 2
    assert [turn.role for turn in chat.open().session("alice").history()] == [
        "system",
        *["user", "assistant"] * 2,
    ]
    assert chat.open().branches("alice") == ["alice"]


def test_what_a_prompt_puts_around_the_input_is_not_told_again_without(chat: ChatStill) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("history"), ("human", "Question: {said}")]
    )
    chain: Any = RunnableWithMessageHistory(
        prompt | chat,
        lambda session_id: StillChatMessageHistory(session_id, chat),
        input_messages_key="said",
        history_messages_key="history",
    )
    for said in ("Hello.", "Hello again."):
        chain.invoke({"said": said}, CONFIG)
    said = [m.text for m in StillChatMessageHistory("alice", chat).messages[::2]]
    assert said == ["Question: Hello.", "Question: Hello again."]


def test_a_file_is_read_without_a_model_and_the_newest_branch_is_shown(
    chat: ChatStill, store: Path
) -> None:
    chain_of(chat).invoke({"said": "Hello."}, CONFIG)
    chat.invoke([SystemMessage("Other."), HumanMessage("Hi.")], session_id="alice")
    history = StillChatMessageHistory("alice", store)
    assert history.messages[0].text == "Hi."
    with pytest.raises(InputError, match="ChatStill"):
        history.add_messages([HumanMessage("More.")])
    history.clear()
    history.clear()  # of nothing
    assert history.messages == [] and chat.open().sessions() == []
    assert chat.invoke("Hello.", session_id="alice").response_metadata["session"] == "alice"


def test_what_was_not_answered_here_is_read(chat: ChatStill) -> None:
    chat.invoke("Hello.", session_id="alice")
    history = StillChatMessageHistory("alice", chat)
    call = {"name": "now", "args": {}, "id": "c1", "type": "tool_call"}
    told = [
        *history.messages,
        HumanMessage("What time is it?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("noon", tool_call_id="c1"),
    ]
    history.add_messages(told)
    history.add_messages(told[-2:])  # is there by now
    shown = history.messages
    assert [m.text for m in shown] == [m.text for m in told]
    called, answered = shown[-2:]
    assert isinstance(called, AIMessage) and isinstance(answered, ToolMessage)
    assert called.tool_calls[0]["name"] == "now"
    assert answered.tool_call_id == called.tool_calls[0]["id"]
    about = chat.invoke([*shown, HumanMessage("Thanks.")], session_id="alice").response_metadata
    assert about["known"] == len(told) and about["forked_from"] is None


def test_text_that_looks_like_a_call_is_shown_as_it_was_said(chat: ChatStill) -> None:
    said = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'  # a call has its own lines
    chat.invoke([HumanMessage("How?"), AIMessage(said), HumanMessage("So?")], session_id="alice")
    history = StillChatMessageHistory("alice", chat).messages
    assert history[1].text == said
    about = chat.invoke([*history, HumanMessage("Oh.")], session_id="alice").response_metadata
    assert about["known"] == 4 and about["forked_from"] is None


def test_clear_deletes_the_conversation_and_no_other(chat: ChatStill) -> None:
    for session in ("alice", "bob"):
        chat.invoke("Hello.", session_id=session)
    for _ in range(2):
        StillChatMessageHistory("alice", chat).clear()
    assert [info.name for info in chat.open().sessions()] == ["bob"]


def test_a_conversation_that_is_called_as_anothers_branch_is_its_own(chat: ChatStill) -> None:
    for system in ("One.", "Two."):
        chat.invoke([SystemMessage(system), HumanMessage("Hello.")], session_id="alice")
    assert chat.open().branches("alice") == ["alice", "alice~2"]
    before = chat.open().session("alice~2").history()
    history = StillChatMessageHistory("alice~2", chat)
    history.add_messages([HumanMessage("My sister is Ana."), AIMessage("Noted.")])
    assert [m.text for m in history.messages] == ["My sister is Ana.", "Noted."]
    assert chat.open().session("alice~2").history() == before
