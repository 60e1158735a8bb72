"""OpenAI's wire shapes: what a request may say, and a reply as one object or as chunks.

Unknown fields are let through, as OpenAI's own server lets through what older ones did not know. A
field that would change what is answered, and that cannot be done, is an error: more than one
choice, log probabilities, images, the older API's functions.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from still_agent.events import Compaction
from still_agent.grammar import CHOICES
from still_agent.messages import Message, Role, ToolCall
from still_agent.reply import Reply
from still_agent.server.errors import ApiError
from still_agent.tools import Tool

Json = dict[str, Any]
_LARGEST_SEED = 2**63


class Wire(BaseModel):
    """A request's body; unknown fields are let through."""

    model_config = ConfigDict(extra="allow")


class _Part(Wire):
    type: str
    text: str | None = None


class _Function(Wire):
    name: str
    arguments: str = ""
    description: str | None = None
    parameters: Json | None = None


class _Call(Wire):
    id: str = ""
    type: str = "function"
    function: _Function


class _Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None


class _Tool(Wire):
    type: Literal["function"]
    function: _Function


class _Named(Wire):
    type: Literal["function"]
    function: _Function


class _JsonSchema(Wire):
    # `schema` would hide a method of pydantic's
    schema_: Json = Field(default_factory=dict, alias="schema")


