"""StillCheckpointer passes LangGraph's own suite, and a thread's graph and memory are one."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import ormsgpack
import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from langchain_still import StillCheckpointer
from still_agent import Agent, Message
from still_memory import check_store
from still_memory.errors import (
    ConflictError,
    DamageError,
    EncryptionError,
    InputError,
    StoreError,
    UnknownSessionError,
)
from still_memory.graphs_table import GraphState, Place

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILL_AGENT_KEY", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def saver(path: Path) -> Iterator[StillCheckpointer]:
    with StillCheckpointer(path) as saver:
        yield saver


def thread(name: str = "t", **more: Any) -> RunnableConfig:
    return {"configurable": {"thread_id": name, **more}}


# -- LangGraph's own suite ------------------------------------------------------------------------


class Synchronous(StillCheckpointer):
    """Its asynchronous methods call the synchronous ones, so that the suite tries these."""

    async def aput(self, *args: Any, **told: Any) -> RunnableConfig:
        return self.put(*args, **told)

    async def aput_writes(self, *args: Any, **told: Any) -> None:
        self.put_writes(*args, **told)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self.get_tuple(config)

    async def alist(self, *args: Any, **told: Any) -> AsyncIterator[CheckpointTuple]:
        for found in self.list(*args, **told):
            yield found

    async def adelete_thread(self, *args: Any, **told: Any) -> None:
        self.delete_thread(*args, **told)

    async def acopy_thread(self, *args: Any) -> None:
        self.copy_thread(*args)

    async def aprune(self, *args: Any, **told: Any) -> None:
        self.prune(*args, **told)

    async def adelete_for_runs(self, *args: Any) -> None:
        self.delete_for_runs(*args)


@pytest.mark.parametrize("kind", [StillCheckpointer, Synchronous])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
async def test_every_capability_conforms(
    kind: type[StillCheckpointer], key: bytes | None, tmp_path: Path
) -> None:
    files = iter(range(100))

    @checkpointer_test(name=kind.__name__)
    async def made() -> AsyncGenerator[BaseCheckpointSaver, None]:
        with kind(tmp_path / f"{next(files)}.db", key=key) as saver:
            yield saver
            assert check_store(saver.store.path, key=key).findings == []

    report = await validate(made)
    assert {name for name, r in report.results.items() if r.detected} == {
        c.value for c in Capability
    }
    assert [failure for r in report.results.values() for failure in r.failures] == []
    assert all(r.passed and not r.tests_skipped for r in report.results.values())
    assert sum(r.tests_passed for r in report.results.values()) >= 81


# -- graphs ---------------------------------------------------------------------------------------


def talker(saver: BaseCheckpointSaver, *replies: str) -> Any:
    """LangChain's agent, with replies that are known."""
    said = GenericFakeChatModel(messages=iter(AIMessage(text) for text in replies))
    return create_agent(said, checkpointer=saver)


def texts(state: Any) -> list[str]:
    return [message.text for message in state["messages"]]


def test_a_turn_of_a_long_thread_writes_what_is_new(saver: StillCheckpointer) -> None:
    agent = talker(saver, *["a reply " * 20] * 60)
    written = []
    for _ in range(60):
        before = saver.store.graphs.bytes_written
        agent.invoke({"messages": [("user", "a question " * 10)]}, thread())
        written.append(saver.store.graphs.bytes_written - before)
    assert max(written[5:]) < 1.1 * min(written[5:])  # 120 messages cost what 12 did
    assert len(texts(agent.get_state(thread()).values)) == 120


