"""A conversation that is sent whole each time is read once."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from still_agent import Agent, Budget
from still_agent.answering import Answering
from still_agent.messages import Message, ToolCall
from still_agent.tools import Tool
from still_memory.errors import IdentityError, InputError

SYSTEM = Message("system", "You are brief.")
TOLD = [SYSTEM, Message("user", "My sister Ana lives in Porto.")]
ASK = Message("user", "Where does my sister live?")
WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {}})

Load = Callable[..., Agent]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(**options: object) -> Agent:
        return Agent.load("reference", store=tmp_path / "m.db", budget=Budget(slots=512), **options)

    return load


@pytest.fixture(params=["file", "memory"])
def agent(request: pytest.FixtureRequest, load: Load) -> Agent:
    if request.param == "file":
        return load()
    return Agent.load("reference", budget=Budget(slots=512))


def answered(agent: Agent, messages: list[Message], **options: object) -> Answering:
    """The whole of it; `messages` goes on with the reply."""
    answering = agent.answer(messages, **options)
    reply = answering.finish()
    messages.append(Message("assistant", reply.text, reply.tool_calls))
    return answering


def session_of(answering: Answering) -> str:
    assert answering.place is not None
    return answering.place.session.id


def test_only_new_messages_are_read(agent: Agent) -> None:
    told = list(TOLD)
    first = answered(agent, told, session="alice")
    told.append(ASK)
    second = answered(agent, told, session="alice")
    assert "Porto" in told[-1].text
    history = agent.session("alice").history()
    assert [(t.role, t.text) for t in history] == [(m.role, m.text) for m in told]
    assert first.reply is not None and second.reply is not None and second.place is not None
    prefix = sum(len(turn.tokens) for turn in history[:3]) + 1
    assert second.reply.usage.reused_tokens == prefix
    assert second.place.known == 3 and second.place.read_tokens == 0


def test_the_state_is_that_of_a_session_that_was_told_turn_by_turn(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="whole")
    told.append(ASK)
    answered(agent, told, session="whole")
    chat = agent.session("one by one", system=SYSTEM.text)
    replies = [chat.send(m.text).text for m in (TOLD[1], ASK)]
    assert replies == [told[2].text, told[4].text]
    assert chat.stats == agent.session("whole").stats


def test_a_session_is_recognised_by_another_process_too(load: Load) -> None:
    told = list(TOLD)
    with load() as agent:
        answered(agent, told, session="alice")
    told.append(ASK)
    with load() as agent:
        place = answered(agent, told, session="alice").place
        assert place is not None and (place.known, place.read_tokens) == (3, 0)
        assert agent.branches("alice") == ["alice"]


def test_an_edited_message_forks_from_the_last_turn_in_common(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="alice")
    other = [*told, Message("user", "My brother Max lives in Rome.")]
    told.append(ASK)
    answered(agent, told, session="alice")
    branch = answered(agent, other, session="alice")
    assert branch.place is not None
    assert (session_of(branch), branch.place.forked_from) == ("alice~2", "alice")
    assert branch.place.known == 3
    other.append(Message("user", "Where does my brother live?"))
    assert session_of(answered(agent, other, session="alice")) == "alice~2"
    told.append(Message("user", "Who lives in Porto?"))
    assert session_of(answered(agent, told, session="alice")) == "alice"
    assert agent.branches("alice") == ["alice", "alice~2"]


def test_another_system_prompt_or_other_tools_begin_anew(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="alice")
    told.append(ASK)
    changed = [Message("system", "You are kind."), *told[1:]]
    for messages, options in (
        (changed, {}),
        (list(told), {"tools": [WEATHER], "tool_choice": "none"}),
    ):
        place = answered(agent, messages, session="alice", **options).place
        assert place is not None and place.known == 1 and place.forked_from is None
        assert place.read_tokens == place.head.tokens
    assert agent.branches("alice") == ["alice", "alice~2", "alice~3"]


def test_nameless_conversations_are_told_apart_by_what_was_said(agent: Agent) -> None:
    one, two = list(TOLD), [SYSTEM, Message("user", "My brother Max lives in Rome.")]
    names = [session_of(answered(agent, told)) for told in (one, two)]
    one.append(ASK)
    two.append(Message("user", "Where does my brother live?"))
    assert [session_of(answered(agent, told)) for told in (one, two)] == names
    assert "Porto" in one[-1].text and "Rome" in two[-1].text
    assert agent.branches("alice") == []


def test_strangers_whose_lists_begin_alike_do_not_meet(agent: Agent) -> None:
    known = list(TOLD)
    answered(agent, known)
    for common in ([SYSTEM], known):  # of the second one, both want the session that there is
        one = agent.answer([*common, Message("user", "My brother Max lives in Rome.")])
        other = agent.answer([*common, Message("user", "My sister Eve lives in Paris.")])
        pieces = [next(one), *other, *one]
        assert one.reply is not None and other.reply is not None
        assert "".join(pieces) == pieces[0] + other.reply.text + one.reply.text[len(pieces[0]) :]
        assert session_of(one) != session_of(other)


def test_no_stranger_waits_for_another(agent: Agent) -> None:
    known = list(TOLD)
    answered(agent, known)
    done = threading.Event()
    for common in ([SYSTEM], known):
        one = agent.answer([*common, Message("user", "My brother Max lives in Rome.")])

        def other(common: list[Message] = common) -> None:
            answered(agent, [*common, Message("user", "My sister Eve lives in Paris.")])
            done.set()

        with one.alone():
            threading.Thread(target=other).start()
            assert done.wait(20)
        done.clear()


def test_a_damaged_nameless_conversation_is_its_own_matter(load: Load, tmp_path: Path) -> None:
    with load() as agent:
        damaged = session_of(answered(agent, list(TOLD)))
    with closing(sqlite3.connect(tmp_path / "m.db")) as conn, conn:
        assert conn.execute("update checkpoints set digest = x'00'").rowcount
    with load() as agent:
        assert session_of(answered(agent, list(TOLD))) != damaged


def test_many_branches_can_be_begun_at_once(agent: Agent) -> None:
    known = list(TOLD)
    answered(agent, known, session="edited")
    answered(agent, [*known, ASK], session="edited")
    asked = [
        ("edited", [*known, Message("user", f"My {i} friends live in Rome.")]) for i in range(5)
    ]
    asked += [("team", [Message("system", f"You are agent {i}."), ASK]) for i in range(5)]
    done: list[Answering] = []

    def ask(name: str, messages: list[Message]) -> None:
        done.append(answered(agent, messages, session=name, max_tokens=4))

    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"edited~{i}" for i in range(2, 7)] + ["team", *(f"team~{i}" for i in range(2, 6))]
    assert sorted(map(session_of, done)) == sorted(names)


def test_a_first_turn_that_was_undone_is_asked_again_in_the_same_session(agent: Agent) -> None:
    for told in ([ASK], TOLD):
        name = f"of {len(told)}"
        left = agent.answer(told, session=name)
        next(left)
        left.close()
        assert session_of(answered(agent, list(told), session=name)) == name


def test_several_new_messages_are_one_turn_and_a_replay_of_them_is_exact(agent: Agent) -> None:
    told = [
        SYSTEM,
        Message("user", "My sister Ana lives in Porto."),
        Message("user", "Hello."),
        ASK,
    ]
    answered(agent, told, session="alice")
    told.append(Message("user", "And who is Ana?"))
    answered(agent, told, session="alice")
    chat = agent.session("alice")
    chat.rewind(5)
    assert chat.restored is not None and chat.restored.faithful
    assert [t.text for t in chat.history()] == [m.text for m in told[:5]]


def test_messages_of_assistants_and_tools_that_were_not_made_here_are_read(agent: Agent) -> None:
    calls = (ToolCall("weather", {"city": "Porto"}, "call_1"),)
    told = [SYSTEM, ASK, Message("assistant", "", calls), Message("tool", "sunny"), ASK]
    place = answered(agent, told, session="alice", tools=[WEATHER], tool_choice="none").place
    assert place is not None
    history = place.session.history()
    assert [t.role for t in history] == ["system", "user", "assistant", "tool", "user", "assistant"]
    assert '"weather"' in history[0].text and '"Porto"' in history[2].text


def test_what_another_agent_has_said_last_is_replied_to_and_its_replay_is_exact(
    agent: Agent,
) -> None:
    told = [*TOLD, Message("assistant", "Max lives in Rome.")]
    answered(agent, told, session="alice")
    told.append(Message("assistant", "Eve lives in Paris."))
    place = answered(agent, told, session="alice").place
    assert place is not None and (place.known, place.read_tokens) == (4, 0)
    told.append(ASK)
    answered(agent, told, session="alice")
    chat = agent.session("alice")
    before = chat.history()
    chat.rewind(6)
    assert chat.restored is not None and chat.restored.faithful
    assert chat.history() == before[:6]


def test_a_reply_that_is_left_is_undone_and_can_be_asked_for_again(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="alice")
    left = agent.answer([*told, ASK], session="alice")
    next(left)
    left.close()
    assert len(agent.session("alice").history()) == 3
    again = answered(agent, [*told, ASK], session="alice")
    assert session_of(again) == "alice"


def test_two_at_once_on_one_conversation_both_get_their_reply(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="alice")
    asked = [[*told, ASK], [*told, Message("user", "Who is Ana?")]]
    done: list[Answering] = []
    threads = [
        threading.Thread(target=lambda m=m: done.append(answered(agent, m, session="alice")))
        for m in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(session_of, done)) == ["alice", "alice~2"]
    for messages in asked:
        found = [s for s in agent.branches("alice") if len(agent.session(s).history()) == 5]
        assert [messages[3].text, messages[4].text] in [
            [t.text for t in agent.session(s).history()[3:]] for s in found
        ]


def test_async_pieces_are_the_reply(agent: Agent) -> None:
    async def main() -> str:
        answering = agent.answer([*TOLD], session="alice")
        pieces = [piece async for piece in answering.pieces()]
        assert answering.reply is not None and "".join(pieces) == answering.reply.text
        return answering.reply.text

    assert asyncio.run(main())


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM],
        [SYSTEM, SYSTEM],
        [Message("user", " ")],
        [Message("user", "\ud800")],
    ],
)
def test_what_asks_for_no_reply_is_refused_and_leaves_no_session(
    agent: Agent, messages: list[Message]
) -> None:
    with pytest.raises(InputError):
        agent.answer(messages, session="alice")
    assert agent.sessions() == []


@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_call_is_not_left_out_unsaid_where_no_tool_is_given(agent: Agent, choice: str) -> None:
    with pytest.raises(InputError, match="tool"):
        agent.answer(TOLD, tool_choice=choice)


def test_a_conversation_of_another_model_is_refused(load: Load, tmp_path: Path) -> None:
    with load() as agent:
        answered(agent, list(TOLD), session="alice")
    other = Agent.load(
        "reference",
        store=tmp_path / "m.db",
        budget=Budget(slots=512),
        dtype="bfloat16",
        compactor="streaming",
    )
    with other, pytest.raises(IdentityError, match="dtype"):
        answered(other, list(TOLD), session="alice")


def test_deleting_a_thread_takes_its_branches_and_no_other(agent: Agent) -> None:
    told = list(TOLD)
    answered(agent, told, session="alice")
    for text in ("One.", "Two."):
        answered(agent, [*told, Message("user", text)], session="alice")
    answered(agent, list(TOLD), session="bob")
    deleted = agent.delete_thread("alice", erase=True)
    assert sorted(deleted.sessions) == ["alice", "alice~2"] and deleted.shared == ()
    assert [s.name for s in agent.sessions()] == ["bob"]