class _Format(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(Wire):
    include_usage: bool = False


Stop = str | Annotated[list[str], Field(max_length=16)]


class Drawing(Wire):
    """How a reply is drawn and sent."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    def sampling(self, most: int) -> Json:
        """Options of `Sampling`. ApiError 400 for more than `most` tokens."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        tokens = getattr(self, name)
        if tokens is not None and tokens > most:
            raise ApiError(
                400, f"{name} is {tokens}, and this server gives at most {most}.", param=name
            )
        seed = None if self.seed is None else self.seed % _LARGEST_SEED
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        options = {
            "temperature": self.temperature, "top_p": self.top_p, "seed": seed,
            "stop": None if stop is None else tuple(stop), "max_tokens": tokens,
        }  # fmt: skip
        return {key: value for key, value in options.items() if value is not None}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Drawing):
    """`POST /v1/chat/completions`."""

    model: Annotated[str, StringConstraints(min_length=1)]
    messages: Annotated[list[_Message], Field(min_length=1)]
    n: int | None = 1
    logprobs: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Named | None = None
    parallel_tool_calls: bool | None = True
    functions: object = None
    response_format: _Format | None = None
    session_id: str | None = None

    def require_possible(self) -> None:
        """ApiError 400 for what would be answered otherwise than it was asked."""
        if self.n not in (None, 1):
            raise ApiError(400, "n must be 1: a session goes on in one way.", param="n")
        if self.functions is not None:
            raise ApiError(400, "functions are of an older API; give tools.", param="functions")
        if self.logprobs:
            raise ApiError(400, "logprobs are not given; leave them out.", param="logprobs")

    def conversation(self, longest: int) -> list[Message]:
        """The messages. ApiError 400 for parts that are no text, and too long ones."""
        return [_message(message, i, longest) for i, message in enumerate(self.messages)]

    def declared(self) -> list[Tool]:
        """The tools. Raises InputError."""
        functions = [tool.function for tool in self.tools or ()]
        return [
            Tool(f.name, f.description or "", f.parameters or _NO_PARAMETERS) for f in functions
        ]

    def choice(self) -> str:
        """The tool choice, as `Agent.answer` has it."""
        if self.tool_choice is None:
            return "auto"
        if isinstance(self.tool_choice, str):
            if self.tool_choice in CHOICES:
                return self.tool_choice
            known = ", ".join(CHOICES)
            raise ApiError(400, f"tool_choice is {known} or names a function.", param="tool_choice")
        name = self.tool_choice.function.name
        if name in CHOICES:
            raise ApiError(400, f"A tool called {name!r} cannot be named.", param="tool_choice")
        return name

    def schema_asked(self) -> Json | None:
        """The JSON schema that the reply is to keep to, if any."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return {"type": "object"}
        if asked.json_schema is None:
            raise ApiError(400, "json_schema is missing.", param="response_format.json_schema")
        return asked.json_schema.schema_


class TurnRequest(Drawing):
    """`POST /v1/sessions/{id}/turns`: one message, and the reply to it."""

    text: str
    role: Literal["user", "tool"] = "user"


_NO_PARAMETERS: Json = {"type": "object", "properties": {}}


def _message(message: _Message, index: int, longest: int) -> Message:
    at = f"messages[{index}]"
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400,
                    f"{part.type!r} cannot be read: this model reads text only.",
                    param=f"{at}.content[{number}]",
                )
        content = "\n".join(part.text or "" for part in content)
    text = content or ""
    require_length(text, longest, f"{at}.content")
    role: Role = "system" if message.role == "developer" else message.role
    calls = tuple(_call(call, f"{at}.tool_calls") for call in message.tool_calls or ())
    if calls and role != "assistant":
        raise ApiError(400, "Only an assistant calls tools.", param=f"{at}.tool_calls")
    return Message(role, text, calls)


def require_length(text: str, longest: int, param: str) -> None:
    """ApiError 400 for a text that is too long."""
    if len(text) > longest:
        raise ApiError(
            400,
            f"The message has {len(text):,} characters and {longest:,} are allowed.",
            code="message_too_long",
            param=param,
        )


def _call(call: _Call, param: str) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400, "A tool call's arguments must be a JSON object, as a string.", param=param
        )
    return ToolCall(call.function.name, arguments, call.id)


# -- replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """Where a conversation goes on."""

    session: str
    known: int  # turns that the session had of it
    forked_from: str | None = None

    def extension(self) -> Json:
        return {"session": self.session, "known": self.known, "forked_from": self.forked_from}


@dataclass(frozen=True)
class Answered:
    """A reply that is saved."""

    reply: Reply
    placed: Placed
    read_tokens: int  # of those reused, what was taken in only to get there
    slots: int
    logical_tokens: int

    def usage(self) -> Json:
        usage = self.reply.usage
        prompt = usage.reused_tokens + usage.prefilled_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": usage.generated_tokens,
            "total_tokens": prompt + usage.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.reused_tokens - self.read_tokens},
        }

    def extension(self) -> Json:
        return {
            **self.placed.extension(),
            "compactions": self.reply.usage.compactions,
            "slots": self.slots,
            "logical_tokens": self.logical_tokens,
        }


@dataclass(frozen=True)
class Shape:
    """One reply's form on the wire."""

    model: str
    include_usage: bool = False
    compactions: bool = False  # whether they are told as they happen, in chunks without a choice
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answered: Answered) -> Json:
        reply = answered.reply
        message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.tool_calls:
            message["content"] = reply.text or None
            message["tool_calls"] = _calls(reply.tool_calls)
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish,
        }  # fmt: skip
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": answered.usage(),
            "still": answered.extension(),
        }

    def first(self, placed: Placed) -> Json:
        chunk = self._chunk({"role": "assistant", "content": "", "refusal": None})
        return {**chunk, "still": placed.extension()}

    def piece(self, text: str) -> Json:
        return self._chunk({"content": text})

    def compaction(self, event: Compaction) -> Json:
        told = {
            "tokens_start": event.tokens_start, "tokens_end": event.tokens_end,
            "slots_before": event.slots_before, "slots_after": event.slots_after,
            "rounds": event.rounds, "level": event.level, "seconds": event.seconds,
        }  # fmt: skip
        return {**self._chunk(None), "still": {"compaction": told}}

    def last(self, answered: Answered) -> Iterable[Json]:
        """What comes after the commit: reasoning, calls, the reason of the end, usage."""
        reply = answered.reply
        if reply.reasoning:
            yield self._chunk({"reasoning_content": reply.reasoning})
        for index, call in enumerate(_calls(reply.tool_calls)):
            yield self._chunk({"tool_calls": [{"index": index, **call}]})
        yield {**self._chunk({}, reply.finish), "still": answered.extension()}
        if self.include_usage:
            yield {**self._chunk(None), "usage": answered.usage()}

    def _chunk(self, delta: Json | None, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [] if delta is None else [choice],
        }
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": None,
        }  # fmt: skip


def _calls(calls: Sequence[ToolCall]) -> list[Json]:
    return [
        {
            "id": call.id or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for call in calls
    ]