async def test_an_agent_runs_asynchronously(saver: StillCheckpointer) -> None:
    agent = talker(saver, "one", "two")
    await agent.ainvoke({"messages": [("user", "a")]}, thread())
    state = await agent.ainvoke({"messages": [("user", "b")]}, thread())
    assert texts(state) == ["a", "one", "b", "two"]
    history = [s async for s in agent.aget_state_history(thread())]
    assert texts(history[0].values) == texts(state) and len(history) == 6
    replies = talker(saver, *"abcdefgh")
    many = (replies.ainvoke({"messages": [("user", "x")]}, thread(f"{n}")) for n in range(8))
    said = [texts(state)[-1] for state in await asyncio.gather(*many)]
    assert sorted(said) == list("abcdefgh")
    for n, reply in enumerate(said):
        assert texts((await replies.aget_state(thread(f"{n}"))).values) == ["x", reply]


def test_time_travel_forks_the_thread_and_leaves_the_past_as_it_was(
    saver: StillCheckpointer,
) -> None:
    agent = talker(saver, "one", "two", "other")
    for text in ("a", "b"):
        agent.invoke({"messages": [("user", text)]}, thread())
    past = next(s for s in agent.get_state_history(thread()) if len(s.values["messages"]) == 2)
    changed = {"messages": [HumanMessage("changed")]}
    forked = agent.update_state(past.config, changed, as_node=START)
    state = agent.invoke(None, forked)
    assert texts(state) == ["a", "one", "changed", "other"]
    before = [s for s in agent.get_state_history(thread()) if texts(s.values)[-1:] == ["two"]]
    assert [texts(s.values) for s in before] == [["a", "one", "b", "two"]]


class Asked(TypedDict):
    steps: Annotated[list[str], lambda old, new: old + new]


def asking(saver: BaseCheckpointSaver) -> Any:
    """Asks a person in its second step."""
    graph = StateGraph(Asked)
    graph.add_node("first", lambda state: {"steps": ["first"]})
    graph.add_node("ask", lambda state: {"steps": [interrupt({"question": "go on?"})]})
    graph.add_edge(START, "first")
    graph.add_edge("first", "ask")
    graph.add_edge("ask", END)
    return graph.compile(checkpointer=saver)


RESUME = """
import sys
sys.path.insert(0, sys.argv[2])
from langgraph.types import Command
from tests.integrations.test_checkpointer import StillCheckpointer, asking, thread
with StillCheckpointer(sys.argv[1]) as saver:
    graph = asking(saver)
    assert graph.get_state(thread()).next == ("ask",)
    print(graph.invoke(Command(resume="yes"), thread())["steps"])
"""


