"""How a model is told of tools, and how it calls them.

A format is what its model was trained on, so it is kept to the letter: the text that tells of the
tools is the one that the model's own chat template renders, and a call is written as that template
writes it. Neither goes through the template itself, for templates rewrite history (see
`models/tokenizers.py`).

A reply is content, then calls, then nothing more. Text that is not so is content to its last
character: a call quoted in the middle of a sentence is not carried out. Reading is total and takes
time in proportion to the text, whatever a model has written. What `grammar.py` lets through can be
read: of a key that is there twice the last value counts, and a number past the range of floats is
the largest of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from still_agent.messages import JsonValue, ToolCall
from still_memory.errors import InputError

DEEPEST = 256  # levels of nesting in a call's arguments
_FAILED = 256  # openings that begin no call; a reply with more of them is content
_DIGITS = 4000  # of an integer; Python writes and reads no more than 4,300
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """What the model may call. `parameters` is a JSON schema of an object.

    Raises InputError for a name that no call could spell plainly, and for a schema of anything
    else or that is no JSON.
    """

    name: str
    description: str
    parameters: dict[str, JsonValue]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InputError(
                f"{str(self.name)[:80]!r} cannot name a tool: use 1 to 128 of the characters "
                "A-Z a-z 0-9 _ . : / -"
            )
        if (
            not isinstance(self.parameters, dict)
            or self.parameters.get("type", "object") != "object"
        ):
            raise InputError(
                f"the parameters of tool {self.name!r} must be the JSON schema of an object: "
                '{"type": "object", "properties": {...}}'
            )
        try:
            json.dumps(self.declaration(), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"tool {self.name!r} cannot be told of ({error}): its description is text, and its "
                "parameters are JSON"
            ) from None

    def declaration(self) -> dict[str, JsonValue]:
        """Name, description where there is one, and parameters."""
        about: dict[str, JsonValue] = {"name": self.name}
        if self.description:
            about["description"] = self.description
        return {**about, "parameters": self.parameters}


class ToolFormat(Protocol):
    """One family's way of calling tools."""

    @property
    def name(self) -> str:
        """As a ledger has it."""
        ...

    @property
    def opening(self) -> str:
        """Where a call begins in a reply's text; text without it holds no call."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """From the first of these on, a text may turn out to be calls."""
        ...

    @property
    def ending(self) -> str:
        """What may follow the last call; mostly nothing."""
        ...

    def system(self, system: str | None, tools: Sequence[Tool]) -> str:
        """The pinned text that tells of the tools, as the model's own template renders it."""
        ...

    def around(self, name: str) -> tuple[str, str]:
        """A call's text from its opening to its arguments, and from there to its end."""
        ...

    def text(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An assistant's message as the model would write it, keys of arguments sorted.

        Without the calls' ids, which no model writes. InputError for arguments that are no JSON.
        """
        ...

    def parse(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Content, without blanks at its end, and calls. Never raises.

        `parse(text(c, calls)) == (c, calls)` for calls without ids, and content that ends neither
        in blanks nor in a call.
        """
        ...


class _Written:
    """What formats share: calls on lines of their own, at the end of a reply."""

    opening: str
    marks: tuple[str, ...]
    ending = ""

    def around(self, name: str) -> tuple[str, str]:
        raise NotImplementedError

    def text(self, content: str, calls: Sequence[ToolCall]) -> str:
        written = [self._call(call) for call in calls]
        return "\n".join([content, *written] if content else written)

    def _call(self, call: ToolCall) -> str:
        before, after = self.around(call.name)
        return f"{self.opening}{before}{_dump(call.arguments)}{after}"

    def parse(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        calls: list[ToolCall] = []
        begin = end = failed = 0  # of the calls that stand one behind the other
        for at in self._openings(text):
            if at < end:  # inside a call, as a string in its arguments
                continue
            if (read := self._read(text, at)) is None:
                calls, failed = [], failed + 1
                if failed > _FAILED:
                    break
                continue
            if calls and text[end:at].strip():
                calls = []
            if not calls:
                begin = at
            call, end = read
            calls.append(call)
        content = self._content(text[:begin], text[end:]) if calls else None
        return (text.rstrip(), ()) if content is None else (content, tuple(calls))

    def _openings(self, text: str) -> Iterator[int]:
        return (found.start() for found in re.finditer(re.escape(self.opening), text))

    def _read(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        """The call that begins at `at`, and where it ends."""
        raise NotImplementedError

    def _content(self, before: str, after: str) -> str | None:
        """What stands before the calls; None where they are not the end."""
        return None if after.strip() else before.rstrip()


class Qwen(_Written):
    """Qwen3's, which is Hermes': a JSON object between `<tool_call>` and `</tool_call>`."""

    name = "qwen"
    opening = "<tool_call>"
    marks = (opening,)

    def system(self, system: str | None, tools: Sequence[Tool]) -> str:
        if not tools:
            return system or ""
        lines = [_line({"type": "function", "function": tool.declaration()}) for tool in tools]
        told = "\n".join(
            [
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n",
                "You are provided with function signatures within <tools></tools> XML tags:",
                "<tools>",
                *lines,
                "</tools>\n",
                "For each function call, return a json object with function name and arguments "
                "within <tool_call></tool_call> XML tags:",
                "<tool_call>",
                '{"name": <function-name>, "arguments": <args-json-object>}',
                "</tool_call>",
            ]
        )
        return f"{system}\n\n{told}" if system else told

    def around(self, name: str) -> tuple[str, str]:
        return f'\n{{"name": {json.dumps(name)}, "arguments": ', "}\n</tool_call>"

    def _read(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        value, end = _value(text, at + len(self.opening))
        closing = _CLOSING.match(text, end)
        call = _as_call(value, "arguments")
        return (call, closing.end()) if call is not None and closing else None


class Gemma(_Written):
    """Gemma 3's, which has no tokens for tools: a JSON object with name and parameters.

    Google's guide shows the prompt and the bare object. Gemma likes to put it into a fence
    (```json or ```tool_code) and to break its lines, so both are read too.
    """

    name = "gemma"
    opening = '{"name":'
    marks = ("{", "```")
    ending = "\n```"

    def system(self, system: str | None, tools: Sequence[Tool]) -> str:
        if not tools:
            return system or ""
        declared = json.dumps([tool.declaration() for tool in tools], ensure_ascii=False, indent=2)
        told = (
            "You have access to functions. If you decide to invoke any of the function(s), "
            "you MUST put it in the format of\n"
            '{"name": function name, "parameters": dictionary of argument name and its value}\n\n'
            "You SHOULD NOT include any other text in the response if you call a function\n"
            f"{declared}"
        )
        return f"{system}\n\n{told}" if system else told

    def around(self, name: str) -> tuple[str, str]:
        return f' {json.dumps(name)}, "parameters": ', "}"

    def _openings(self, text: str) -> Iterator[int]:
        return (found.start() for found in _NAMED.finditer(text))

    def _read(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        value, end = _value(text, at)
        call = _as_call(value, "parameters")
        return None if call is None else (call, end)

    def _content(self, before: str, after: str) -> str | None:
        if after.strip() != "```":
            return super()._content(before, after)
        fence = _FENCE.search(before)
        return before[: fence.start() if fence else len(before)].rstrip()


QWEN: ToolFormat = Qwen()
GEMMA: ToolFormat = Gemma()
FORMATS = {form.name: form for form in (QWEN, GEMMA)}

_CLOSING = re.compile(r"\s*</tool_call>")
_NAMED = re.compile(r'\{\s*"name"\s*:')
_FENCE = re.compile(r"```(?:json|tool_code)?\s*$")


def format_for(model_type: str) -> ToolFormat:
    """The format of a model, by its config's `model_type`."""
    return GEMMA if model_type.startswith("gemma3") else QWEN


def _line(value: JsonValue) -> str:
    """As transformers' `tojson` has it."""
    return json.dumps(value, ensure_ascii=False)


def _dump(arguments: dict[str, JsonValue]) -> str:
    try:
        text = json.dumps(arguments, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"a tool call's arguments cannot be written as JSON ({error}); give a dict of strings, "
            "numbers, booleans, None, lists and dicts"
        ) from None
    return text


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else _float(digits)


def _float(digits: str) -> float:
    largest = sys.float_info.max
    return max(-largest, min(largest, float(digits)))


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)
_BLANKS = re.compile(r"\s*")


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, blanks before it left out, and its end; None if there is none."""
    blanks = _BLANKS.match(text, at)
    assert blanks is not None  # it matches anywhere
    try:
        value, end = _DECODER.raw_decode(text, blanks.end())
    except (ValueError, RecursionError):
        return None, at
    return value, end


def _as_call(value: Any, key: str) -> ToolCall | None:
    if not isinstance(value, dict) or value.keys() != {"name", key}:
        return None
    name, arguments = value["name"], value[key]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments) if _writable(arguments) else None


def _writable(value: JsonValue) -> bool:
    """Whether it can be written again: not too deep, no lone surrogates."""
    level: list[JsonValue] = [value]
    for _ in range(DEEPEST):
        deeper: list[JsonValue] = []
        for one in level:
            if isinstance(one, str) and not _encodes(one):
                return False
            if isinstance(one, dict):
                if not all(map(_encodes, one)):
                    return False
                deeper += one.values()
            elif isinstance(one, list):
                deeper += one
        if not deeper:
            return True
        level = deeper
    return False


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
