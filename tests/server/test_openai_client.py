"""OpenAI's own client, and LangChain's on it, against the server: each convention is kept."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from langchain.chat_models import init_chat_model
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.server.conftest import LONG, Served, until

SYSTEM = {"role": "system", "content": "You are brief."}
TOLD = [SYSTEM, {"role": "user", "content": "My sister Ana lives in Porto."}]
ASK = {"role": "user", "content": "Where does my sister live?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client(max_retries=0)


def test_a_conversation_sent_whole_is_read_once(client: openai.OpenAI) -> None:
    told: list[Any] = list(TOLD)
    named = {"session_id": "read once"}
    first = client.chat.completions.create(model="reference", messages=told, extra_body=named)
    said = first.choices[0].message.content
    told += [{"role": "assistant", "content": said}, ASK]
    second = client.chat.completions.create(model="reference", messages=told, extra_body=named)
    assert "Porto" in (second.choices[0].message.content or "")
    assert first.usage and second.usage and second.usage.prompt_tokens_details
    assert first.choices[0].finish_reason == "stop" and first.object == "chat.completion"
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    assert second.usage.total_tokens == (
        second.usage.prompt_tokens + second.usage.completion_tokens
    )
    still = second.model_extra["still"] if second.model_extra else {}
    assert still["session"] == "read once" and still["known"] == 3
    assert still["slots"] == still["logical_tokens"] == second.usage.total_tokens


def test_a_stream_is_the_reply_and_its_usage_comes_last(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="reference", messages=[*TOLD, ASK])
    chunks = list(
        client.chat.completions.create(
            model="reference",
            messages=[*TOLD, ASK],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"session_id": "streamed"},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_stream_helper_gives_the_completion(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="reference", messages=TOLD) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content


async def test_async_clients_are_answered(server: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(model="reference", messages=TOLD)
        stream = await client.chat.completions.create(
            model="reference",
            messages=TOLD,
            stream=True,
        )
        pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_content_may_be_parts_and_sessions_are_named_by_a_header(
    client: openai.OpenAI, server: Served
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="reference",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Ana is in Porto."}]}],
        extra_headers={"X-Session-Id": "%C3%A5lice/1"},
    )
    assert raw.headers["x-session-id"] == "%C3%A5lice/1"
    assert raw.headers["x-request-id"].startswith("req_")
    assert server.texts("ålice/1")[0] == "Ana is in Porto."


def test_a_nameless_conversation_goes_on_by_its_text_and_by_the_name_it_was_given(
    client: openai.OpenAI, server: Served
) -> None:
    told: list[Any] = [{"role": "user", "content": "My brother Max lives in Rome."}]
    raw = client.chat.completions.with_raw_response.create(model="reference", messages=told)
    name = raw.headers["x-session-id"]
    for extra in ({}, {"X-Session-Id": name}):
        said = server.texts(name)[-1]
        told += [{"role": "assistant", "content": said}, ASK]
        again = client.chat.completions.with_raw_response.create(
            model="reference", messages=told, extra_headers=extra
        )
        assert again.headers["x-session-id"] == name


def test_an_edited_message_is_answered_in_a_branch_that_goes_on_by_its_name(
    client: openai.OpenAI,
) -> None:
    def ask(name: str, *messages: Any) -> tuple[str, str, Any]:
        done = client.chat.completions.create(
            model="reference", messages=list(messages), extra_body={"session_id": name}
        )
        assert done.model_extra is not None
        still = done.model_extra["still"]
        return done.choices[0].message.content or "", still["session"], still

    said, session, _ = ask("branch", *TOLD)
    assert session == "branch"
    said = {"role": "assistant", "content": said}
    ask("branch", *TOLD, said, ASK)
    other = {"role": "user", "content": "My brother Max lives in Rome."}
    reply, session, still = ask("branch", *TOLD, said, other)
    assert session == "branch~2" and still["forked_from"] == "branch"
    again = ask(session, *TOLD, said, other, {"role": "assistant", "content": reply}, ASK)
    assert again[1] == "branch~2" and again[2]["forked_from"] is None


def test_a_stream_has_none_but_openais_chunks_where_a_branch_is_read_again(
    client: openai.OpenAI,
) -> None:
    def ask(*messages: Any) -> list[Any]:
        stream = client.chat.completions.create(
            model="reference",
            messages=list(messages),
            stream=True,
            max_tokens=8,
            extra_body={"session_id": "far back"},
        )
        return list(stream)

    def said(chunks: list[Any]) -> dict[str, str]:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return {"role": "assistant", "content": text}

    told: list[Any] = [{"role": "user", "content": "The wind rose. " * 200}]
    told.append(said(ask(*told)))
    first = list(told)
    for _ in range(3):
        told.append(ASK)
        told.append(said(ask(*told)))
    chunks = ask(*first, {"role": "user", "content": "Who is Ana?"})
    assert chunks[0].model_extra["still"]["forked_from"] == "far back"
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_results_read(client: openai.OpenAI, stream: bool) -> None:
    told: list[Any] = [{"role": "user", "content": "How is the weather in Porto?"}]
    options: dict[str, Any] = {"model": "reference", "tools": [WEATHER]}
    if stream:
        with client.chat.completions.stream(
            messages=told, tool_choice="required", parallel_tool_calls=False, **options
        ) as events:
            for _ in events:
                pass
            done: Any = events.get_final_completion()
    else:
        done = client.chat.completions.create(
            messages=told, tool_choice="required", parallel_tool_calls=False, **options
        )
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls
    assert call.function.name == "weather" and call.id.startswith("call_")
    assert set(json.loads(call.function.arguments)) == {"city"}
    told.append(done.choices[0].message.model_dump(include={"role", "content", "tool_calls"}))
    told.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    again = client.chat.completions.create(messages=told, tool_choice="none", **options)
    assert again.model_extra is not None and again.model_extra["still"]["known"] == 3
    assert again.choices[0].message.tool_calls is None


def test_a_reply_keeps_to_its_schema(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: str
        large: bool

    parsed = client.chat.completions.parse(
        model="reference",
        messages=TOLD,
        response_format=City,
        max_tokens=60,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    any_object = client.chat.completions.create(
        model="reference",
        messages=TOLD,
        response_format={"type": "json_object"},
        max_tokens=40,
    )
    assert isinstance(json.loads(any_object.choices[0].message.content or ""), dict)


def test_sampling_options_hold(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(model="reference", messages=TOLD, **options)

    drawn = [ask(temperature=2.0, seed=-7, max_tokens=8).choices[0] for _ in range(2)]
    assert drawn[0].message.content == drawn[1].message.content
    assert ask(max_completion_tokens=1).choices[0].finish_reason == "length"
    whole = ask().choices[0].message.content
    assert ask(stop=whole[-1]).choices[0].message.content == whole[:-1]


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(**{"model": "reference", "messages": TOLD, **options})

    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-4")
    assert unknown.value.code == "model_not_found"
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    for options, param in (
        ({"messages": [{"role": "user", "content": [image]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "poet", "content": "Hm."}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"extra_body": {"functions": []}}, "functions"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"messages": [SYSTEM]}, None),
        ({"temperature": -1}, None),
        ({"messages": [{"role": "user", "content": " "}]}, None),
    ):
        with pytest.raises(openai.BadRequestError) as bad:
            ask(**options)
        assert bad.value.param == param, options
    assert client.models.retrieve("reference").id == "reference"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_client_that_hangs_up_leaves_the_session_as_it_was(
    client: openai.OpenAI, server: Served
) -> None:
    named = {"session_id": "left"}
    first = client.chat.completions.create(model="reference", messages=TOLD, extra_body=named)
    before = server.texts("left")
    told: list[Any] = [*TOLD, {"role": "assistant", "content": before[-1]}, ASK]
    options: Any = {"extra_body": named, "response_format": LONG, "max_tokens": 2000}
    with client.chat.completions.create(
        model="reference", messages=told, stream=True, **options
    ) as stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
    running = server.service.metrics.in_progress
    until(lambda: running._value.get() == 0)
    assert server.texts("left") == before
    with pytest.raises(openai.APITimeoutError):  # nor one that does not wait for the whole
        client.with_options(timeout=0.5).chat.completions.create(
            model="reference", messages=told, **options
        )
    until(lambda: running._value.get() == 0)
    assert server.texts("left") == before and first.choices
    again = client.chat.completions.create(model="reference", messages=told, extra_body=named)
    assert again.model_extra is not None and again.model_extra["still"]["session"] == "left"


def test_langchain_speaks_to_it_by_its_base_url(server: Served) -> None:
    chat = ChatOpenAI(model="reference", base_url=f"{server.url}/v1", api_key="none")
    reply = chat.invoke([HumanMessage("My sister Ana lives in Porto.")])
    assert reply.text and reply.usage_metadata and reply.usage_metadata["output_tokens"]
    pieces = list(chat.stream([HumanMessage("My sister Ana lives in Porto.")]))
    assert "".join(piece.text for piece in pieces) == reply.text

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    called = chat.bind_tools([weather], tool_choice="weather").invoke("The weather in Porto?")
    assert called.tool_calls[0]["name"] == "weather"
    other = init_chat_model("openai:reference", base_url=f"{server.url}/v1", api_key="none")
    assert other.invoke("My sister Ana lives in Porto.").text == reply.text
