"""A program of LangChain's sends its messages whole, and they are read once."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField, RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

from langchain_still import ChatStill
from still_memory.errors import InputError

from .conftest import MakeChat

SYSTEM = SystemMessage("You are brief.")
TOLD = [SYSTEM, HumanMessage("My sister Ana lives in Porto.")]
ASK = HumanMessage("Where does my sister live?")


def thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name}}


def session_of(message: BaseMessage) -> str:
    return str(message.response_metadata["session"])


def read_of(message: AnyMessage) -> int:
    """Tokens that a reply has taken in."""
    assert isinstance(message, AIMessage) and message.usage_metadata is not None
    usage = message.usage_metadata
    return usage["input_tokens"] - usage["input_token_details"]["cache_read"]


def texts(chat: ChatStill, session: str) -> list[str]:
    return [turn.text for turn in chat.open().session(session).history()]


# -- what is read -----------------------------------------------------------------------------


def test_only_the_new_message_is_read(chat: ChatStill) -> None:
    first = chat.invoke(TOLD, thread("alice"))
    second = chat.invoke([*TOLD, first, ASK], thread("alice"))
    assert "Porto" in second.text
    usage = second.usage_metadata
    assert usage is not None and first.usage_metadata is not None
    assert usage["input_token_details"]["cache_read"] == first.usage_metadata["total_tokens"]
    assert read_of(second) == chat.get_num_tokens_from_messages([ASK]) + 1  # opens the reply
    assert second.response_metadata["known"] == 3
    assert second.response_metadata["logical_tokens"] == usage["total_tokens"]


def test_an_agent_of_many_turns_reads_the_new_messages_alone(make_chat: MakeChat) -> None:
    chat = make_chat(slots=1024, max_tokens=48)
    agent = create_agent(
        chat,
        tools=[tick],
        system_prompt="You are brief.",
        middleware=[calls_a_tool_now_and_then],
        checkpointer=InMemorySaver(),
    )
    done = 0
    for turn in range(180):
        asked = HumanMessage(f"Turn {turn}: the wind rose, the sea was grey and nobody spoke.")
        state = agent.invoke({"messages": [asked]}, {**thread("alice"), "recursion_limit": 9})
        messages = state["messages"]
        for at in range(done, len(messages)):
            if isinstance(messages[at], AIMessage) and at > 1:
                new = messages[at - 1]
                closed = messages[at].response_metadata["finish_reason"] == "length"
                framed = chat.get_num_tokens_from_messages([new]) + 1 + closed
                assert read_of(messages[at]) == framed, messages[at]
        done = len(messages)
    replies = [m for m in messages if isinstance(m, AIMessage)]
    assert len(replies) == 200
    assert {session_of(m) for m in replies} == {"alice"}
    assert sum(m.response_metadata["compactions"] for m in replies) > 0
    assert replies[-1].response_metadata["slots"] <= 1024
    assert replies[-1].response_metadata["logical_tokens"] > 1024


TURNS = {f"{turn}:" for turn in range(0, 180, 9)}  # that call a tool


def tick() -> str:
    """Count one."""
    return "done"


@wrap_model_call  # type: ignore[arg-type]
def calls_a_tool_now_and_then(request: Any, handler: Any) -> Any:
    asked = request.messages[-1]
    now = isinstance(asked, HumanMessage) and asked.text.split()[1] in TURNS
    return handler(request.override(tool_choice="any" if now else "none"))


# -- which conversation it is -----------------------------------------------------------------


def test_a_thread_comes_before_a_session_id_and_the_call_before_the_constructor(
    make_chat: MakeChat,
) -> None:
    chat = make_chat(session_id="constructor", max_tokens=2)
    bound = chat.bind(session_id="bound")
    configured: RunnableConfig = {"configurable": {"session_id": "configured"}}
    assert session_of(chat.invoke("Hello.")) == "constructor"
    assert session_of(chat.invoke("Hello.", configured)) == "configured"
    assert session_of(bound.invoke("Hello.", configured)) == "bound"
    assert session_of(bound.invoke("Hello.", thread("thread"))) == "thread"
    assert session_of(chat.with_config(configurable={"thread_id": 7}).invoke("Hello.")) == "7"


def test_every_way_to_call_it_names_the_conversation(chat: ChatStill) -> None:
    async def names() -> list[str]:
        found = [session_of(await chat.ainvoke("Hello.", thread("ainvoke")))]
        chunks = [chunk async for chunk in chat.astream("Hello.", thread("astream"))]
        found.append(session_of(chunks[-1]))
        stream = await chat.astream_events("Hello.", thread("astream_events"), version="v3")
        return [*found, session_of(await stream.output)]

    assert asyncio.run(names()) == ["ainvoke", "astream", "astream_events"]
    assert session_of(list(chat.stream("Hello.", thread("stream")))[-1]) == "stream"
    assert session_of(chat.batch(["Hello."], thread("batch"))[0]) == "batch"
    events = chat.stream_events("Hello.", thread("stream_events"), version="v3")
    assert session_of(events.output) == "stream_events"


def test_a_nameless_conversation_is_recognised_by_what_was_said(chat: ChatStill) -> None:
    first = chat.invoke(TOLD)
    other = chat.invoke([SYSTEM, HumanMessage("My brother Max lives in Rome.")])
    second = chat.invoke([*TOLD, first, ASK])
    assert session_of(second) == session_of(first) != session_of(other)
    assert "Porto" in second.text


def test_time_travel_forks_from_the_last_common_turn_and_says_so(
    chat: ChatStill, caplog: pytest.LogCaptureFixture
) -> None:
    agent = create_agent(chat, system_prompt=SYSTEM.text, checkpointer=InMemorySaver())
    config = thread("alice")
    for text in (TOLD[1].text, "Hello.", ASK.text):
        agent.invoke({"messages": [HumanMessage(text)]}, config)
    assert not caplog.records
    past = next(s for s in agent.get_state_history(config) if len(s.values["messages"]) == 2)
    edited = agent.update_state(
        past.config, {"messages": [HumanMessage("I am called Eve.")]}, as_node="__start__"
    )
    reply = agent.invoke(None, edited)["messages"][-1]
    about = reply.response_metadata
    assert (about["session"], about["forked_from"], about["known"]) == ("alice~2", "alice", 3)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and "forked" in said.getMessage()
    assert texts(chat, "alice")[3] == "Hello."
    assert texts(chat, "alice~2")[3] == "I am called Eve."
    on = agent.invoke({"messages": [ASK]}, config)["messages"][-1]
    assert session_of(on) == "alice~2" and on.response_metadata["forked_from"] is None


def test_other_tools_begin_the_conversation_anew_and_it_is_said(
    chat: ChatStill, caplog: pytest.LogCaptureFixture
) -> None:
    first = chat.invoke(TOLD, thread("alice"))
    bound = chat.bind_tools([tick], tool_choice="none")
    second = bound.invoke([*TOLD, first, ASK], thread("alice"))
    about = second.response_metadata
    assert about["begun_anew"] and about["session"] == "alice~2" and about["forked_from"] is None
    assert not first.response_metadata["begun_anew"]
    assert second.usage_metadata is not None
    assert second.usage_metadata["input_token_details"]["cache_read"] == 0
    (said,) = caplog.records
    assert "begun" in said.getMessage()
    assert len(chat.open().branches("alice")) == 2


def test_agents_of_a_graph_are_branches_of_its_thread(chat: ChatStill) -> None:
    def agent(role: str) -> Any:
        def node(state: State) -> dict[str, Any]:
            return {"messages": [chat.invoke([SystemMessage(role), *state["messages"]])]}

        return node

    graph = StateGraph(State)
    graph.add_node("scout", agent("You scout."))
    graph.add_node("writer", agent("You write."))
    graph.add_edge(START, "scout")
    graph.add_edge("scout", "writer")
    graph.add_edge("writer", END)
    app = graph.compile(checkpointer=InMemorySaver())
    for turn in range(3):
        said = {"messages": [HumanMessage(f"Number {turn}.")]}
        messages = app.invoke(said, thread("team"))["messages"]
        scout, writer = messages[-2:]
        assert (session_of(scout), session_of(writer)) == ("team", "team~2")
        if turn:  # the other's reply and the new message; the first's reply
            new = chat.get_num_tokens_from_messages([messages[-4], messages[-3]]) + 2
            assert read_of(scout) <= new + 1
    assert chat.open().branches("team") == ["team", "team~2"]


def test_what_a_node_asks_aside_stays_out_of_its_thread(chat: ChatStill) -> None:
    def node(state: State) -> dict[str, Any]:
        chat.invoke([ASK], thread("aside"))
        return {"messages": [chat.invoke(state["messages"])]}

    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    app = graph.compile(checkpointer=InMemorySaver())
    reply = app.invoke({"messages": [HumanMessage("Hello.")]}, thread("alice"))["messages"][-1]
    assert session_of(reply) == "alice"
    assert sorted(info.name for info in chat.open().sessions()) == ["alice", "aside"]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


# -- streams, async and callbacks -------------------------------------------------------------


def test_a_stream_joins_to_the_reply_and_its_last_chunk_comes_after_the_commit(
    chat: ChatStill,
) -> None:
    whole = chat.invoke([*TOLD, ASK], thread("whole"))
    chunks = []
    for chunk in chat.stream([*TOLD, ASK], thread("stream")):
        chunks.append(chunk)
        if chunk.chunk_position == "last":
            assert texts(chat, "stream")[-1] == whole.text
    assert len(chunks) > 3
    full = sum(chunks[1:], start=chunks[0])
    assert full.text == whole.text and full.usage_metadata == whole.usage_metadata
    assert [chunk for chunk in chunks if chunk.usage_metadata] == chunks[-1:]


def test_a_stream_that_is_left_is_undone(chat: ChatStill) -> None:
    first = chat.invoke(TOLD, thread("alice"))
    stream = chat.stream([*TOLD, first, ASK], thread("alice"))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(texts(chat, "alice")) == 3
    assert session_of(chat.invoke([*TOLD, first, ASK], thread("alice"))) == "alice"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_that_is_cancelled_is_undone(make_chat: MakeChat, streaming: bool) -> None:
    chat = make_chat(max_tokens=800)
    digits = {"type": "array", "items": {"enum": [0, 1]}, "minItems": 300, "maxItems": 300}
    schema = {"type": "json_schema", "json_schema": {"name": "digits", "schema": digits}}
    long = chat.bind(response_format=schema)  # however soon the model would end
    begun = asyncio.Event()

    class Begins(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            begun.set()

    async def call() -> None:
        config: RunnableConfig = {**thread("alice"), "callbacks": [Begins()]}
        messages = [HumanMessage("Tell me all about the sea. " * 40)]
        if streaming:
            async for _ in long.astream(messages, config):
                pass
        else:
            await long.ainvoke(messages, config)

    async def main() -> None:
        task = asyncio.create_task(call())
        await begun.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert "alice" not in [s.name for s in chat.open().sessions() if s.turns]
    assert chat.invoke("Hello.", thread("alice")).text


def test_many_conversations_at_once_are_not_mixed_up(chat: ChatStill) -> None:
    places = ["Porto", "Rome", "Paris", "Berlin"]

    async def one(place: str) -> str:
        told: list[BaseMessage] = [SYSTEM, HumanMessage(f"My sister Ana lives in {place}.")]
        told.append(await chat.ainvoke(told, thread(place)))
        return (await chat.ainvoke([*told, ASK], thread(place))).text

    async def main() -> list[str]:
        return await asyncio.gather(*map(one, places))

    for place, reply in zip(places, asyncio.run(main()), strict=True):
        assert place in reply


def test_two_calls_on_one_thread_at_once_both_get_their_reply(chat: ChatStill) -> None:
    first = chat.invoke(TOLD, thread("alice"))
    asked = [ASK, HumanMessage("Who is Ana?")]

    async def main() -> list[AIMessage]:
        calls = [chat.ainvoke([*TOLD, first, ask], thread("alice")) for ask in asked]
        return await asyncio.gather(*calls)

    replies = asyncio.run(main())
    assert sorted(map(session_of, replies)) == ["alice", "alice~2"]
    for ask, reply in zip(asked, replies, strict=True):
        assert texts(chat, session_of(reply))[-2:] == [ask.text, reply.text]


def test_callbacks_hear_every_token_and_the_usage(chat: ChatStill) -> None:
    tokens: list[str] = []

    class Listens(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **_: Any) -> None:
            tokens.append(token)

    with get_usage_metadata_callback() as counted:
        chunks = list(chat.stream("Hello.", {"callbacks": [Listens()]}))
    assert "".join(tokens) == "".join(chunk.text for chunk in chunks) and len(tokens) > 1
    assert counted.usage_metadata["reference"] == chunks[-1].usage_metadata


def test_a_stop_string_ends_a_reply_and_the_conversation_goes_on(chat: ChatStill) -> None:
    whole = chat.invoke([*TOLD, ASK]).text
    assert "Ana" in whole
    cut = chat.invoke([*TOLD, ASK], thread("alice"), stop=["Ana"])
    assert cut.text == whole.split("Ana")[0]
    on = chat.invoke([*TOLD, ASK, cut, HumanMessage("And?")], thread("alice"))
    assert session_of(on) == "alice" and on.response_metadata["known"] == 4


def test_reasoning_is_told_apart_from_the_reply(chat: ChatStill) -> None:
    from dataclasses import replace

    from langchain_still.messages import to_last_chunk, to_message
    from still_agent.messages import Message

    answering = chat.open().answer([Message("user", "Hello.")])
    reply = replace(answering.finish(), reasoning="Be kind.")
    assert answering.place is not None
    for made in (to_message, to_last_chunk):
        message = made(reply, answering.place, "reference")
        assert message.additional_kwargs == {"reasoning_content": "Be kind."}


# -- one model, many objects ------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The models that were loaded."""
    from still_agent import Agent

    loaded: list[str] = []
    load = Agent.load

    def counted(name: str, **options: Any) -> Agent:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(Agent, "load", counted)
    yield loaded


