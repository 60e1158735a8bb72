"""LangChain's messages as an agent's, and a reply as LangChain's.

What a message says must come out the same each time that it is sent, or a conversation would not
be recognised. So only what is said counts: text, and the tools that are called. What clients and
graphs add on the way (ids, metadata, an agent's name on its replies) does not, and neither does
reasoning, which leaves memory with its turn. Several blocks of text are one text, without anything
between them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk

from still_agent.messages import Message, Role, ToolCall
from still_memory.errors import InputError
from still_memory.recognition import thread_of

if TYPE_CHECKING:
    from still_agent.answering import Place
    from still_agent.reply import Reply, Usage

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
}
_CALLS = ("tool_call", "tool_use")  # the standard's block, and Anthropic's
_UNSAID = (*_CALLS, "reasoning", "thinking", "redacted_thinking", "tool_call_chunk")


def to_still(messages: Sequence[BaseMessage]) -> list[Message]:
    """The messages as `Agent.answer` takes them.

    A user's `name` leads the text ("Ana: hello"), for a model has no other place for it. A call
    whose arguments could not be parsed is text, for there is nothing to carry out.

    InputError for images, audio and files, and for roles that are unknown.
    """
    return [_to_still(message) for message in messages]


def _to_still(message: BaseMessage) -> Message:
    text = _text(message)
    match message:
        case SystemMessage():
            return Message("system", text)
        case HumanMessage():
            return Message("user", f"{message.name}: {text}" if message.name else text)
        case AIMessage():
            broken = [f"{call['name']}({call['args']})" for call in message.invalid_tool_calls]
            text = "\n".join([*([text] if text else []), *broken])
            return Message("assistant", text, tuple(_calls(message)))
        case ToolMessage() | FunctionMessage():
            return Message("tool", text)
        case ChatMessage() if message.role in _ROLES:
            return Message(_ROLES[message.role], text)
    what = message.role if isinstance(message, ChatMessage) else type(message).__name__
    raise InputError(f"{what!r} is no message to a model: send {', '.join(_ROLES)}")


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_said(block) for block in message.content)


def _said(block: str | dict[str, Any]) -> str:
    if isinstance(block, str):
        return block
    if (kind := block.get("type")) in _UNSAID:
        return ""
    if isinstance(text := block.get("text"), str):  # "text", "text-plain", "input_text", ...
        return text
    raise InputError(
        f"a message has content of type {kind!r}, and this model reads text alone: leave it out, "
        "or say in words what it shows"
    )


def _calls(message: AIMessage) -> Iterator[ToolCall]:
    for call in message.tool_calls:
        yield ToolCall(call["name"], call["args"], call["id"] or "")
    if not message.tool_calls and not isinstance(message.content, str):
        for block in message.content:
            if isinstance(block, dict) and block.get("type") in _CALLS:
                arguments = block.get("args", block.get("input", {}))
                yield ToolCall(block["name"], arguments, block.get("id") or "")


def to_message(reply: Reply, place: Place, model: str) -> AIMessage:
    """A whole reply."""
    return AIMessage(
        reply.text,
        tool_calls=[tool_call(name=c.name, args=c.arguments, id=_id()) for c in reply.tool_calls],
        usage_metadata=_usage(reply.usage, place),
        **_about(reply, place, model),
    )


def to_last_chunk(reply: Reply, place: Place, model: str) -> AIMessageChunk:
    """What comes after a reply's pieces: its calls and its usage."""
    return AIMessageChunk(
        content="",
        tool_call_chunks=[
            tool_call_chunk(
                name=c.name,
                args=json.dumps(c.arguments, ensure_ascii=False),
                id=_id(),
                index=index,
            )
            for index, c in enumerate(reply.tool_calls)
        ],
        usage_metadata=_usage(reply.usage, place),
        chunk_position="last",
        **_about(reply, place, model),
    )


def _about(reply: Reply, place: Place, model: str) -> dict[str, Any]:
    stats = place.session.stats
    about = {
        "model_name": model,
        "model_provider": "still",
        "finish_reason": reply.finish,
        "session": place.session.id,
        "forked_from": place.forked_from,
        "begun_anew": begun_anew(place),
        "known": place.known,
        "compactions": reply.usage.compactions,
        "slots": stats.slots,
        "logical_tokens": stats.logical_tokens,
    }
    reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
    return {"response_metadata": about, "additional_kwargs": reasoning}


def begun_anew(place: Place) -> bool:
    """Whether a branch of a known conversation was begun, of which no session has had anything."""
    settings = place.head.settings
    pinned = int(settings.get("system") is not None)
    return place.forked_from is None and bool(thread_of(settings)) and place.known == pinned


def _usage(usage: Usage, place: Place) -> UsageMetadata:
    """What stood in the state before this call is cached; what a new branch had to read is not."""
    read = usage.reused_tokens + usage.prefilled_tokens
    return UsageMetadata(
        input_tokens=read,
        output_tokens=usage.generated_tokens,
        total_tokens=read + usage.generated_tokens,
        input_token_details=InputTokenDetails(
            cache_read=max(0, usage.reused_tokens - place.read_tokens)
        ),
    )


def _id() -> str:
    return f"call_{secrets.token_hex(12)}"
