"""What a message says comes out the same each time, and nothing else of it counts."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_still import ChatStill
from langchain_still.messages import to_still
from still_agent.messages import Message, ToolCall
from still_memory.errors import InputError

CALL = {"name": "now", "args": {"zone": "CET"}, "id": "c1", "type": "tool_call"}
CALLED = (ToolCall("now", {"zone": "CET"}, "c1"),)
BROKEN = {"name": "now", "args": "{zone", "id": "c2", "error": "no JSON"}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (SystemMessage("Be brief."), Message("system", "Be brief.")),
        (HumanMessage("Hi."), Message("user", "Hi.")),
        (HumanMessage("Hi.", name="Ana"), Message("user", "Ana: Hi.")),
        (HumanMessage(["Hi", {"type": "text", "text": " you"}]), Message("user", "Hi you")),
        (HumanMessage(content_blocks=[{"type": "text", "text": "Hi"}]), Message("user", "Hi")),
        (
            HumanMessage([{"type": "text-plain", "text": "A note.", "mime_type": "text/plain"}]),
            Message("user", "A note."),
        ),
        (AIMessage("Hm.", name="scout", id="1"), Message("assistant", "Hm.")),
        (AIMessageChunk("Hm."), Message("assistant", "Hm.")),
        (AIMessage("", tool_calls=[CALL]), Message("assistant", "", CALLED)),
        (
            AIMessage("Hm.", invalid_tool_calls=[BROKEN]),
            Message("assistant", "Hm.\nnow({zone)"),
        ),
        (
            AIMessage([{"type": "reasoning", "reasoning": "?"}, {"type": "text", "text": "Hm."}]),
            Message("assistant", "Hm."),
        ),
        (
            AIMessage(content_blocks=[{"type": "text", "text": "Hm."}, CALL]),
            Message("assistant", "Hm.", CALLED),
        ),
        (
            AIMessage([{"type": "tool_use", "name": "now", "input": {"zone": "CET"}, "id": "c1"}]),
            Message("assistant", "", CALLED),
        ),
        (
            ToolMessage("noon", tool_call_id="c1", artifact=object(), status="error"),
            Message("tool", "noon"),
        ),
        (
            ToolMessage([{"type": "text", "text": "no"}, "on"], tool_call_id="c1"),
            Message("tool", "noon"),
        ),
        (FunctionMessage("noon", name="now"), Message("tool", "noon")),
        (ChatMessage("Hi.", role="user"), Message("user", "Hi.")),
        (ChatMessage("Be kind.", role="developer"), Message("system", "Be kind.")),
    ],
)
def test_every_kind_of_message_is_read(message: BaseMessage, told: Message) -> None:
    assert to_still([message]) == [told]


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "image_url", "image_url": {"url": "https://x.y/z.png"}}]),
        HumanMessage([{"type": "image", "base64": "AAAA", "mime_type": "image/png"}]),
        HumanMessage([{"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"}]),
        HumanMessage([{"type": "file", "base64": "AAAA", "mime_type": "application/pdf"}]),
        HumanMessage([{"type": "video", "url": "https://x.y/z"}]),
        ToolMessage([{"type": "image", "url": "https://x.y/z"}], tool_call_id="c1"),
        HumanMessage([{"type": "tool_result", "content": "noon"}]),
        ChatMessage("Hi.", role="narrator"),
        RemoveMessage("1"),
    ],
)
def test_what_no_text_model_can_read_is_refused_and_leaves_no_session(
    chat: ChatStill, message: BaseMessage
) -> None:
    with pytest.raises(InputError):
        chat.invoke([HumanMessage("Hello."), message])
    assert chat.open().sessions() == []


def test_a_system_message_may_come_in_the_middle(chat: ChatStill) -> None:
    told: list[Any] = [HumanMessage("Hello."), SystemMessage("Be kind."), HumanMessage("Hi.")]
    about = chat.invoke(told).response_metadata
    history = chat.open().session(about["session"]).history()
    assert [turn.role for turn in history] == ["user", "system", "user", "assistant"]
