"""Promises of turns that are forgotten and of conversations that are erased."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from still_agent import (
    Agent,
    Budget,
    ConflictError,
    IdentityError,
    InputError,
    Session,
    TaintedError,
    UnknownSessionError,
)
from still_agent import rebuild as rebuilding
from still_memory.compactors import StreamingCompactor
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.test_fork import PROSE, state_of
from tests.agent.test_rebuild import Stop, made
from tests.attacks import traces

SECRET = "The heron keeps a vermilion key."


def part(n: int) -> str:
    return f"Part {n}. {PROSE * 2}".strip()


def heard(agent: Agent, texts: list[str], name: str = "x") -> Session:
    """A session that has read these texts; nobody replies, so what is said hangs on nothing."""
    chat = agent.session(name, system="Brief.")
    for text in texts:
        chat.read(text)
    return chat


def texts(chat: Session) -> list[str]:
    return [turn.text for turn in chat.history()]


class Bytes:
    """What stands in a store before something is forgotten, to be searched for afterwards."""

    def __init__(self, chat: Session, path: Path, *turns: int) -> None:
        self.path = path
        told = [chat.history()[n - 1] for n in turns]
        self.said = [traces.of_tokens(t.tokens[1:-1]) for t in told] + [b"vermilion"]
        self.layers = traces.of_layers(path)

    def left(self) -> tuple[list[tuple[str, bytes]], int]:
        """What is found of it, and how many windows of tensors were searched for."""
        now = traces.of_layers(self.path)
        there = {window for windows in now.values() for window in windows}
        gone = [w - there for address, w in self.layers.items() if address not in now]
        windows = [window for some in gone for window in some]
        return traces.hits(self.path, [*self.said, *windows]), len(windows)


# -- what stays -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
def test_the_state_is_that_of_a_session_that_was_never_told(
    make_agent: MakeAgent, tmp_path: Path, schedule: str
) -> None:
    path = tmp_path / "s.db"
    agent = make_agent(path, schedule=schedule, compactor=Pooling())
    said = [part(1), part(2), SECRET, part(3), part(4)]
    chat = heard(agent, said)
    fork = chat.fork("y")
    fork.read(part(5))
    bytes_ = Bytes(chat, path, 4)
    assert len(bytes_.left()[0]) >= 2
    ticks: list[tuple[int, int]] = []
    forgotten = chat.forget(4, later="keep", on_replay=lambda *t: ticks.append(t))
    left, windows = bytes_.left()
    assert left == [] and windows > 50
    assert [t.session for t in forgotten.sessions] == ["x", "y"]
    assert [t.later for t in forgotten.sessions] == [(5, 6), (5, 6, 7)]
    assert ticks == sorted(ticks) and ticks[-1][0] == ticks[-1][1]
    assert texts(chat) == ["Brief.", *said[:2], *said[3:]]
    assert chat.search("vermilion") == [] and len(chat.search("part")) == 4
    assert chat.restored == forgotten.restored[0] and fork.restored == forgotten.restored[1]
    never = make_agent(schedule=schedule, compactor=Pooling())
    assert state_of(chat) == state_of(heard(never, [said[n] for n in (0, 1, 3, 4)]))
    other = heard(never, [said[n] for n in (0, 1, 3, 4)] + [part(5)], "y")
    assert state_of(fork) == state_of(other) and texts(fork) == texts(other)
    # it goes on, and comes back, like any other
    assert chat.send("And now?").usage.reused_tokens > 0
    again = make_agent(path, schedule=schedule, compactor=Pooling())
    assert state_of(again.session("y")) == state_of(other)
    numbers = [t.number for t in again.session("x").history()]
    assert numbers == [*range(1, len(numbers) + 1)]


def test_what_is_later_is_listed_and_refused_or_goes_too(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    agent = make_agent(path)
    chat = heard(agent, [part(1)])
    before = state_of(chat)
    chat.send(SECRET, max_tokens=4)
    chat.read("As you said, the heron has it.")
    chat.read("Something else.")
    fork = chat.fork("y", at=3)
    fork.read("A vermilion one?")
    apart = chat.fork("z", at=2)
    states = [state_of(c) for c in (chat, fork, apart)]
    with pytest.raises(TaintedError, match="later='keep'") as refused:
        chat.forget(3)
    x, y = refused.value.tainted
    assert (x.session, x.forgotten, x.later, x.quoting) == ("x", (3,), (4, 5, 6), (5,))
    assert (y.session, y.forgotten, y.later, y.quoting) == ("y", (3,), (4,), (4,))
    assert "turns 4 to 6" in str(refused.value) and "words of it are in turn 5" in str(
        refused.value
    )
    assert [state_of(c) for c in (chat, fork, apart)] == states

    bytes_ = Bytes(chat, path, 3, 4)
    forgotten = chat.forget(3, later="forget")
    assert bytes_.left()[0] == []
    assert texts(chat) == texts(fork) == ["Brief.", part(1)]
    assert state_of(chat) == state_of(fork) == before
    assert state_of(apart) == states[2] and texts(apart) == texts(chat)
    assert [t.session for t in forgotten.sessions] == ["x", "y"]
    # the last turn alone has nothing after it
    chat.read(SECRET)
    assert chat.forget(3).sessions[0].later == ()
    assert texts(chat) == ["Brief.", part(1)] and state_of(chat) == before
    assert chat.restored is not None and chat.restored.replayed_tokens == 0  # a kept state


def test_an_exchange_goes_whole_or_in_part(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    agent = make_agent(path)
    chat = heard(agent, [part(1)])
    for text in ("One. " + PROSE, SECRET, "Three. " + PROSE):
        chat.send(text, max_tokens=4)
    was = chat.history()
    whole, message, reply = (chat.fork(name) for name in ("whole", "message", "reply"))
    bytes_ = Bytes(chat, path, 5)
    # each is alone with its turns, so that the others' words are not searched for in its place
    with pytest.raises(TaintedError):
        whole.forget(5, 6)
    agent.delete("message"), agent.delete("reply"), agent.delete("x")
    whole.forget(5, 6, later="keep")
    assert texts(whole) == [t.text for t in was if t.number not in (5, 6)]
    assert whole.history()[-1].usage["generated_tokens"] == was[-1].usage["generated_tokens"]
    assert bytes_.left()[0] == []
    with pytest.raises(UnknownSessionError):
        message.send("Hello?")
    with pytest.raises(UnknownSessionError):
        reply.history()

    whole.forget(3, later="keep")  # a message, and its reply stays as what was read
    turn = whole.history()[2]
    assert (turn.role, turn.text) == ("assistant", was[3].text)
    assert turn.usage["generated_tokens"] == 0
    assert turn.tokens == agent.model.tokenizer.message("assistant", turn.text)
    state = state_of(whole)
    whole.forget(5, later="keep")  # a reply, the last turn; its message stays
    assert texts(whole)[-1] == "Three. " + PROSE and len(whole.history()) == 4
    assert state_of(whole) != state
    rebuilt = agent.rebuild("whole")
    assert rebuilt.restored is not None and rebuilt.restored.faithful


@pytest.mark.parametrize("turns", [(), (0,), (1,), (4,), ("2",), (2, 9)])
def test_a_turn_that_is_not_there_or_is_pinned_is_refused(
    make_agent: MakeAgent, turns: tuple[Any, ...]
) -> None:
    chat = heard(make_agent(), [part(1), part(2)])
    state = state_of(chat)
    with pytest.raises(InputError, match="turns 2 to 3"):
        chat.forget(*turns, later="keep")
    with pytest.raises(InputError, match="'keep'"):
        chat.forget(2, later="kept")  # type: ignore[arg-type]
    assert state_of(chat) == state and len(chat.history()) == 3


def test_the_first_turn_of_a_session_without_a_prompt(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    empty = state_of(chat)
    chat.read(SECRET)
    chat.read(part(1))
    chat.forget(1, later="forget")
    assert chat.history() == [] and state_of(chat) == empty
    chat.read(part(1))
    assert texts(chat) == [part(1)]


# -- copies -----------------------------------------------------------------------------------


def test_copies_by_an_import_or_a_rebuild_are_not_overlooked(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    agent = make_agent(path)
    chat = heard(agent, [part(1), part(2), SECRET, part(3)])
    fork = chat.fork("y")
    agent.export("x", tmp_path / "x.still")
    agent.import_session(tmp_path / "x.still", "z")
    agent.close()
    agent = make_agent(path, slots=48)
    rebuilt = agent.rebuild("y")  # with rows of its own
    chat = agent.rebuild("x")
    assert rebuilt.history()[3].id != chat.history()[3].id
    bytes_ = Bytes(chat, path, 4)
    with pytest.raises(TaintedError) as refused:
        chat.forget(4)
    assert [t.session for t in refused.value.tainted] == ["x", "y", "z"]
    agent.close()
    agent = make_agent(path)  # a budget that all of their states fit
    agent.session("x").forget(4, later="keep")
    assert bytes_.left()[0] == []
    for name in "xyz":
        assert SECRET not in texts(agent.session(name)) and len(agent.session(name).history()) == 4
    del fork


def test_an_encrypted_conversation_forgets_too(
    make_agent: MakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("STILL_AGENT_KEY", "5a" * 32)
    path = tmp_path / "s.db"
    agent = make_agent(path, compactor=Pooling())
    said = [part(1), part(2), SECRET, part(3)]
    chat = heard(agent, said)
    fork = chat.fork("y")
    agent.export("x", tmp_path / "x.still")
    copy = agent.import_session(tmp_path / "x.still", "z")
    with closing(sqlite3.connect(path)) as conn:
        rows = dict(conn.execute("select id, digest from turns").fetchall())
        tensors = [bytes(d) for (d,) in conn.execute("select data from span_layers")]
    ids = [c.history()[3].id for c in (chat, copy)]
    with pytest.raises(TaintedError) as refused:
        chat.forget(4)
    assert [(t.session, t.forgotten) for t in refused.value.tainted] == [
        (name, (4,)) for name in "xyz"
    ]
    chat.forget(4, later="keep")
    never = make_agent(compactor=Pooling())
    assert state_of(chat) == state_of(heard(never, [*said[:2], said[3]]))
    for one in (chat, fork, copy):
        assert texts(one) == ["Brief.", *said[:2], said[3]] and one.search("vermilion") == []
    with closing(sqlite3.connect(path)) as conn:
        there = {bytes(d) for (d,) in conn.execute("select data from span_layers")}
    gone = [data[-64:] for data in tensors if data not in there]
    assert len(gone) > 4
    assert traces.hits(path, [*(rows[i] for i in ids), *gone]) == []
    agent.close()
    assert texts(make_agent(path, compactor=Pooling()).session("z"))[-1] == part(3)


def test_a_fork_of_another_model_stops_it(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with make_agent(path) as agent:
        heard(agent, [part(1), SECRET]).fork("y")
    model = made(tmp_path / "other", seed=1)
    with Agent(model, StreamingCompactor(), MemoryStore(path), budget=Budget(slots=64)) as other:
        other.rebuild("y")
        with pytest.raises(IdentityError, match=r"'x'.*rebuild"):
            other.session("y").forget(3, later="keep")
        other.rebuild("x")
        other.session("y").forget(3, later="keep")
        assert texts(other.session("x")) == ["Brief.", part(1)]


# -- interrupted, and rivals ------------------------------------------------------------------

KILLED = """
import os, signal, sys
from still_agent import Agent, Budget, rebuild

