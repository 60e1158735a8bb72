"""Promises of forks and rewinds, of replayed turns, and of what was deleted."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from still_agent import Agent, Budget, InputError, Sampling, Session
from still_agent.ephemeral import EphemeralStore
from still_agent.models import FrozenModel
from still_memory.checkpoint import Checkpoint
from still_memory.codec import encode
from still_memory.compactors import StreamingCompactor
from still_memory.errors import (
    BudgetError,
    ConflictError,
    DamageError,
    IdentityError,
    StillError,
    UnknownSessionError,
)
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.scripted import Scripted

PROSE = "The wind rose. The sea was grey and long. Nobody spoke.\n\n"


def mark(checkpoint: Checkpoint) -> str:
    """A digest of a whole state: every tensor's bytes, and where each span stands."""
    state = hashlib.sha256()
    for e in checkpoint.entries:
        s = e.span
        state.update(repr((e.low, e.high, e.base, e.share, e.level)).encode())
        state.update(repr((s.start, s.end, s.rotated_at, s.rounds, s.compactor, s.ids)).encode())
        for slots in s.layers:
            state.update(encode(slots))
    return state.hexdigest()


def state_of(chat: Session) -> str:
    """What is saved; and the live cache is what the saved state fills it with."""
    saved = mark(chat._saved)
    live = [chat._state.cache.raw(n, 0, held) for n, held in enumerate(chat._state.cache.lengths)]
    copies = [(keys.clone(), values.clone()) for keys, values in live]
    chat._state.restore(chat._saved)
    for (keys, values), (old_keys, old_values) in zip(live, copies, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)
    return saved


def talk(chat: Session, turns: int) -> list[str]:
    """The state after each of so many exchanges; the first at 0."""
    states = [state_of(chat)]
    for turn in range(turns):
        chat.send(f"Message {turn}: " + PROSE, max_tokens=4)
        states.append(state_of(chat))
    return states


# -- what a rewind restores -------------------------------------------------------------------


