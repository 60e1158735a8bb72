"""LangChain's ways of naming tools, and of choosing among them, as an agent's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from still_agent.tools import Tool
from still_memory.errors import InputError

Choice = str | bool | dict[str, Any] | None

_CHOICES = {"any": "required", "required": "required", "auto": "auto", "none": "none"}


def tools_of(tools: Sequence[Any]) -> list[Tool]:
    """What the model is told of. InputError for a tool that only a provider could run."""
    return [_tool(convert_to_openai_tool(tool)) for tool in tools]


def _tool(declared: Mapping[str, Any]) -> Tool:
    function = declared.get("function")
    if not isinstance(function, Mapping):
        raise InputError(
            f"a tool of type {declared.get('type')!r} runs at a provider, and there is none here: "
            "give functions, pydantic classes or tools of LangChain"
        )
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(function.get("name", ""), function.get("description") or "", parameters)


def choice_of(choice: Choice) -> str:
    """ "auto", "required", "none", or a tool's name, from all that is in use for them."""
    match choice:
        case None:
            return "auto"
        case bool():
            return "required" if choice else "none"
        case str():
            return _CHOICES.get(choice, choice)
        case {"function": {"name": str(name)}} | {"type": "tool", "name": str(name)}:
            return name
        case {"type": str(kind)} if kind in _CHOICES:
            return _CHOICES[kind]
    raise InputError(
        f'{choice!r} is no tool_choice: give "auto", "any", "none", a tool\'s name, or '
        '{"type": "function", "function": {"name": ...}}'
    )