def kill(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

rebuild.SAVE_SECONDS = 0.0
folder, path = sys.argv[1:]
how = {"budget": Budget(slots=64), "compactor": "streaming", "device": "cpu"}
Agent.load(folder, store=path, **how).session("x").forget(3, later="keep", on_replay=kill)
"""


def test_a_killed_forget_has_changed_nothing_and_is_gone_on_with(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    how: dict[str, Any] = {
        "store": path, "budget": Budget(slots=64), "compactor": "streaming", "device": "cpu"
    }  # fmt: skip
    with Agent.load(tiny_folder, **how) as agent:
        chat = heard(agent, [part(1), SECRET, *(part(n) for n in range(2, 6))])
        fork = chat.fork("y")
        states, said = [state_of(chat), state_of(fork)], texts(chat)
        bytes_ = Bytes(chat, path, 3)
    child = subprocess.run([sys.executable, "-c", KILLED, tiny_folder, path], check=False)
    assert child.returncode == -signal.SIGKILL
    with Agent.load(tiny_folder, **how) as agent:
        chat, fork = agent.session("x"), agent.session("y")
        assert [state_of(chat), state_of(fork)] == states and texts(chat) == texts(fork) == said
        ticks: list[tuple[int, int]] = []
        chat.forget(3, later="keep", on_replay=lambda *told: ticks.append(told))
        assert ticks[0][0] > 20  # not from the start
        assert texts(chat) == texts(fork) == [t for t in said if t != SECRET]
        assert state_of(chat) == state_of(fork) and bytes_.left()[0] == []
        never = heard(agent, [part(n) for n in range(1, 6)], "w")
        assert state_of(chat) == state_of(never)


def test_a_rival_is_told_and_brings_nothing_back(
    make_agent: MakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "SAVE_SECONDS", 0.0)
    path = tmp_path / "s.db"
    agent, rival = make_agent(path), make_agent(path)
    chat = heard(agent, [part(1), SECRET, part(2)])
    theirs = rival.session("x")
    bytes_ = Bytes(chat, path, 3)

    def meanwhile(done: int, total: int) -> None:
        if done > total // 2 and SECRET in texts(agent.session("x")):
            agent.session("x").forget(3, later="keep")

    # a rebuild that has read the ledger before, and would write its rows again
    with pytest.raises(ConflictError):
        make_agent(path, slots=128).rebuild("x", on_progress=meanwhile)
    assert SECRET not in texts(chat)
    with pytest.raises(ConflictError):
        theirs.send("What was it?", max_tokens=2)
    with pytest.raises(ConflictError):
        theirs.forget(2, later="keep")
    assert bytes_.left()[0] == []
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("select count(*) from sessions").fetchone() == (1,)  # and no draft
    assert rival.session("x") is theirs and texts(theirs) == texts(chat)
    assert theirs.send("Hello.", max_tokens=2).usage.reused_tokens > 0


def test_turns_said_meanwhile_are_kept_or_go(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    agent, rival = make_agent(path), make_agent(path)
    chat = heard(agent, [part(1), SECRET, part(2)])
    late = ["Meanwhile."]

    def write(done: int, total: int) -> None:
        if late:
            rival.session("x").read(late.pop())

    chat.forget(3, later="keep", on_replay=write)
    assert texts(chat)[-1] == "Meanwhile." and SECRET not in texts(chat)

    def stop(done: int, total: int) -> None:
        raise Stop

    state = state_of(chat)
    with pytest.raises(Stop):
        chat.forget(2, later="keep", on_replay=stop)
    assert state_of(chat) == state and texts(chat)[1] == part(1)


# -- whole conversations ----------------------------------------------------------------------


def test_an_erased_conversation_leaves_no_byte(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    agent = make_agent(path)
    chat = heard(agent, [part(1), SECRET, part(2)])
    other = heard(agent, [part(1)], "w")
    state = state_of(other)
    fork = chat.fork("y", at=3)
    bytes_ = Bytes(chat, path, 3)
    with pytest.raises(TaintedError, match="forks='delete'") as refused:
        agent.delete("x", erase=True)
    assert [(t.session, t.forgotten) for t in refused.value.tainted] == [("y", (1, 2, 3))]
    assert texts(chat)[2] == SECRET
    deleted = agent.delete("x", erase=True, forks="delete")
    assert sorted(deleted.sessions) == ["x", "y"] and deleted.shared == ()
    assert bytes_.left()[0] == [] and bytes_.left()[1] > 50
    for gone in (chat, fork):
        with pytest.raises(UnknownSessionError):
            gone.send("Hello?")
    assert state_of(other) == state and [s.name for s in agent.sessions()] == ["w"]


def test_a_store_without_a_file_does_the_same(make_agent: MakeAgent) -> None:
    agent = make_agent()
    chat = heard(agent, [part(1), SECRET, part(2)])
    fork = chat.fork("y", at=3)
    with pytest.raises(TaintedError) as refused:
        chat.forget(3)
    assert [(t.session, t.later) for t in refused.value.tainted] == [("x", (4,)), ("y", ())]
    chat.forget(3, later="keep")
    assert texts(chat) == ["Brief.", part(1), part(2)]
    assert texts(fork) == ["Brief.", part(1)]
    never = make_agent()
    assert state_of(chat) == state_of(heard(never, [part(1), part(2)]))
    with pytest.raises(TaintedError):
        agent.delete("x", erase=True)
    with pytest.raises(InputError, match="'keep'"):
        agent.delete("x", forks="kept")  # type: ignore[arg-type]
    assert agent.delete("x", erase=True, forks="keep").shared[0].session == "y"
    assert [s.name for s in agent.sessions()] == ["y"]