def test_a_kept_turn_comes_back_bit_for_bit(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x", system="Brief.")
    states = talk(chat, 4)
    chat.rewind(7)
    assert chat.restored is not None and chat.last_reply is None
    assert (chat.restored.replayed_tokens, chat.restored.compactions) == (0, 0)
    assert chat.restored.reused_tokens == chat.stats.logical_tokens
    assert state_of(chat) == states[3] and len(chat.history()) == chat.stats.turns == 7
    assert mark(agent.store.load(chat._head)) == states[3]


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
def test_a_turn_that_is_not_kept_is_replayed_bit_for_bit(
    make_agent: MakeAgent, tmp_path: Path, schedule: str
) -> None:
    chat = make_agent(tmp_path / "s.db", schedule=schedule, compactor=Pooling()).session(
        "x", system="Brief."
    )
    states = talk(chat, 6)
    chat.read(PROSE * 4)
    heard: list[tuple[int, int]] = []
    chat.rewind(9, on_replay=lambda *told: heard.append(told))
    assert chat.restored is not None and chat.restored.faithful
    assert chat.restored.reused_tokens == 0 < chat.restored.compactions
    assert state_of(chat) == states[4] and chat.stats.rounds > 0
    assert [low < high for low, high in heard] == [True, True, True, False]
    chat.rewind(9)  # now kept
    assert chat.restored.replayed_tokens == 0 and state_of(chat) == states[4]
    chat.rewind(1)
    assert state_of(chat) == states[0]


def test_a_turn_before_any_was_said(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    (empty, *_) = talk(chat, 2)
    chat.rewind(0)
    assert state_of(chat) == empty and chat.history() == []
    assert chat.send("Hello.").usage.reused_tokens == 1


def test_between_a_message_and_its_reply_the_message_was_read(make_agent: MakeAgent) -> None:
    chat, reader = make_agent().session("x"), make_agent().session("x")
    for each in (chat, reader):
        each.send("One.", max_tokens=4)
    chat.send("Two.", max_tokens=4)
    chat.rewind(3)
    reader.read("Two.")
    assert state_of(chat) == state_of(reader)
    assert [t.text for t in chat.history()] == [t.text for t in reader.history()]


def test_reasoning_and_stop_strings_are_replayed(tiny: FrozenModel, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.think is not None
    opens, closes = tokenizer.think
    (end,) = tokenizer.eos_ids
    said = tokenizer.encode(" She lives in Porto. Yes.")
    replies = [
        [opens, *tokenizer.encode("Let me see."), closes, *said, end],
        said,
        [*said, end],
        [*said[:2], opens, *[7] * 40, closes, *said, end],
        [opens, *[7] * 60],  # never closed
        [end],
    ]
    options: list[dict[str, Any]] = [{}, {"stop": "Por"}, {"stop": ("none",)}, {}, {}, {}]
    with MemoryStore(tmp_path / "s.db") as store:
        agent = Agent(
            Scripted(tiny, replies), StreamingCompactor(), store,
            budget=Budget(slots=64), sampling=Sampling(max_tokens=60),
        )  # fmt: skip
        chat = agent.session("x", system="Brief.")
        states = [state_of(chat)]
        for option in options:
            chat.send("Where does my sister live?", **option)
            states.append(state_of(chat))
        assert chat.history()[3 + 1].text == " She lives in "
        for count in range(len(states) - 1, -1, -1):
            chat.rewind(1 + 2 * count)
            assert chat.restored is not None and chat.restored.faithful
            assert state_of(chat) == states[count], count


def test_another_budget_is_told(make_agent: MakeAgent, tmp_path: Path) -> None:
    with make_agent(tmp_path / "s.db") as agent:
        talk(agent.session("x"), 6)
    chat = make_agent(tmp_path / "s.db", slots=512).session("x")
    chat.rewind(8)
    assert chat.restored is not None and not chat.restored.faithful
    assert chat.stats.slots == chat.stats.logical_tokens  # what this budget makes of it


def test_tokens_of_another_model_are_refused(make_agent: MakeAgent, tmp_path: Path) -> None:
    chat = make_agent(tmp_path / "s.db").session("x")
    before = talk(chat, 1)[-1]
    chat._commit(chat._head, [NewTurn("user", "odd", [4096])])
    for _ in range(2):
        chat.send("Hm.", max_tokens=2)
    with pytest.raises(DamageError, match="turn 3 has tokens"):
        chat.rewind(3)
    chat.rewind(2)
    assert state_of(chat) == before


# -- forks ------------------------------------------------------------------------------------


def test_a_fork_shares_what_it_has_and_goes_its_own_way(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x", system="Brief.")
    states = talk(chat, 5)
    store = agent.store
    assert isinstance(store, MemoryStore)
    before = store.stats()
    now, old = chat.fork("now"), chat.fork("old", at=9)
    after = store.stats()
    assert (after.spans, after.turns) == (before.spans, before.turns)
    assert after.sessions == 3
    assert state_of(now) == states[5] == state_of(chat) and state_of(old) == states[4]
    assert old.restored is not None and old.restored.replayed_tokens == 0
    assert [t.id for t in old.history()] == [t.id for t in chat.history()][:9]
    assert agent.session("old") is old and old.fork("older", at=3).stats.turns == 3

    said, kept = old.send("Mine alone.").text, chat.history()
    assert chat.history() == kept and "Mine alone." in [t.text for t in old.history()]
    assert said == chat.fork("again", at=9).send("Mine alone.").text
    with pytest.raises(InputError, match="another system prompt"):
        agent.session("old", system="Long.")


def test_a_fork_outlives_its_origin(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    talk(chat, 3)
    fork = chat.fork("y", at=4)
    state, turns = state_of(fork), fork.history()
    chat.send("the heron keeps the brass key")
    agent.delete("x")
    assert fork.history() == turns and state_of(fork) == state
    assert agent.store.stats().turns == 4  # type: ignore[attr-defined]
    files = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert b"brass key" not in files and b"Message 0" in files
    agent.delete("y")
    stats = agent.store.stats()  # type: ignore[attr-defined]
    assert (stats.sessions, stats.turns, stats.checkpoints, stats.spans) == (0, 0, 0, 0)


def test_a_name_that_is_taken_or_impossible_is_refused(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    states = talk(chat, 1)
    with pytest.raises(ConflictError, match="exists already: choose another name"):
        chat.fork("x")
    with pytest.raises(InputError, match="session name"):
        chat.fork("")
    assert state_of(chat) == states[-1]


@pytest.mark.parametrize("at", [-1, 3, 10**30, 1.5, "2", None])
def test_a_turn_that_is_not_there_is_refused(make_agent: MakeAgent, at: Any) -> None:
    chat = make_agent().session("x")
    states = talk(chat, 1)
    with pytest.raises(InputError, match="turns 0 to 2"):
        chat.rewind(at)
    assert state_of(chat) == states[-1] and chat.stats.turns == 2


def test_the_system_prompt_stays(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x", system="Brief.")
    with pytest.raises(InputError, match="turns 1 to 1"):
        chat.rewind(0)


# -- all or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["rewind", "fork"])
def test_a_replay_that_is_interrupted_changes_nothing(
    make_agent: MakeAgent, tmp_path: Path, verb: str
) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    states, turns = talk(chat, 5), chat.history()
    go = chat.rewind if verb == "rewind" else lambda at, **options: chat.fork("y", at, **options)
    with pytest.raises(KeyboardInterrupt):
        go(4, on_replay=stop)
    assert state_of(chat) == states[-1] and chat.history() == turns
    assert [info.name for info in agent.sessions()] == ["x"]
    assert chat.send("Again.").text


def test_an_open_stream_is_abandoned(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    states = talk(chat, 2)
    stream = chat.stream("Hello.")
    next(stream)
    chat.rewind(2)
    with pytest.raises(InputError, match="abandoned"):
        next(stream)
    assert state_of(chat) == states[1]


def test_a_callback_cannot_go_back(make_agent: MakeAgent) -> None:
    agent = make_agent(on_compaction=lambda event: agent.session("x").rewind(0))
    with pytest.raises(InputError, match="callback"):
        agent.session("x").read(PROSE * 8)


def test_a_second_writer_is_told(make_agent: MakeAgent, tmp_path: Path) -> None:
    one = make_agent(tmp_path / "s.db").session("x")
    talk(one, 3)
    other = make_agent(tmp_path / "s.db")
    two = other.session("x")
    one.rewind(2)
    for act in (lambda: two.rewind(4), lambda: two.fork("y"), lambda: two.send("Hello.")):
        with pytest.raises(ConflictError, match="open it again"):
            act()
    assert other.session("x") is two and two.stats.turns == 2
    two.send("Mine.")
    with pytest.raises(ConflictError, match="open it again"):
        one.send("Late.")
    assert [t.text for t in one.history()] == [t.text for t in two.history()]


def test_turns_left_behind_go_with_their_checkpoints(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    talk(chat, 4)
    store = agent.store
    assert isinstance(store, MemoryStore)
    chat.fork("y", at=6)
    chat.rewind(2)
    assert store.stats().turns == 8  # generation 4, still kept, leads to them
    chat.send("Else.", max_tokens=2)
    chat.send("Else.", max_tokens=2)
    assert store.stats().turns == 6 + 4  # those of "y", and the new ones
    agent.delete("y")
    assert store.stats().turns == 6 == len(chat.history())


# -- deleted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("made_anew", [False, True], ids=["gone", "made anew"])
def test_a_live_object_of_a_deleted_session_says_so_and_brings_nothing_back(
    make_agent: MakeAgent, tmp_path: Path, elsewhere: bool, made_anew: bool
) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    talk(chat, 2)
    stream = chat.stream("Hello.")
    next(stream)
    other = make_agent(tmp_path / "s.db") if elsewhere else agent
    other.delete("x")
    if made_anew:
        other.session("x").send("I am another.", max_tokens=2)
    acts = [
        lambda: chat.send("Hello."), lambda: chat.read("Hello."), lambda: chat.rewind(2),
        lambda: chat.fork("y"), chat.history, chat.refresh, lambda: chat.search("hello"),
        lambda: list(chat.stream("Hello.")),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(UnknownSessionError, match="'x' was deleted"):
            act()
    with pytest.raises(StillError):
        list(stream)
    names = [info.name for info in other.sessions()]
    assert names == (["x"] if made_anew else [])
    if made_anew:
        assert len(other.session("x").history()) == 2
    assert agent.session("x") is not chat  # begun, or resumed, by whoever asks for it


# -- taken elsewhere --------------------------------------------------------------------------


def test_an_imported_session_goes_on_bit_for_bit(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db", compactor=Pooling())
    chat = agent.session("x", system="Brief.")
    talk(chat, 4)
    agent.export("x", tmp_path / "x.still")
    there = make_agent(tmp_path / "t.db", compactor=Pooling())
    copy = there.import_session(tmp_path / "x.still")
    assert state_of(copy) == state_of(chat) and copy.stats == chat.stats
    assert there.session("x") is copy
    assert copy.send("And now?").text == chat.send("And now?").text
    assert state_of(copy) == state_of(chat)
    copy.rewind(5), chat.rewind(5)
    assert state_of(copy) == state_of(chat)
    with pytest.raises(ConflictError, match="choose another name"):
        there.import_session(tmp_path / "x.still")
    assert there.import_session(tmp_path / "x.still", "y").id == "y"
    kept = make_agent()  # a store without a file takes it too
    assert kept.import_session(tmp_path / "x.still").stats.turns == 9


def test_an_import_of_another_model_or_shape_brings_nothing_in(
    make_agent: MakeAgent, tiny: FrozenModel, tmp_path: Path
) -> None:
    agent = make_agent()
    talk(agent.session("x"), 1)
    found = Portable.of(agent.store, "x")
    identity = tiny.identity.model_copy(update={"weights": "0" * 64, "name": "other"})
    replace(found, model=identity).write(tmp_path / "other.still")
    (entry,) = found.checkpoint.entries[-1:]
    thin = replace(entry.span, layers=entry.span.layers[:1])
    entries = (*found.checkpoint.entries[:-1], replace(entry, span=thin))
    replace(found, checkpoint=Checkpoint(entries, found.checkpoint.length)).write(
        tmp_path / "thin.still"
    )
    there = make_agent(tmp_path / "t.db")
    with pytest.raises(IdentityError, match="weights differ"):
        there.import_session(tmp_path / "other.still")
    with pytest.raises(DamageError, match="not of the shape"):
        there.import_session(tmp_path / "thin.still")
    assert there.sessions() == []


def test_an_import_that_the_budget_cannot_hold_brings_nothing_in(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent(tmp_path / "s.db", slots=256)
    talk(agent.session("x"), 6)
    assert agent.session("x").stats.slots > 64
    agent.export("x", tmp_path / "x.still")
    small = make_agent(tmp_path / "t.db", slots=64)
    for _ in range(2):
        with pytest.raises(BudgetError, match="load the agent with"):
            small.import_session(tmp_path / "x.still")
    assert small.sessions() == []


@pytest.mark.parametrize("store", [None, "t.db"], ids=["memory", "file"])
def test_what_a_rival_deletes_at_once_is_not_begun_anew(
    make_agent: MakeAgent, tmp_path: Path, store: str | None
) -> None:
    """A fork and an import open the record that they made, and nothing else of that name."""
    agent = make_agent(None if store is None else tmp_path / store)
    chat = agent.session("x")
    states = talk(chat, 1)
    agent.export("x", tmp_path / "x.still")
    kept = agent.store

    def rival(verb: str) -> Any:
        made = getattr(kept, verb)

        def then_deleted(*arguments: Any, **options: Any) -> Any:
            head = made(*arguments, **options)
            kept.delete(head.session)
            return head

        return then_deleted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "fork", rival("fork"))
        patch.setattr(kept, "create", rival("create"))
        for act in (
            lambda: chat.fork("y").send("Hello."),
            lambda: agent.import_session(tmp_path / "x.still", "z"),
        ):
            with pytest.raises(UnknownSessionError, match="was deleted"):
                act()
    assert [info.name for info in agent.sessions()] == ["x"] and state_of(chat) == states[-1]


def test_one_model_under_two_names_is_one_model(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    talk(agent.session("x"), 1)
    again = make_agent(tmp_path / "s.db")
    again.model = copy(again.model)
    again.model.identity = again.model.identity.model_copy(update={"name": "alias"})
    chat = again.session("y")
    talk(chat, 2)
    chat.rewind(2)
    assert {info.model for info in again.sessions()} == {agent.model.name}


# -- imported where no model was --------------------------------------------------------------


def lie(path: Path, **what: Any) -> Path:
    """The file with something else in it."""
    found = Portable.read(path)
    path = path.with_name("lie.still")
    replace(found, **what).write(path)
    return path


def test_a_file_cannot_name_its_model(
    make_agent: MakeAgent, tiny: FrozenModel, tmp_path: Path
) -> None:
    agent = make_agent(tmp_path / "s.db")
    state = talk(agent.session("x"), 2)[-1]
    agent.export("x", tmp_path / "x.still")
    named = tiny.identity.model_copy(update={"name": "GPT-9"})
    path = lie(tmp_path / "x.still", model=named)
    with MemoryStore(tmp_path / "t.db") as store:  # as the command line does it
        Portable.read(path).save(store)
        (info,) = store.sessions()
        assert info.model == f"unverified {tiny.identity.address[:12]}"
    there = make_agent(tmp_path / "t.db")
    chat = there.session("x")
    assert state_of(chat) == state and chat.send("Hello.", max_tokens=2).text is not None
    assert {info.model for info in there.sessions()} == {tiny.name}
    there.store.delete("x")
    Portable.read(path).save(there.store)
    assert {info.model for info in there.sessions()} == {tiny.name}  # by now it is known
    there.import_session(path, "y")
    assert {info.model for info in there.sessions()} == {tiny.name}


@pytest.mark.parametrize("where", ["ledger", "span"])
def test_token_ids_that_nobody_has_looked_at_are_checked_when_first_used(
    make_agent: MakeAgent, tmp_path: Path, where: str
) -> None:
    agent = make_agent(tmp_path / "s.db")
    talk(agent.session("x"), 2)
    agent.export("x", tmp_path / "x.still")
    found = Portable.read(tmp_path / "x.still")
    if where == "ledger":
        turns = [replace(found.turns[0], tokens=[4096]), *found.turns[1:]]
        path = lie(tmp_path / "x.still", turns=turns)
    else:
        *rest, last = found.checkpoint.entries
        span = replace(last.span, ids=(4096,) * last.span.tokens)
        entries = (*rest, replace(last, span=span))
        path = lie(tmp_path / "x.still", checkpoint=replace(found.checkpoint, entries=entries))
    there = make_agent(tmp_path / "t.db")
    Portable.read(path).save(there.store)
    Portable.read(tmp_path / "x.still").save(there.store, "honest")
    head = there.store.head("x")
    assert head is not None
    there.store.fork(head, "y", there.store.load(head))  # a fork is no way around
    for name in ("x", "y", "x"):
        with pytest.raises(DamageError, match="token ids that 'tiny"):
            there.session(name)
    assert there.session("honest").stats.turns == 4
    with pytest.raises(DamageError, match="token ids"):
        there.import_session(path, "z")


# -- against a plain model --------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d"])
WORDS = st.sampled_from(["One.", "Two. " + PROSE, "Three. " + PROSE * 3])


class Conversations(RuleBasedStateMachine):
    """Sends, reads, forks, rewinds, deletions and restarts, against lists of texts.

    A state depends on what was said and on nothing else: however a session has come to a list
    of turns, its bytes are those of the first one that had them.
    """

    make: Any
    path: Path

    @initialize(keep=st.integers(1, 3))
    def open(self, keep: int) -> None:
        for file in self.path.parent.glob(self.path.name + "*"):
            file.unlink()
        self.keep = keep
        self.said: dict[str, tuple[str, ...]] = {}
        self.seen: dict[tuple[str, ...], str] = {}
        self.restart()

    @rule()
    def restart(self) -> None:
        if hasattr(self, "agent"):
            self.agent.close()
        store = MemoryStore(self.path, keep_checkpoints=self.keep, synchronous="NORMAL")
        self.agent = self.make(store)

    @rule(name=NAMES, words=WORDS)
    def send(self, name: str, words: str) -> None:
        reply = self.agent.session(name).send(words, max_tokens=2)
        self.said[name] = (*self.said.get(name, ()), words, "reply:" + reply.text)

    @rule(name=NAMES, words=WORDS)
    def read(self, name: str, words: str) -> None:
        self.agent.session(name).read(words)
        self.said[name] = (*self.said.get(name, ()), words.strip())

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.said)))
        at = data.draw(st.integers(0, len(self.said[name])))
        self.agent.session(name).rewind(at)
        self.said[name] = self.said[name][:at]

    @precondition(lambda self: self.said)
    @rule(data=st.data(), new=NAMES)
    def fork(self, data: st.DataObject, new: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.said)))
        at = data.draw(st.integers(0, len(self.said[name])))
        chat = self.agent.session(name)
        if new in self.said:
            with pytest.raises(ConflictError):
                chat.fork(new, at)
        else:
            chat.fork(new, at)
            self.said[new] = self.said[name][:at]

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def rebuild(self, data: st.DataObject) -> None:
        chat = self.agent.rebuild(data.draw(st.sampled_from(sorted(self.said))))
        assert chat.restored is not None and chat.restored.faithful

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.said)))
        chat = self.agent.session(name)
        self.agent.delete(name)
        del self.said[name]
        with pytest.raises(UnknownSessionError):
            chat.history()

    @invariant()
    def all_is_as_it_was_said(self) -> None:
        if not hasattr(self, "agent"):
            return
        infos = {info.name: info for info in self.agent.sessions()}
        assert infos.keys() == self.said.keys()
        for name, said in self.said.items():
            turns = self.agent.store.history(name)
            told = tuple(("reply:" if t.role == "assistant" else "") + t.text for t in turns)
            assert told == said
            assert [t.number for t in turns] == list(range(1, len(said) + 1))
            head = self.agent.store.head(name)
            now = mark(self.agent.store.load(head))
            assert self.seen.setdefault(said, now) == now

    def teardown(self) -> None:
        if not hasattr(self, "agent"):
            return
        for name in self.said:
            self.agent.delete(name)
        stats = self.agent.store.stats()
        assert (stats.turns, stats.checkpoints, stats.spans) == (0, 0, 0)
        self.agent.close()


def test_any_order_of_verbs_is_as_in_a_plain_model(tiny: FrozenModel, tmp_path: Path) -> None:
    class Here(Conversations):
        path = tmp_path / "s.db"

        def make(self, store: MemoryStore) -> Agent:
            return Agent(tiny, Pooling(), store, budget=Budget(slots=64))

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=12, stateful_step_count=12, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_the_ephemeral_store_forks_and_rewinds_too(make_agent: MakeAgent) -> None:
    agent = make_agent(EphemeralStore())
    chat = agent.session("x", system="Brief.")
    states = talk(chat, 4)
    fork = chat.fork("y", at=5)
    assert state_of(fork) == states[2] and state_of(chat) == states[4]
    chat.rewind(7)
    assert state_of(chat) == states[3] and [t.number for t in chat.history()] == list(range(1, 8))
    chat.send("Else.", max_tokens=2)
    assert len(chat.history()) == 9 and len(fork.history()) == 5
    assert [m.number for m in fork.search("message 1")] == [4]
    assert [m.excerpt for m in chat.search("else")] == ["Else."] and not fork.search("else")
    agent.delete("x")
    with pytest.raises(UnknownSessionError):
        chat.send("Hello.")
    assert state_of(fork) == states[2]


def test_a_record_that_its_reader_changes_changes_nothing(make_agent: MakeAgent) -> None:
    agent = make_agent(EphemeralStore())
    chat = agent.session("x")
    chat.read(PROSE * 12)
    fork, before = chat.fork("y"), chat.history()
    for turn in chat.history():
        turn.tokens.append(7)
        turn.usage["steps"] = turn.usage.pop("steps", [])[:0]  # type: ignore[index]
    fork.history()[0].usage["steps"][0].append(7)  # type: ignore[index,union-attr]
    assert chat.history() == fork.history() == before and before[0].usage["steps"]
    chat.rewind(0)
    assert fork.history() == before