def test_objects_of_one_store_and_their_copies_share_one_model(
    store: Any, loads: list[str]
) -> None:
    one = ChatStill(store=store, max_tokens=3)
    two = ChatStill(store=str(store), temperature=0.5, seed=1, max_tokens=3)
    field = ConfigurableField(id="most")
    configured = two.configurable_fields(max_tokens=field)
    first = one.invoke("Hello.", thread("alice"))
    configured.with_config(configurable={"most": 2, "thread_id": "b"}).invoke("Hello.")
    assert len(list(configured.stream("Hello."))) > 1
    other = one.configurable_alternatives(ConfigurableField(id="who"), default_key="one", two=two)
    on = other.with_config(configurable={"who": "two", **thread("alice")["configurable"]}).invoke(
        ["Hello.", first, "Go on."]
    )
    assert session_of(on) == "alice" and loads == ["reference"]
    one.close()
    assert two.invoke("Hello.", thread("c")).text and loads == ["reference"]
    two.close()
    again = one.invoke(["Hello.", first, "Go on.", on, "And?"], thread("alice"))
    assert again.response_metadata["known"] == 4 and len(loads) == 2
    one.close()


def test_calls_that_need_it_at_once_load_the_model_once(store: Any, loads: list[str]) -> None:
    chats = [ChatStill(store=store, max_tokens=2) for _ in range(4)]

    async def main() -> list[AIMessage]:
        return await asyncio.gather(*(chat.ainvoke("Hello.") for chat in chats))

    assert len({session_of(reply) for reply in asyncio.run(main())}) == 4
    assert loads == ["reference"]
    for chat in chats:
        chat.close()


