"""Promises of a state that is computed anew from the ledger."""

from __future__ import annotations

import json
import shutil
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
    DamageError,
    Sampling,
    Session,
    StillError,
)
from still_agent import rebuild as rebuilding
from still_agent.ephemeral import EphemeralStore
from still_agent.models import FrozenModel, load_model
from still_memory.compactors import StreamingCompactor
from still_memory.errors import BudgetError, IdentityError, UnknownSessionError
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.scripted import Scripted
from tests.agent.test_fork import PROSE, mark, state_of, talk
from tests.conftest import REFERENCE, TOKENIZER_FILES, tiny_model


@pytest.fixture
def every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are saved after each exchange."""
    monkeypatch.setattr(rebuilding, "SAVE_SECONDS", 0.0)


class Stop(Exception):
    pass


def stop_after(calls: int) -> Any:
    """A progress callback that ends the rebuild at its call of that number."""
    heard: list[tuple[int, int]] = []

    def hear(done: int, total: int) -> None:
        heard.append((done, total))
        if len(heard) == calls:
            raise Stop

    hear.heard = heard  # type: ignore[attr-defined]
    return hear


def lived(agent: Agent) -> Session:
    """A session with a system prompt, replies, a text read in parts, a rewind and a fork."""
    chat = agent.session("x", system="Brief.")
    talk(chat, 4)
    chat.read(PROSE * 6)
    chat.fork("y", at=5)
    chat.rewind(8)  # inside an exchange
    chat.send("And now? " + PROSE, max_tokens=6, stop="zzz")
    chat.read(PROSE * 3, role="tool")
    return chat


def said(chat: Session) -> list[tuple[str, str, list[int]]]:
    return [(t.role, t.text, t.tokens) for t in chat.history()]


# -- the same parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
def test_with_the_same_parts_every_bit_is_the_same(
    make_agent: MakeAgent, tmp_path: Path, schedule: str
) -> None:
    agent = make_agent(tmp_path / "s.db", schedule=schedule, compactor=Pooling())
    chat = lived(agent)
    state, turns, words = state_of(chat), chat.history(), chat.stats
    assert isinstance(agent.store, MemoryStore)
    before = agent.store.stats()
    heard: list[tuple[int, int]] = []
    assert agent.rebuild("x", on_progress=lambda *told: heard.append(told)) is chat
    assert state_of(chat) == state and mark(agent.store.load(chat._head)) == state
    assert chat.history() == turns and chat.stats == words  # the very rows, ids included
    assert chat.restored is not None and chat.restored.differs == () and chat.restored.faithful
    assert chat.restored.reused_tokens == 0 < chat.restored.compactions
    assert chat.restored.replayed_tokens == chat.stats.logical_tokens
    assert heard == sorted(heard) and heard[-1][0] == heard[-1][1] and len(heard) > 5
    after = agent.store.stats()
    assert (after.sessions, after.turns) == (before.sessions, before.turns)
    assert len(agent.store.kept(chat._head)) == 1  # older states were of who knows which parts
    assert chat.send("Again?").usage.reused_tokens == words.logical_tokens


def test_reasoning_and_stop_strings_are_taken_in_as_they_were(tiny: FrozenModel) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.think is not None
    opens, closes = tokenizer.think
    (end,) = tokenizer.eos_ids
    words = tokenizer.encode(" She lives in Porto. Yes.")
    replies = [
        [opens, *tokenizer.encode("Let me see."), closes, *words, end],
        words,
        [*words[:2], opens, *[7] * 40, closes, *words, end],
        [opens, *[7] * 60],
    ]
    with Agent(
        Scripted(tiny, replies), StreamingCompactor(), EphemeralStore(),
        budget=Budget(slots=64), sampling=Sampling(max_tokens=60),
    ) as agent:  # fmt: skip
        chat = agent.session("x", system="Brief.")
        for stop in ((), "Por", (), ()):
            chat.send("Where does my sister live?", stop=stop)
        state = state_of(chat)
        agent.rebuild("x")
        assert chat.restored is not None and chat.restored.faithful
        assert state_of(chat) == state


def test_boundaries_are_in_the_ledger_and_a_replay_is_held_against_them(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent(tmp_path / "s.db", slots=64)
    chat = lived(agent)
    logged = [t.usage for t in chat.history() if t.usage.get("compactions")]
    assert logged and all(len(u["steps"]) == u["compactions"] for u in logged)  # type: ignore[arg-type]
    assert {u["compactor"] for u in logged} == {StreamingCompactor().identity.address}
    assert logged[0]["budget"]["slots"] == 64  # type: ignore[index,call-overload]
    assert [low < high for low, high, *_ in logged[0]["steps"]]  # type: ignore[union-attr,misc]
    agent.close()
    # as many compactions, of the same tokens, by another compactor
    other = make_agent(tmp_path / "s.db", slots=64, compactor=Pooling())
    chat = other.session("x")
    chat.rewind(9)
    assert chat.restored is not None and "compactor" in chat.restored.differs
    assert not chat.restored.faithful


# -- other parts ------------------------------------------------------------------------------


def read_only(agent: Agent) -> Session:
    """A session that is the same whatever its memory is like: nobody replies."""
    chat = agent.session("x", system="Brief.")
    for part in range(6):
        chat.read(f"Part {part}. " + PROSE * 3)
    return chat


OTHER: dict[str, Any] = {"slots": 128, "schedule": "tiered"}


def test_another_budget_and_compactor_make_what_they_would_have_made(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    with make_agent(path, slots=64) as agent:
        words, fork = said(read_only(agent)), agent.session("x").fork("y", at=5)
        theirs, fork_turns = state_of(fork), fork.history()
    wanted = state_of(read_only(make_agent(**OTHER, compactor=Pooling())))
    agent = make_agent(path, **OTHER, compactor=Pooling())
    chat = agent.rebuild("x")
    assert state_of(chat) == wanted and said(chat) == words
    assert chat.restored is not None
    assert {"budget", "compactor", "steps"} <= set(chat.restored.differs)
    # its own ledger tells how it was made, and so a second rebuild finds nothing new
    turns = chat.history()
    again = agent.rebuild("x")
    assert again.restored is not None and again.restored.faithful and state_of(again) == wanted
    assert again.history() == turns
    # the fork is what it was; the turns before the first compaction are still shared
    other = make_agent(path, slots=64).session("y")
    assert state_of(other) == theirs and other.history() == fork_turns
    assert turns[0].id == fork_turns[0].id and turns[-1].id != fork_turns[-1].id
    assert [m.number for m in chat.search("part 1")] == [3]


def test_a_budget_that_cannot_hold_it_changes_nothing(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x", system=PROSE)
    talk(chat, 4)
    state = state_of(chat)
    with pytest.raises(BudgetError):
        make_agent(tmp_path / "s.db", slots=16).rebuild("x")
    short = make_agent(tmp_path / "s.db", schedule="append", horizon=100)
    with pytest.raises(BudgetError, match="horizon"):
        short.rebuild("x")
    assert agent.session("x") is chat and state_of(chat) == state


def made(folder: Path, seed: int, **tokenizer: Any) -> FrozenModel:
    """Another model; with another pattern or template where that is given."""
    folder.mkdir()
    tiny_model(seed).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(REFERENCE / name, folder / name)
    about = folder / "tiktoken_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **tokenizer}))
    return load_model(folder, device="cpu", dtype="float32")


def test_another_model_of_the_same_tokenizer_takes_in_the_same_tokens(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    with make_agent(tmp_path / "s.db") as agent:
        chat = lived(agent)
        words, state = said(chat), state_of(chat)
    budget = Budget(slots=64)
    with Agent(
        made(tmp_path / "other", seed=1), StreamingCompactor(), MemoryStore(tmp_path / "s.db"),
        budget=budget,
    ) as other:  # fmt: skip
        with pytest.raises(IdentityError, match="weights differ"):
            other.session("x")
        chat = other.rebuild("x")
        assert chat.restored is not None and chat.restored.differs == ("model",)
        assert said(chat) == words and state_of(chat) != state
        assert other.sessions()[0].name == "x" and other.sessions()[0].model == "other"
        assert chat.send("Hello.", max_tokens=2).usage.reused_tokens > 0
        other.close()
    with pytest.raises(IdentityError, match="'other'"):
        make_agent(tmp_path / "s.db").session("x")
    assert make_agent(tmp_path / "s.db").session("y").stats.turns == 5  # the fork keeps its own


def test_a_model_of_another_tokenizer_takes_in_the_text(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    with make_agent(tmp_path / "s.db") as agent:
        chat = lived(agent)
        words, times = said(chat), [t.created for t in chat.history()]
    model = made(tmp_path / "other", seed=1, pattern=r"\p{L}+|\p{N}|\s|.")
    store = MemoryStore(tmp_path / "s.db")
    with Agent(model, StreamingCompactor(), store, budget=Budget(slots=64)) as other:
        chat = other.rebuild("x")
        assert chat.restored is not None and {"model", "tokens"} <= set(chat.restored.differs)
        assert [(role, text) for role, text, _ in said(chat)] == [w[:2] for w in words]
        assert [t.created for t in chat.history()] == times
        for turn in chat.history():
            assert turn.tokens == model.tokenizer.message(turn.role, turn.text)
        assert chat.stats.logical_tokens == len(model.tokenizer.start) + sum(
            len(t.tokens) for t in chat.history()
        )
        state = state_of(chat)
        again = other.rebuild("x")
        assert again.restored is not None and again.restored.faithful and state_of(again) == state
        assert [m.number for m in chat.search("message 1")] == [4]


# -- interrupted ------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_turn")
@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("parts", [{}, OTHER], ids=["same parts", "others"])
def test_an_interrupted_rebuild_goes_on_where_it_stopped(
    make_agent: MakeAgent, tmp_path: Path, stop: int, parts: dict[str, Any]
) -> None:
    path = tmp_path / "s.db"
    chat = lived(make_agent(path))
    state, stats, turns = state_of(chat), chat.stats, chat.history()
    agent = make_agent(path, **parts)
    with pytest.raises(Stop):
        agent.rebuild("x", on_progress=(first := stop_after(stop)))
    # the old state stands, and nothing shows of the new one
    assert isinstance(agent.store, MemoryStore)
    assert mark(agent.store.load(agent.store.head("x"))) == state  # type: ignore[arg-type]
    assert sorted(info.name for info in agent.sessions()) == ["x", "y"]
    assert agent.store.stats().sessions == 2
    agent.close()

    rest = make_agent(path, **parts).rebuild("x", on_progress=(then := stop_after(0)))
    assert then.heard[0] == first.heard[-1]  # not from the start
    assert rest.restored is not None and rest.restored.reused_tokens > 0
    made_of = rest.restored.reused_tokens + rest.restored.replayed_tokens
    assert made_of == rest.stats.logical_tokens == stats.logical_tokens
    if parts:
        assert "budget" in rest.restored.differs
    else:
        assert state_of(rest) == state and rest.history() == turns
    again = make_agent(path, **parts).rebuild("x")  # in one go
    assert state_of(again) == state_of(rest) and again.history() == rest.history()
    assert again.restored is not None and again.restored.faithful


@pytest.mark.usefixtures("every_turn")
def test_a_draft_of_other_parts_or_of_turns_that_are_gone_is_not_gone_on_with(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    chat = lived(make_agent(path))
    with pytest.raises(Stop):
        make_agent(path, slots=128).rebuild("x", on_progress=stop_after(5))
    state = state_of(chat)
    again = make_agent(path).rebuild("x", on_progress=(heard := stop_after(0)))
    assert heard.heard[0][0] < 10 and state_of(again) == state
    with pytest.raises(Stop):
        make_agent(path).rebuild("x", on_progress=stop_after(5))
    chat = make_agent(path).session("x")
    chat.rewind(3)
    chat.send("Something else.", max_tokens=2)
    state = state_of(chat)
    again = make_agent(path).rebuild("x", on_progress=(heard := stop_after(0)))
    assert heard.heard[0][0] < 10 and state_of(again) == state


KILLED = """
import os, signal, sys
from still_agent import Agent, Budget, rebuild