def test_an_interrupted_graph_goes_on_in_another_process(
    saver: StillCheckpointer, path: Path
) -> None:
    graph = asking(saver)
    waiting = graph.invoke({"steps": []}, thread())
    assert waiting["__interrupt__"][0].value == {"question": "go on?"}
    root = str(Path(__file__).parents[2])
    told = subprocess.run(
        [sys.executable, "-c", RESUME, str(path), root], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert told.stdout == "['first', 'yes']\n", told.stderr
    assert graph.get_state(thread()).values == {"steps": ["first", "yes"]}


def test_subgraphs_keep_states_of_their_own(saver: StillCheckpointer) -> None:
    inner = StateGraph(Asked)
    inner.add_node("ask", lambda state: {"steps": [interrupt("well?")]})
    inner.add_edge(START, "ask")
    outer = StateGraph(Asked)
    outer.add_node("inner", inner.compile())
    outer.add_edge(START, "inner")
    graph = outer.compile(checkpointer=saver)
    graph.invoke({"steps": ["a"]}, thread())
    assert {p.space.split(":")[0] for p in saver.store.graphs.places("t")} == {"", "inner"}
    saver.copy_thread("t", "copy")
    for name in ("t", "copy"):
        assert graph.invoke(Command(resume="fine"), thread(name))["steps"] == ["a", "a", "fine"]


def _add(state: list[str], writes: Sequence[list[str]]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Delta(TypedDict):
    log: Annotated[list[str], DeltaChannel(_add, snapshot_frequency=5)]


@pytest.mark.parametrize("turns", [3, 5, 7])
def test_a_pruned_thread_keeps_what_its_delta_channels_are_made_of(
    turns: int, saver: StillCheckpointer
) -> None:
    graph = StateGraph(Delta)
    graph.add_node("say", lambda state: {"log": [f"{len(state['log'])}"]})
    graph.add_edge(START, "say")
    runs = graph.compile(checkpointer=saver)
    for _ in range(turns):
        runs.invoke({"log": ["in"]}, thread())
    before = runs.get_state(thread()).values
    assert len(before["log"]) == 2 * turns
    states = len(saver.store.graphs.places("t"))
    saver.prune(["t"])
    assert len(saver.store.graphs.places("t")) < states
    assert runs.get_state(thread()).values == before
    assert len(runs.invoke({"log": ["in"]}, thread())["log"]) == 2 * turns + 2


# -- what bytes may do ----------------------------------------------------------------------------


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {Exploit.proof}",)

    proof = ""


def extension(code: int, *told: Any) -> bytes:
    return ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(told)))


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, bytes]:
    Exploit.proof = str(tmp_path / "proof")
    call = f"touch {Exploit.proof}"
    return {
        "a pickle": b"pickle\0" + pickle.dumps(Exploit()),
        "LangChain's JSON": b'json\0{"lc": 2, "type": "constructor", "id": ["os", "system"],'
        b' "args": ["' + call.encode() + b'"]}',
        "a call": b"msgpack\0" + extension(0, "os", "system", call),
        "a call with arguments": b"msgpack\0" + extension(1, "os", "system", [call]),
        "a call with names": b"msgpack\0" + extension(2, "os", "system", {"command": call}),
        "a method": b"msgpack\0" + extension(3, "os", "path", call, "exists"),
        "a model": b"msgpack\0" + extension(5, "subprocess", "Popen", {"args": call}, "f"),
        "one in a list": b"msgpack\0"
        + ormsgpack.packb([1, ormsgpack.Ext(0, ormsgpack.packb(("os", "system", call)))]),
        "a length beyond the end": b"msgpack\0\xdd\xff\xff\xff\xff\x01",
        "bytes beyond the end": b"msgpack\0\xc6\xff\xff\xff\xff",
        "deep lists": b"msgpack\0" + b"\x91" * 200_000 + b"\x01",
        "no kind": b"\xff\0\xff",
        "nothing": b"x",
    }


HOSTILE = (
    "a pickle", "LangChain's JSON", "a call", "a call with arguments", "a call with names",
    "a method", "a model", "one in a list", "a length beyond the end", "bytes beyond the end",
    "deep lists", "no kind", "nothing",
)  # fmt: skip


@pytest.mark.parametrize("which", HOSTILE)
@pytest.mark.parametrize("where", ["value", "element", "body", "about", "write"])
def test_hostile_bytes_run_nothing_and_are_a_typed_error(
    which: str, where: str, hostile: dict[str, bytes], saver: StillCheckpointer, tmp_path: Path
) -> None:
    bad = hostile[which]
    good = empty_checkpoint()
    good["channel_versions"] = {"x": 1}
    body = saver._codec.dump({k: v for k, v in good.items() if k != "channel_values"})
    pieces = {"value": [bad], "element": [b"", bad]}.get(where, [saver._codec.dump("x")])
    place = Place("t", "", good["id"])
    about = bad if where == "about" else saver._codec.dump({})
    body = bad if where == "body" else body
    saver.store.graphs.put(GraphState(place, None, "", about, body, {"1 x": pieces}))
    if where == "write":
        saver.store.graphs.put_writes(place, {"task 0": b'["", "task", 0, "x"]\n' + bad})
    with pytest.raises(StoreError) as raised:
        saver.get_tuple(thread())
    named = "allowlist" in str(raised.value)
    assert named or isinstance(raised.value, DamageError)
    assert named == (bad[:8] == b"msgpack\0" and b"touch" in bad)
    with pytest.raises(StoreError):
        list(saver.list(None))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "body", [[], {}, {"channel_versions": 3}, {"channel_versions": {"x": []}}, "text", None]
)
def test_a_body_that_is_no_checkpoint_is_damage(body: Any, saver: StillCheckpointer) -> None:
    place = Place("t", "", "1")
    saver.store.graphs.put(
        GraphState(place, None, "", saver._codec.dump({}), saver._codec.dump(body), {})
    )
    if body != {"channel_versions": {"x": []}}:  # a version that no value has
        with pytest.raises(DamageError):
            saver.get_tuple(thread())


