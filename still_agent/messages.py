"""What is said in a conversation, and by whom, as programs hand it to an agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Role = Literal["system", "user", "assistant", "tool"]

# Typed as any JSON value is told from any other object only by a checker; `object` would make
# every reader cast.
JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks for. `id` is whoever's that answers; no model writes one."""

    name: str
    arguments: dict[str, JsonValue]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One message: its text and, of an assistant, the tools that it calls."""

    role: Role
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