def kill(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

rebuild.SAVE_SECONDS = 0.0
folder, path = sys.argv[1:]
how = {"budget": Budget(slots=64), "compactor": "streaming", "device": "cpu"}
Agent.load(folder, store=path, **how).rebuild("x", on_progress=kill)
"""


@pytest.mark.usefixtures("every_turn")
def test_a_killed_rebuild_leaves_the_old_state_and_is_gone_on_with(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    how: dict[str, Any] = {
        "store": path, "budget": Budget(slots=64), "compactor": "streaming", "device": "cpu"
    }  # fmt: skip
    with Agent.load(tiny_folder, **how) as agent:
        state = state_of(lived(agent))
    # A process of its own: torch's threads do not live on in a fork.
    child = subprocess.run([sys.executable, "-c", KILLED, tiny_folder, path], check=False)
    assert child.returncode == -signal.SIGKILL
    with Agent.load(tiny_folder, **how) as agent:
        assert state_of(agent.session("x")) == state
        chat = agent.rebuild("x")
        assert chat.restored is not None and chat.restored.reused_tokens > 0
        assert state_of(chat) == state


@pytest.mark.usefixtures("every_turn")
def test_a_deleted_session_takes_its_draft_with_it(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    chat.read("The heron keeps the brass key. " + PROSE * 3)
    chat.read("Where is it?")
    with pytest.raises(Stop):
        make_agent(tmp_path / "s.db", slots=32).rebuild("x", on_progress=stop_after(2))
    agent.delete("x")
    assert isinstance(agent.store, MemoryStore)
    stats = agent.store.stats()
    assert (stats.sessions, stats.turns, stats.checkpoints, stats.spans) == (0, 0, 0, 0)
    files = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert b"brass key" not in files


# -- rivals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [0.0, 60.0], ids=["draft saved", "draft in memory"])
def test_turns_said_meanwhile_are_taken_in_too(
    make_agent: MakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: float
) -> None:
    monkeypatch.setattr(rebuilding, "SAVE_SECONDS", saved)
    path = tmp_path / "s.db"
    writer = read_only(make_agent(path))
    late = ["Meanwhile. " + PROSE]

    def write(done: int, total: int) -> None:
        if done == total and late:
            writer.read(late.pop())

    chat = make_agent(path, **OTHER).rebuild("x", on_progress=write)
    assert chat.history()[-1].text.startswith("Meanwhile.")
    fresh = read_only(make_agent(**OTHER))
    fresh.read("Meanwhile. " + PROSE)
    assert state_of(chat) == state_of(fresh)
    with pytest.raises(ConflictError, match="open it again"):
        writer.read("Late.")  # its state is no longer the session's


def test_who_writes_without_end_is_told_of(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    writer = read_only(make_agent(path))

    def write(done: int, total: int) -> None:
        if done == total:
            writer.read("More.")

    with pytest.raises(ConflictError, match="when it rests"):
        make_agent(path, **OTHER).rebuild("x", on_progress=write)
    state = state_of(writer)
    chat = make_agent(path).session("x")
    assert state_of(chat) == state


@pytest.mark.usefixtures("every_turn")
def test_of_two_rebuilds_at_once_one_is_told(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    read_only(make_agent(path))
    rival, once = make_agent(path, slots=256), [True]

    def meanwhile(done: int, total: int) -> None:
        if done > total // 2 and once:
            once.clear()
            with pytest.raises(Stop):
                rival.rebuild("x", on_progress=stop_after(3))

    with pytest.raises(ConflictError, match="rebuilt or rewound elsewhere"):
        make_agent(path, **OTHER).rebuild("x", on_progress=meanwhile)
    assert state_of(rival.rebuild("x")) == state_of(read_only(make_agent(slots=256)))


@pytest.mark.usefixtures("every_turn")
def test_a_session_deleted_meanwhile_is_not_brought_back(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    other = make_agent(path)
    read_only(other)

    def delete(done: int, total: int) -> None:
        if total // 2 < done < total and other.sessions():
            other.delete("x")

    with pytest.raises(UnknownSessionError):
        make_agent(path).rebuild("x", on_progress=delete)
    assert other.sessions() == []
    assert other.store.stats().checkpoints == 0  # type: ignore[attr-defined]
    with pytest.raises(UnknownSessionError, match="holds no session"):
        other.rebuild("nobody")


def test_an_open_stream_finds_its_turn_undone(make_agent: MakeAgent) -> None:
    agent = make_agent()
    chat = agent.session("x")
    talk(chat, 2)
    stream = chat.stream("Hello.")
    next(stream)
    state = agent.rebuild("x")
    assert state is chat and chat.stats.turns == 4
    with pytest.raises(StillError):
        list(stream)


# -- damage -----------------------------------------------------------------------------------

DAMAGE = {
    "a tensor": "update span_layers set data = zeroblob(length(data)) where layer = 1",
    "a layer that is gone": "delete from span_layers where layer = 0",
    "a description": "update spans set rounds = rounds + 1",
    "a span that is gone": "delete from span_layers; delete from checkpoint_spans;"
    " delete from spans",
}


@pytest.mark.parametrize("sql", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_state_is_made_anew_and_its_forks_are_mended(
    make_agent: MakeAgent, tmp_path: Path, sql: str
) -> None:
    path = tmp_path / "s.db"
    with make_agent(path) as agent:
        chat = lived(agent)
        state, words = state_of(chat), chat.history()
        chat.fork("z")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(sql)
    agent = make_agent(path)
    with pytest.raises(DamageError, match="damaged"):
        agent.session("x")
    chat = agent.rebuild("x")
    assert chat.restored is not None and chat.restored.faithful
    assert state_of(chat) == state and chat.history() == words
    assert state_of(make_agent(path).session("x")) == state
    assert state_of(make_agent(path).session("z")) == state  # shares the spans that were mended


@pytest.mark.parametrize(
    ("sql", "turns"),
    [
        ("update checkpoints set entries = '[]' where id = (select max(id) from checkpoints)", 9),
        ("update checkpoints set turns = 7 where id = (select max(id) from checkpoints)", 7),
        ("delete from checkpoints where id = (select max(id) from checkpoints)", 7),
    ],
)
def test_a_damaged_checkpoint_costs_what_nothing_vouches_for(
    make_agent: MakeAgent, tmp_path: Path, sql: str, turns: int
) -> None:
    path = tmp_path / "s.db"
    with make_agent(path) as agent:
        states = talk(agent.session("x", system="Brief."), 4)
        texts = [t.text for t in agent.session("x").history()]
    with closing(sqlite3.connect(path)) as db:
        db.execute(sql)
        db.commit()
    agent = make_agent(path)
    with pytest.raises(DamageError):
        agent.session("x")
    chat = agent.rebuild("x")
    assert [t.text for t in chat.history()] == texts[:turns]
    assert state_of(chat) == states[turns // 2]


@pytest.mark.parametrize(
    "sql",
    [
        "update turns set text = 'No.' where id = 3",
        "update turns set tokens = zeroblob(8) where id = 2",
        "update sessions set settings = '{}'",
    ],
)
def test_a_damaged_ledger_is_not_rebuilt_from(
    make_agent: MakeAgent, tmp_path: Path, sql: str
) -> None:
    path = tmp_path / "s.db"
    with make_agent(path) as agent:
        talk(agent.session("x", system="Brief."), 3)
    with closing(sqlite3.connect(path)) as db:
        db.execute(sql)
        db.commit()
    with pytest.raises(DamageError):
        make_agent(path).rebuild("x")


# -- without a file, and with the packaged model ----------------------------------------------


@pytest.mark.usefixtures("every_turn")
def test_a_store_without_a_file_does_the_same(tiny: FrozenModel) -> None:
    store = EphemeralStore()
    one = Agent(tiny, Pooling(), store, budget=Budget(slots=64), sampling=Sampling(max_tokens=4))
    chat = lived(one)
    state, turns = state_of(chat), chat.history()
    one.rebuild("x")
    assert state_of(chat) == state and chat.history() == turns
    other = Agent(tiny, StreamingCompactor(), store, budget=Budget(slots=128))
    with pytest.raises(Stop):
        other.rebuild("x", on_progress=stop_after(6))
    assert sorted(info.name for info in other.sessions()) == ["x", "y"]
    again = other.rebuild("x", on_progress=(heard := stop_after(0)))
    assert heard.heard[0][0] > 10 and [t.text for t in again.history()] == [t.text for t in turns]
    assert again.restored is not None and "compactor" in again.restored.differs
    assert other.rebuild("x").restored.faithful  # type: ignore[union-attr]
    with pytest.raises(UnknownSessionError):
        other.rebuild("w")


def test_the_packaged_model_and_compactor_do_it_too(tmp_path: Path) -> None:
    """Bit for bit, in another process's place: nothing but the file is shared."""
    path, budget = tmp_path / "s.db", Budget(slots=128)
    with Agent.load(store=path, budget=budget, device="cpu") as agent:
        chat = agent.session("x", system="You are brief.")
        chat.send("My sister Ana lives in Porto.", max_tokens=12)
        chat.read(PROSE * 16)
        chat.send("Where does my sister live?", max_tokens=12)
        state, turns = state_of(chat), chat.history()
        assert chat.stats.rounds
    with Agent.load(store=path, budget=budget, device="cpu") as agent:
        chat = agent.rebuild("x")
        assert state_of(chat) == state and chat.history() == turns
        assert chat.restored is not None and chat.restored.faithful