@dataclass
class Mood:
    of: str


def test_a_type_of_ones_own_is_refused_until_it_is_named(saver: StillCheckpointer) -> None:
    class State(TypedDict):
        mood: Mood

    def built(saver: BaseCheckpointSaver) -> Any:
        graph = StateGraph(State)
        graph.add_node("feel", lambda state: {"mood": Mood("calm")})
        graph.add_edge(START, "feel")
        return graph.compile(checkpointer=saver)

    with pytest.raises(InputError, match=r"with_allowlist\(\[\('[\w.]+', 'Mood'\)\]\)"):
        built(saver).invoke({}, thread())
    with pytest.raises(InputError, match="with_allowlist"):
        built(saver).invoke({"mood": Mood("glad")}, thread("input"))
    assert not saver.store.graphs.places("input")  # a state that would not be read is not kept
    named = saver.with_allowlist([(Mood.__module__, "Mood")])
    graph = built(named)
    graph.invoke({}, thread("other"))
    assert graph.get_state(thread("other")).values == {"mood": Mood("calm")}
    with pytest.raises(StoreError, match="with_allowlist"):
        built(saver).get_state(thread("other"))


def test_what_cannot_be_written_is_a_typed_error(saver: StillCheckpointer) -> None:
    graph = StateGraph(Asked)
    graph.add_node("say", lambda state: {"steps": [open]})
    graph.add_edge(START, "say")
    with pytest.raises(InputError, match="'steps'"):
        graph.compile(checkpointer=saver).invoke({"steps": []}, thread())


# -- one thread, one life -------------------------------------------------------------------------