def test_a_deep_copy_shares_the_agent(chat: ChatStill) -> None:
    first = chat.invoke("Hello.", thread("alice"))
    again = copy.deepcopy(chat).invoke(["Hello.", first, "Go on."], thread("alice"))
    assert again.response_metadata["known"] == 2


def test_conversations_without_a_store_are_no_others(loads: list[str]) -> None:
    one, two = ChatStill(max_tokens=2), ChatStill(max_tokens=2)
    said = one.invoke("Hello.", thread("alice"))
    assert one.bind().invoke(["Hello.", said, "Go on."], thread("alice")).response_metadata["known"]
    assert two.invoke(["Hello.", said, "Go on."], thread("alice")).response_metadata["known"] == 0
    assert len(loads) == 2


def test_it_is_pickled_without_its_model(store: Any) -> None:
    one = ChatStill(store=store, max_tokens=2, budget={"slots": 512})
    first = one.invoke("Hello.", thread("alice"))
    two = pickle.loads(pickle.dumps(one))
    assert two == one.model_copy(update={"lease": two.lease})
    on = two.invoke(["Hello.", first, "Go on."], thread("alice"))
    assert on.response_metadata["known"] == 2


def test_it_is_serialised(make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "ab" * 32
    one = ChatStill(store="m.db", budget={"slots": 512}, key=key, temperature=0.5, stop="x")
    written = dumpd(one)
    assert key not in str(written) and written["kwargs"]["budget"]["slots"] == 512
    monkeypatch.setenv("STILL_AGENT_KEY", key)
    two = load(
        written,
        allowed_objects=[ChatStill],
        valid_namespaces=["langchain_still"],
        secrets_from_env=True,
    )
    assert two.model_copy(update={"lease": one.lease}) == one
    assert "agent" not in dumpd(make_chat())["kwargs"]
    with pytest.raises(InputError, match="pickled"):
        pickle.dumps(make_chat())


def test_traces_name_the_model_that_answers(make_chat: MakeChat) -> None:
    params = make_chat(temperature=0.5, stop=["x"])._get_ls_params()
    assert params == {
        "ls_provider": "still",
        "ls_model_name": "reference",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 24,
        "ls_stop": ["x"],
    }
    assert ChatStill()._get_ls_params(model="other", temperature=1.0)["ls_model_name"] == "other"


def test_tokens_are_counted_as_the_model_reads_them(chat: ChatStill) -> None:
    tokenizer = chat.open().model.tokenizer
    assert chat.get_num_tokens("Hello there.") == len(tokenizer.encode("Hello there."))
    bare = chat.get_num_tokens_from_messages(TOLD)
    assert bare == sum(
        len(tokenizer.message(r, m.text)) for r, m in zip(("system", "user"), TOLD, strict=True)
    )
    assert chat.get_num_tokens_from_messages(TOLD, [tick]) > bare + 50


# -- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tempreature": 1},
        {"temperature": -1},
        {"max_tokens": 0},
        {"slots": 4},
        {"slots": 512, "budget": {"slots": 512}},
        {"budget": {"slots": 512, "horizon": 3}},
    ],
)
def test_an_option_that_cannot_be_is_refused_when_it_is_given(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ChatStill(**options)


def test_an_agent_of_ones_own_has_settled_what_loading_would(chat: ChatStill) -> None:
    with pytest.raises(ValueError, match="slots, codec"):
        ChatStill(agent=chat.agent, slots=512, codec="int8")
    with pytest.raises(InputError, match="another model"):
        chat.invoke("Hello.", model="other")


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": -1}, {"response_format": "x"}])
def test_a_call_that_cannot_be_leaves_no_session(chat: ChatStill, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        chat.invoke("Hello.", **options)
    assert chat.open().sessions() == []
