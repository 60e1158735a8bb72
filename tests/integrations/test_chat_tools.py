"""Tools and schemas, in all the ways that LangChain's programs name them."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from langchain_still import ChatStill
from still_memory.errors import InputError

from .conftest import MakeChat
from .knowing import Knowing


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(description="its name")
    days: int = 1


@tool
def now(zone: str) -> str:
    """The time in a zone."""
    return f"noon in {zone}"


SEARCH = {
    "type": "function",
    "function": {"name": "search", "description": "Find.", "parameters": {"type": "object"}},
}
TOOLS: list[Any] = [Weather, now, SEARCH]


@pytest.fixture
def chat(make_chat: MakeChat) -> ChatStill:
    return make_chat(max_tokens=64)


@pytest.mark.parametrize(
    "choice",
    [
        "now",
        {"type": "function", "function": {"name": "now"}},
        {"type": "tool", "name": "now"},
    ],
)
def test_a_tool_that_is_named_is_called(chat: ChatStill, choice: Any) -> None:
    reply = chat.bind_tools(TOOLS, tool_choice=choice).invoke("What time is it?")
    assert {call["name"] for call in reply.tool_calls} == {"now"}
    assert all(isinstance(call["args"]["zone"], str) for call in reply.tool_calls)
    assert reply.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["any", "required", True, {"type": "any"}])
def test_any_tool_is_called_where_one_must_be(chat: ChatStill, choice: Any) -> None:
    assert chat.bind_tools(TOOLS, tool_choice=choice).invoke("What time is it?").tool_calls


@pytest.mark.parametrize("choice", ["auto", "none", False, None, {"type": "none"}])
def test_no_tool_need_be_called_otherwise(chat: ChatStill, choice: Any) -> None:
    reply = chat.bind_tools(TOOLS, tool_choice=choice).invoke("What time is it?")
    assert reply.text and not reply.tool_calls


def test_the_constructor_says_what_a_call_does_not(make_chat: MakeChat) -> None:
    chat = make_chat(max_tokens=64, tool_choice="now")
    assert chat.bind_tools(TOOLS).invoke("What time is it?").tool_calls
    assert not chat.bind_tools(TOOLS, tool_choice="none").invoke("What time is it?").tool_calls
    assert not chat.invoke("What time is it?").tool_calls  # there are no tools


def test_every_call_has_an_id_of_its_own(chat: ChatStill) -> None:
    bound = chat.bind_tools([now], tool_choice="any", parallel_tool_calls=False)
    replies = [bound.invoke("What time is it?") for _ in range(2)]
    calls = [call for reply in replies for call in reply.tool_calls]
    assert len(calls) == 2 and calls[0]["id"] != calls[1]["id"]


def test_parallel_calls_come_whole_in_a_stream_and_are_recognised(
    make_chat: MakeChat, reference: Any
) -> None:
    calls = [f'{{"name": "now", "arguments": {{"zone": "{zone}"}}}}' for zone in ("CET", "UTC")]
    written = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    chat = make_chat(model=Knowing(reference, {"time": f"I look.\n{written}"}), max_tokens=128)
    bound = chat.bind_tools([now], session_id="alice")
    asked = HumanMessage("What time is it?")
    chunks = list(bound.stream([asked]))
    full: Any = sum(chunks[1:], start=chunks[0])
    assert full.text == "I look." and "<tool_call>" not in "".join(c.text for c in chunks)
    assert [call["args"] for call in full.tool_calls] == [{"zone": "CET"}, {"zone": "UTC"}]
    results = [ToolMessage("noon", tool_call_id=call["id"]) for call in full.tool_calls]
    whole = AIMessage(full.content, tool_calls=full.tool_calls, name="an agent's")
    about = bound.invoke([asked, whole, *results]).response_metadata
    assert (about["session"], about["known"], about["forked_from"]) == ("alice", 3, None)


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([now], "later"),
        ([{"type": "web_search"}], None),
        ([{"type": "function", "function": {"description": "without a name"}}], None),
        ([{"type": "function", "function": {"name": "now", "parameters": "none"}}], None),
        ([now], 7),
        ([now], {"type": "x"}),
    ],
)
def test_what_is_no_tool_or_no_choice_is_refused_when_it_is_bound(
    chat: ChatStill, tools: list[Any], choice: Any
) -> None:
    with pytest.raises(InputError):
        chat.bind_tools(tools, tool_choice=choice)


# -- structured replies -----------------------------------------------------------------------


class Sister(BaseModel):
    """A sister."""

    name: str
    age: int | None = None


class SisterDict(TypedDict):
    """A sister."""

    name: Annotated[str, ..., "hers"]


PLAIN = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("schema", [Sister, SisterDict, {**PLAIN, "title": "Sister"}])
def test_a_reply_is_a_value_of_the_schema(chat: ChatStill, schema: Any, method: str) -> None:
    value = chat.with_structured_output(schema, method=method).invoke("My sister is Ana. Who?")
    if schema is Sister:
        assert isinstance(value, Sister)
    else:
        assert isinstance(value, dict) and isinstance(value["name"], str)


def test_a_plain_schema_and_none_will_do(chat: ChatStill) -> None:
    value = chat.with_structured_output(PLAIN).invoke("Who?")
    assert isinstance(value, dict) and value.keys() == {"name"}
    assert isinstance(chat.with_structured_output(method="json_mode").invoke("Who?"), dict)


class Tree(BaseModel):
    """It refers to itself."""

    name: str
    children: list[Tree] = []


@pytest.mark.parametrize(
    ("schema", "most"), [({"title": "Yes", "type": "boolean"}, True), ({"enum": [7]}, 7)]
)
def test_a_schema_of_no_object_is_kept_to(chat: ChatStill, schema: Any, most: Any) -> None:
    value = chat.with_structured_output(schema).invoke("Who?")
    assert type(value) is type(most)


def test_a_class_that_refers_to_itself_is_kept_to(make_chat: MakeChat) -> None:
    chat = make_chat(max_tokens=60)
    assert isinstance(chat.with_structured_output(Tree).invoke("list two"), Tree)


def test_the_raw_message_comes_with_the_value_or_with_what_is_wrong(make_chat: MakeChat) -> None:
    found = make_chat(max_tokens=64).with_structured_output(Sister, include_raw=True).invoke("Who?")
    assert isinstance(found, dict) and isinstance(found["raw"], AIMessage)
    assert isinstance(found["parsed"], Sister) and found["parsing_error"] is None
    cut = make_chat(max_tokens=2).with_structured_output(Sister, include_raw=True).invoke("Who?")
    assert isinstance(cut, dict)
    assert cut["parsed"] is None and isinstance(cut["parsing_error"], Exception)


def test_a_structured_stream_grows_to_the_value(chat: ChatStill) -> None:
    parts = list(chat.with_structured_output(PLAIN).stream("Who?"))
    assert len(parts) > 1 and parts[0] == {} and isinstance(parts[-1], dict)
    assert parts[-1].keys() == {"name"}


def test_an_agent_s_response_format_is_kept_by_the_grammar(chat: ChatStill) -> None:
    agent = create_agent(chat, response_format=Sister)
    state = agent.invoke({"messages": [HumanMessage("My sister is Ana. Who?")]})
    assert isinstance(state["structured_response"], Sister)
    assert len(state["messages"]) == 2  # no tool in between


@pytest.mark.parametrize(
    ("schema", "method"), [(None, "json_schema"), (Sister, "xml"), (None, "function_calling")]
)
def test_a_method_that_cannot_be_is_refused(chat: ChatStill, schema: Any, method: str) -> None:
    with pytest.raises(InputError):
        chat.with_structured_output(schema, method=method)