def remembering(agent: Agent, saver: BaseCheckpointSaver) -> Any:
    """A graph whose model is an agent of the same store: the conversation is the thread's."""

    def reply(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        roles = {"human": "user", "ai": "assistant"}
        said = [Message(roles[m.type], m.text) for m in state["messages"]]  # type: ignore[arg-type]
        answering = agent.answer(said, session=config["configurable"]["thread_id"])
        return {"messages": [AIMessage("".join(answering))]}

    graph = StateGraph(MessagesState)
    graph.add_node("reply", reply)
    graph.add_edge(START, "reply")
    return graph.compile(checkpointer=saver)


@pytest.fixture
def agent(path: Path) -> Iterator[Agent]:
    with Agent.load("reference", store=path) as agent:
        yield agent


def say(graph: Any, text: str, name: str = "t") -> list[str]:
    return texts(graph.invoke({"messages": [("user", text)]}, thread(name)))


def test_a_thread_is_copied_and_deleted_with_its_memory(
    agent: Agent, saver: StillCheckpointer, path: Path
) -> None:
    graph = remembering(agent, saver)
    say(graph, "My sister Ana lives in Porto.")
    spans = saver.store.stats().spans
    saver.copy_thread("t", "copy")
    assert agent.branches("copy") == ["copy"] and saver.store.stats().spans == spans
    for name in ("copy", "t"):  # both go on where they stood, reading the new message alone
        assert len(say(graph, "Where does Ana live?", name)) == 4
        assert agent.branches(name) == [name]
    one, other = (agent.session(name).history() for name in ("t", "copy"))
    assert [t.text for t in one] == [t.text for t in other] and one[1].id == other[1].id

    saver.delete_thread("t")
    assert [s.name for s in agent.sessions()] == ["copy"]
    assert not graph.get_state(thread()).values and graph.get_state(thread("copy")).values
    assert len(say(graph, "Hello.")) == 2 and agent.branches("t") == ["t"]  # begun anew
    saver.delete_thread("t")
    saver.delete_thread("copy", erase=True)
    log = path.with_name(path.name + "-wal")
    assert b"Porto" not in path.read_bytes() + (log.read_bytes() if log.exists() else b"")
    assert check_store(path).findings == []


def test_a_thread_that_was_edited_takes_its_branches_with_it(
    agent: Agent, saver: StillCheckpointer
) -> None:
    graph = remembering(agent, saver)
    say(graph, "My name is Bo.")
    say(graph, "I live in Oslo.")
    past = next(s for s in graph.get_state_history(thread()) if len(s.values["messages"]) == 2)
    forked = graph.update_state(
        past.config, {"messages": [HumanMessage("I live in Rome.")]}, as_node=START
    )
    graph.invoke(None, forked)
    assert len(agent.branches("t")) == 2
    saver.copy_thread("t", "u")
    assert len(agent.branches("u")) == 2
    saver.delete_thread("t")
    assert agent.branches("t") == [] and len(agent.branches("u")) == 2


def test_an_erased_session_takes_the_graphs_words_too(
    agent: Agent, saver: StillCheckpointer, path: Path
) -> None:
    graph = remembering(agent, saver)
    say(graph, "My cat is called Cinnabar.")
    deleted = agent.delete("t", erase=True)
    assert deleted.graphs == ("t",) and not graph.get_state(thread()).values
    log = path.with_name(path.name + "-wal")
    assert b"Cinnabar" not in path.read_bytes() + (log.read_bytes() if log.exists() else b"")


def test_what_is_forgotten_is_not_left_in_the_graph(
    agent: Agent, saver: StillCheckpointer, path: Path
) -> None:
    from still_agent import TaintedError

    graph = remembering(agent, saver)
    say(graph, "My cat is called Cinnabar.")
    session = agent.session("t")
    with pytest.raises(TaintedError, match="states of a thread's graph") as raised:
        session.forget(1, 2)
    assert raised.value.tainted[0].graph_states and graph.get_state(thread()).values
    session.forget(1, 2, later="keep")
    assert not graph.get_state(thread()).values
    log = path.with_name(path.name + "-wal")
    assert b"Cinnabar" not in path.read_bytes() + (log.read_bytes() if log.exists() else b"")


def test_runs_are_deleted_by_their_ids(agent: Agent, saver: StillCheckpointer) -> None:
    graph = remembering(agent, saver)
    for run, text in (("1", "Hello."), ("2", "I live in Oslo.")):
        graph.invoke({"messages": [("user", text)]}, {**thread(), "metadata": {"run_id": run}})
    saver.delete_for_runs(["2"])
    assert len(graph.get_state(thread()).values["messages"]) == 2
    assert len(say(graph, "I live in Rome.")) == 4  # in a branch, from where the runs that stay end
    assert len(agent.branches("t")) == 2
    saver.delete_for_runs(["1"])
    assert agent.branches("t")  # it has checkpoints of no run


def test_errors_are_typed_and_name_the_fix(saver: StillCheckpointer, path: Path) -> None:
    for config in ({"configurable": {}}, {"configurable": {"thread_id": ""}}, {}):
        with pytest.raises(InputError, match="thread_id"):
            saver.get_tuple(config)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="strategy"):
        saver.prune(["t"], strategy="some")
    with pytest.raises(UnknownSessionError):
        saver.copy_thread("nobody", "new")
    talker(saver, "x").invoke({"messages": [("user", "a")]}, thread())
    with pytest.raises(ConflictError):
        saver.copy_thread("t", "t")
    with pytest.raises(EncryptionError):
        StillCheckpointer(path, key=KEY)
