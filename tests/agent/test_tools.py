"""A call that is written is read, what is no call is text, and nothing that is said raises."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from still_agent.messages import ToolCall
from still_agent.tools import GEMMA, QWEN, Tool, ToolFormat, format_for
from still_memory.errors import InputError

ADD = Tool(
    "add",
    "Adds two numbers – any.",
    {
        "type": "object",
        "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
        "required": ["x", "y"],
    },
)
NOW = Tool("now", "", {"type": "object", "properties": {}})
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
BARE = '{"name": "add", "parameters": {"x": 1, "y": 2}}'
ADDED = ToolCall("add", {"x": 1, "y": 2})

both = pytest.mark.parametrize("form", [QWEN, GEMMA], ids=["qwen", "gemma"])


def test_qwen_is_told_of_tools_in_the_words_of_its_template() -> None:
    assert (
        QWEN.system("You are brief.", [ADD, NOW])
        == """You are brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "add", "description": "Adds two numbers – any.", \
"parameters": {"type": "object", "properties": {"x": {"type": "number"}, \
"y": {"type": "number"}}, "required": ["x", "y"]}}}
{"type": "function", "function": {"name": "now", "parameters": {"type": "object", \
"properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
    )
    assert QWEN.system(None, [NOW]).startswith("# Tools\n\nYou may call")


@both
def test_without_tools_the_system_prompt_stays_as_it_is(form: ToolFormat) -> None:
    assert form.system("You are brief.", []) == "You are brief."
    assert form.system(None, []) == ""


def test_gemma_is_told_of_tools_and_of_the_form_of_a_call() -> None:
    told = GEMMA.system("You are brief.", [ADD])
    assert told.startswith("You are brief.\n\nYou have access to functions.")
    assert '"description": "Adds two numbers – any."' in told


def test_calls_are_written_as_the_template_writes_them() -> None:
    assert QWEN.text("", [ToolCall("add", {"y": 2, "x": 1}, id="call_7")]) == CALL
    assert QWEN.text("Let me see.", [ADDED, ADDED]) == f"Let me see.\n{CALL}\n{CALL}"
    assert GEMMA.text("Let me see.", [ADDED]) == f"Let me see.\n{BARE}"


def test_a_model_has_the_format_of_its_family() -> None:
    assert format_for("qwen3") is QWEN
    assert format_for("gemma3_text") is GEMMA


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(
    st.builds(
        ToolCall,
        name=st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True),
        arguments=st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=4),
    ),
    max_size=3,
)
PIECES = [
    *'{}[]"\\ \n\t:,<>0-e`',
    "<tool_call>",
    "</tool_call>",
    '{"name": "add", "arguments": ',
    '{"name": "add", "parameters": ',
    CALL,
    BARE,
    "```",
    "```json\n",
    "```tool_code\n",
    "\\ud800",
    "NaN",
    "1e999",
    "ü😀",
    "call",
]
MESS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=24).map("".join)


@both
@settings(max_examples=150, deadline=None)
@given(content=MESS, calls=CALLS)
def test_what_is_written_is_read(form: ToolFormat, content: str, calls: list[ToolCall]) -> None:
    content = content.rstrip()
    while (read := form.parse(content)) != (content, ()):  # it ends in a call of its own
        content = read[0]
    assert form.parse(form.text(content, calls)) == (content, tuple(calls))


@both
@settings(max_examples=500, deadline=None)
@given(text=MESS)
def test_what_is_read_is_written_so_that_it_reads_the_same(form: ToolFormat, text: str) -> None:
    content, calls = form.parse(text)
    again = form.text(content, calls)
    assert form.parse(again) == (content, calls)
    assert form.text(*form.parse(again)) == again


def test_calls_are_read_however_they_are_spaced() -> None:
    tight = '<tool_call>{"arguments":{"y":2,"x":1},"name":"add"}</tool_call>'
    assert QWEN.parse(f"See:\n\n{tight}{tight}\n") == ("See:", (ADDED, ADDED))
    broken = '{\n  "name": "add",\n  "parameters": {\n    "x": 1,\n    "y": 2\n  }\n}'
    for fenced in (
        f"```json\n{broken}\n```",
        f"```tool_code\n{broken}\n```\n",
        f"```\n{BARE}\n```",
    ):
        assert GEMMA.parse(f"See:\n{fenced}") == ("See:", (ADDED,))
    assert GEMMA.parse(f"See:\n{BARE}\n```") == ("See:", (ADDED,))
    assert GEMMA.parse(f"{BARE}\n{BARE}") == ("", (ADDED, ADDED))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        f"{CALL[:-1]}",
        f"{CALL} and so on",
        f"He wrote {CALL}, which is a call.",
        '<tool_call>\n{"name": "add", "arguments": {"x": 1}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "add"}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {}, "more": 1}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"x": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"x": "\\ud800"}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"\\ud800": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"x": '
        + "[" * 400
        + "]" * 400
        + "}}\n</tool_call>",
        '<tool_call>\n{"name": "add", "arguments": {"x": ' + "[" * 90_000 + "\n</tool_call>",
    ],
)
def test_what_is_no_whole_call_is_content_to_its_last_character(text: str) -> None:
    assert QWEN.parse(text) == (text, ())


def test_numbers_that_no_float_holds_are_the_largest_ones() -> None:
    said = '{"a": 1e999, "b": -1e999, "c": ' + "9" * 5000 + ', "d": ' + "9" * 400 + "}"
    _, (call,) = QWEN.parse(f'<tool_call>\n{{"name": "f", "arguments": {said}}}\n</tool_call>')
    largest = math.nextafter(math.inf, 0)
    assert call.arguments == {"a": largest, "b": -largest, "c": largest, "d": int("9" * 400)}
    assert QWEN.parse(QWEN.text("", [call])) == ("", (call,))


def test_of_a_key_that_is_there_twice_the_last_value_counts() -> None:
    said = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "a": 2}}\n</tool_call>'
    assert QWEN.parse(said) == ("", (ToolCall("f", {"a": 2}),))


@pytest.mark.parametrize("count", [20_000])
@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>",
        '<tool_call>{"',
        '<tool_call>{"a":',
        '<tool_call>\n{"name": "a", "arguments": {"x": "',
        f"{CALL}\n",
        f"{CALL} x ",
        '{"name":',
        '{"name": "f", "parameters": {"a": ',
        f"{BARE},",
        "```json\n",
        "{" + " " * 40,
        "[",
    ],
)
@both
def test_hostile_text_is_read_in_bounded_time(form: ToolFormat, unit: str, count: int) -> None:
    begun = time.perf_counter()
    form.parse(unit * count + "x")
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("name", ["", "a b", 'a"b', "ü", "x" * 129, "a\n"])
def test_a_tool_has_a_name_that_a_call_can_spell(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a tool"):
        Tool(name, "", {})


def test_a_tools_parameters_are_an_object() -> None:
    with pytest.raises(InputError, match="schema of an object"):
        Tool("f", "", {"type": "string"})
    deep: dict[str, Any] = {}
    for _ in range(9_000):
        deep = {"properties": deep}
    for bad in (deep, {"default": math.nan}, {"enum": {1}}):
        with pytest.raises(InputError, match="cannot be told of"):
            Tool("f", "", bad)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1}, "\ud800"])
def test_arguments_that_are_no_json_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        QWEN.text("", [ToolCall("f", {"x": value})])  # type: ignore[dict-item]
