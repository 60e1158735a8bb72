"""Promises of the SDK."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from still_agent import Agent, Budget, Compaction, InputError, Sampling, Session
from still_agent.ephemeral import EphemeralStore
from still_agent.models import FrozenModel
from still_agent.text import PART, parts
from still_memory.compactors import StreamingCompactor
from still_memory.errors import ConflictError, IdentityError, UnknownSessionError
from still_memory.records import Head, NewTurn
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent
from tests.agent.scripted import Scripted

PROSE = "The wind rose. The sea was grey and long. Nobody spoke.\n\n"


def next_logits(chat: Session) -> torch.Tensor:
    """What the model would say next, and the state as it was."""
    logits = chat._state.extend(chat._tokenizer.message("user", "And now?"))
    chat._put_back()
    return logits


def scripted(tiny: FrozenModel, *replies: Sequence[int], **sampling: Any) -> Agent:
    model = Scripted(tiny, replies)
    options = Sampling(**{"max_tokens": 12, **sampling})
    return Agent(
        model, StreamingCompactor(), EphemeralStore(), budget=Budget(slots=128), sampling=options
    )


# -- the example of the README ----------------------------------------------------------------


def test_the_ten_lines_of_the_readme(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with Agent.load(
        tiny_folder, store=path, budget=Budget(slots=256), compactor="streaming", device="cpu"
    ) as agent:
        chat = agent.session("alice", system="You are brief.")
        reply = chat.send("My sister Ana lives in Porto.", max_tokens=5)
        pieces = list(chat.stream("Where does my sister live?", max_tokens=5))
        assert "".join(pieces) == chat.last_reply.text
        assert reply.text and reply.usage.generated_tokens == 5
        usage, stats = chat.last_reply.usage, chat.stats
        assert stats.logical_tokens == sum(
            (usage.reused_tokens, usage.prefilled_tokens, usage.generated_tokens)
        )
        assert stats.slots == stats.logical_tokens and stats.turns == 5 and stats.rounds == 0
        assert stats.full_bytes == stats.logical_tokens * agent.model.bytes_per_slot
        assert stats.held_bytes >= 256 * agent.model.bytes_per_slot
        turns = chat.history()
        assert [t.role for t in turns] == ["system", "user", "assistant", "user", "assistant"]
        assert turns[1].text == "My sister Ana lives in Porto."
        start = len(agent.model.tokenizer.start)
        assert sum(len(t.tokens) for t in turns) + start == stats.logical_tokens
        assert [t.parent for t in turns] == [None, *(t.id for t in turns[:-1])]
        (info,) = agent.sessions()
        assert (info.name, info.turns, info.tokens) == ("alice", 5, stats.logical_tokens)
    with Agent.load(
        tiny_folder, store=path, budget=Budget(slots=256), compactor="streaming", device="cpu"
    ) as agent:
        chat = agent.session("alice")
        assert chat.stats == stats and len(chat.history()) == 5
        assert chat.send("And?").usage.reused_tokens == stats.logical_tokens


# -- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
def test_resumed_logits_are_bit_equal(make_agent: MakeAgent, tmp_path: Path, schedule: str) -> None:
    stopping = make_agent(tmp_path / "s.db", schedule=schedule)
    steady = make_agent(schedule=schedule).session("x", system="Brief.")
    for turn in range(5):
        chat = stopping.session("x", system="Brief.")
        message = f"Message {turn}: " + PROSE
        assert chat.send(message).text == steady.send(message).text
        assert torch.equal(next_logits(chat), next_logits(steady))
        stopping.close()
        stopping = make_agent(tmp_path / "s.db", schedule=schedule)
    chat = stopping.session("x")
    assert chat.stats.rounds and torch.equal(next_logits(chat), next_logits(steady))


def test_a_resume_prefills_nothing_of_the_history(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    with agent.session("x") as chat:
        chat.read(PROSE * 20)
        tokens = chat.stats.logical_tokens
    usage = agent.session("x").send("Hi.", max_tokens=1).usage
    assert usage.reused_tokens == tokens and usage.prefilled_tokens < 12


def test_one_live_object_a_session(make_agent: MakeAgent) -> None:
    agent = make_agent()
    chat = agent.session("x")
    assert agent.session("x") is chat
    chat.close()
    assert agent.session("x") is not chat


def test_another_system_prompt_is_refused(make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.session("x", system="You are brief.")
    assert agent.session("x", system="You are brief.") is agent.session("x")
    with pytest.raises(InputError, match="choose another session id"):
        agent.session("x", system="You are long.")


def test_a_session_of_another_model_is_refused_before_a_tensor_is_read(
    make_agent: MakeAgent, tiny: FrozenModel, tmp_path: Path
) -> None:
    other = tiny.identity.model_copy(update={"weights": "0" * 64, "name": "other"})
    with MemoryStore(tmp_path / "s.db") as store:
        with make_agent() as agent:
            checkpoint = agent.session("x")._saved
        store.create("x", other, checkpoint=checkpoint, turns=[], settings={"system": None})
        with store._file.writing() as conn:  # reading a tensor would be DamageError
            conn.execute("update span_layers set data = x'00'")
    with pytest.raises(IdentityError, match=r"weights differ.*agent.rebuild"):
        make_agent(tmp_path / "s.db").session("x")


# -- streams ----------------------------------------------------------------------------------


def test_a_stream_left_early_is_undone(make_agent: MakeAgent, tmp_path: Path) -> None:
    chat = make_agent(tmp_path / "s.db").session("x")
    chat.send(PROSE)
    before, stats, reply = next_logits(chat), chat.stats, chat.last_reply
    for _ in chat.stream(PROSE * 3, max_tokens=40):
        break
    assert chat.stats == stats and chat.last_reply is reply and len(chat.history()) == 2
    assert torch.equal(next_logits(chat), before)


def test_a_new_turn_abandons_a_stream_that_is_still_held(make_agent: MakeAgent) -> None:
    chat, steady = make_agent().session("x"), make_agent().session("x")
    stream = chat.stream("One.")
    next(stream)
    assert chat.send("Two.").text == steady.send("Two.").text
    assert [t.text for t in chat.history() if t.role == "user"] == ["Two."]
    with pytest.raises(InputError, match="abandoned"):
        next(stream)
    assert chat.stats == steady.stats


def test_the_last_piece_comes_after_the_commit(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    saved = []
    for _ in chat.stream("Hello.", max_tokens=6):
        saved.append(len(chat.history()))
    assert saved[-1] == 2 and set(saved[:-1]) == {0}


def test_leaving_after_the_last_piece_keeps_the_turn(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    pieces = len(list(chat.stream("Hello.", max_tokens=6)))
    stream = chat.stream("Hello.", max_tokens=6)
    for _ in range(pieces):
        next(stream)
        if len(chat.history()) == 4:
            break
    del stream
    gc.collect()
    assert len(chat.history()) == 4


def test_a_stream_that_is_never_begun_does_nothing(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    chat.stream("Hello.").close()
    chat.stream("Hello.")
    assert chat.history() == []


def test_bad_input_is_told_when_a_stream_is_asked_for(make_agent: MakeAgent) -> None:
    with pytest.raises(InputError):
        make_agent().session("x").stream("  ")


# -- all or nothing ---------------------------------------------------------------------------


def test_ctrl_c_in_mid_reply_undoes_the_turn(make_agent: MakeAgent, tmp_path: Path) -> None:
    """A real SIGINT, when the reply has gone on for long enough to be compacted itself."""
    told: list[Compaction] = []

    def interrupt(event: Compaction) -> None:
        told.append(event)
        if event.tokens_start < 40 < event.tokens_end - 60:
            signal.raise_signal(signal.SIGINT)

    chat = make_agent(tmp_path / "s.db", on_compaction=interrupt).session("x")
    chat.send(PROSE)
    before, stats = next_logits(chat), chat.stats
    # a shell's background job, which tests may be, has SIGINT ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            chat.send("Go on for ever.", max_tokens=10**6)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert len(told) > 1 and chat.stats == stats and len(chat.history()) == 2
    assert torch.equal(next_logits(chat), before)
    assert chat.send("Again.").usage.reused_tokens == stats.logical_tokens


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_ctrl_c_in_the_commit_leaves_what_the_store_holds(
    make_agent: MakeAgent, tmp_path: Path, late: bool
) -> None:
    class Interrupted(MemoryStore):
        armed = False

        def commit(self, *arguments: Any) -> Any:
            head = super().commit(*arguments) if late or not self.armed else None
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt
            return head

    store = Interrupted(tmp_path / "s.db")
    chat = make_agent(store).session("x")
    chat.send("One.")
    store.armed = True
    with pytest.raises(KeyboardInterrupt):
        chat.send("Two.")
    assert chat.stats.turns == len(chat.history()) == (4 if late else 2)
    resumed = make_agent(tmp_path / "s.db").session("x")
    assert torch.equal(next_logits(chat), next_logits(resumed))
    assert chat.send("Three.").text


def test_a_callback_that_raises_undoes_the_turn(make_agent: MakeAgent) -> None:
    told: list[Compaction] = []

    def observe(event: Compaction) -> None:
        told.append(event)
        if len(told) == 2:
            raise RuntimeError("observer")

    chat = make_agent(on_compaction=observe).session("x")
    with pytest.raises(RuntimeError, match="observer"):
        chat.send(PROSE * 8)
    assert chat.history() == [] and chat.stats.logical_tokens == 1
    assert chat.send(PROSE * 8).usage.compactions == len(told) - 2


def test_a_callback_cannot_begin_a_turn(make_agent: MakeAgent) -> None:
    agent = make_agent(on_compaction=lambda event: agent.session("x").send("Me too."))
    chat = agent.session("x")
    with pytest.raises(InputError, match="callback"):
        chat.read(PROSE * 8)
    assert chat.history() == []


def test_a_callback_may_look(make_agent: MakeAgent) -> None:
    seen = []
    agent = make_agent(on_compaction=lambda event: seen.append(agent.session("x").stats.slots))
    chat = agent.session("x")
    chat.read(PROSE * 8)
    assert seen and max(seen) < 64


# -- reading ----------------------------------------------------------------------------------


def test_a_long_read_is_saved_as_it_goes(make_agent: MakeAgent, tmp_path: Path) -> None:
    told: list[Compaction] = []

    def stop(event: Compaction) -> None:
        told.append(event)
        if event.tokens_end > 1.5 * PART:
            raise KeyboardInterrupt

    agent = make_agent(tmp_path / "s.db", slots=512, on_compaction=stop)
    chat = agent.session("x")
    with pytest.raises(KeyboardInterrupt):
        chat.read(PROSE * 500)
    (turn,) = chat.history()
    assert PART * 0.9 < len(turn.tokens) <= PART + 2
    assert turn.text.startswith("The wind") and turn.text.endswith("spoke.")
    resumed = make_agent(tmp_path / "s.db", slots=512).session("x")
    assert torch.equal(next_logits(chat), next_logits(resumed))


def test_parts_are_the_text(tiny: FrozenModel) -> None:
    encode = tiny.tokenizer.encode
    text = (PROSE * 30 + "word " * 400 + "\n" + "x" * 3000 + "終わり。" * 100).strip()
    cut = list(parts(text, encode, limit=64))
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert max(len(encode(part)) for part in cut) <= 64 + 4
    assert list(parts(PROSE, encode)) == [PROSE.strip()]


def test_read_tells_what_it_cost(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    usage = chat.read(PROSE * 8)
    assert usage.generated_tokens == 0 and usage.compactions > 0
    assert usage.prefilled_tokens == chat.stats.logical_tokens - usage.reused_tokens
    assert [t.role for t in chat.history()] == ["user"]


# -- replies ----------------------------------------------------------------------------------


def test_reasoning_leaves_memory_after_its_turn(tiny: FrozenModel) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.think is not None
    opens, closes = tokenizer.think
    thought, said = tokenizer.encode("Let me see."), tokenizer.encode(" In Porto.")
    (end,) = tokenizer.eos_ids
    chat = scripted(tiny, [opens, *thought, closes, *said, end]).session("x")
    plain = scripted(tiny, [*said, end]).session("x")
    pieces = list(chat.stream("Where?", max_tokens=40))
    reply = chat.last_reply
    assert reply is not None
    assert "".join(pieces) == reply.text == plain.send("Where?", max_tokens=40).text == " In Porto."
    assert reply.reasoning == "Let me see." and reply.finish == "stop"
    assert chat.stats.logical_tokens == plain.stats.logical_tokens
    assert opens in chat.history()[-1].tokens  # the ledger keeps it
    assert torch.allclose(next_logits(chat), next_logits(plain), atol=1e-4)


def test_reasoning_that_outgrows_the_budget_leaves_no_trace(tiny: FrozenModel) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer.think is not None
    opens, closes = tokenizer.think
    said, (end,) = tokenizer.encode(" In Porto."), tokenizer.eos_ids
    chat = scripted(tiny, [opens, *[7] * 300, closes, *said, end]).session("x")
    reply = chat.send("Where?", max_tokens=400)
    assert reply.text == " In Porto." and reply.usage.compactions > 0
    assert chat.stats.rounds == 0 and chat.stats.logical_tokens < 20


@pytest.mark.parametrize("stop", [" Porto", "Por", ("xyz", "rto."), "o."])
def test_a_reply_ends_before_a_stop_string(tiny: FrozenModel, stop: Any) -> None:
    tokenizer = tiny.tokenizer
    body = tokenizer.encode(" She lives in Porto. Yes.")
    chat = scripted(tiny, body).session("x")
    pieces = list(chat.stream("Where?", stop=stop, max_tokens=40))
    stops = (stop,) if isinstance(stop, str) else stop
    expected = min((" She lives in Porto. Yes.".split(s)[0] for s in stops), key=len)
    reply, turn = chat.last_reply, chat.history()[-1]
    assert reply is not None
    assert "".join(pieces) == reply.text == turn.text == expected and reply.finish == "stop"
    plain = scripted(tiny, [*tokenizer.encode(expected), *tokenizer.eos_ids]).session("x")
    plain.send("Where?")
    assert torch.allclose(next_logits(chat), next_logits(plain), atol=1e-4)


def test_a_stop_string_that_never_comes_holds_nothing_back(tiny: FrozenModel) -> None:
    tokenizer = tiny.tokenizer
    chat = scripted(tiny, [*tokenizer.encode(" In Porto"), *tokenizer.eos_ids]).session("x")
    assert chat.send("Where?", stop="Portobello").text == " In Porto"


def test_characters_of_many_tokens_arrive_whole(tiny: FrozenModel) -> None:
    tokenizer = tiny.tokenizer
    text = " 終わり 🦉 é"
    chat = scripted(tiny, [*tokenizer.encode(text), *tokenizer.eos_ids]).session("x")
    pieces = list(chat.stream("Say it.", max_tokens=60))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_an_empty_reply_is_a_reply(tiny: FrozenModel) -> None:
    chat = scripted(tiny, list(tiny.tokenizer.eos_ids)).session("x")
    assert list(chat.stream("Say nothing.")) == []
    assert chat.last_reply is not None and chat.last_reply.text == ""
    assert len(chat.history()) == 2


def test_sampling_is_greedy_by_default_and_seeded_on_demand(make_agent: MakeAgent) -> None:
    def reply(**options: Any) -> str:
        with make_agent() as agent:
            return agent.session("x").send("Hello.", **options).text

    assert reply() == reply()
    hot = {"temperature": 5.0, "seed": 1}
    assert reply(**hot) == reply(**hot) != reply(temperature=5.0, seed=2)
    assert reply(temperature=5.0, top_p=1e-9, seed=3) == reply()


def test_sampling_of_the_agent_and_of_one_call(make_agent: MakeAgent) -> None:
    chat = make_agent(sampling=Sampling(max_tokens=3)).session("x")
    assert chat.send("Hello.").usage.generated_tokens == 3
    assert chat.send("Hello.", max_tokens=7).usage.generated_tokens == 7
    assert chat.last_reply is not None and chat.last_reply.finish == "length"
    with pytest.raises(InputError, match="there is no such option"):
        chat.send("Hello.", tokens=7)


# -- threads and async ------------------------------------------------------------------------


async def test_async_turns_wait_for_each_other(make_agent: MakeAgent, tmp_path: Path) -> None:
    chat = make_agent(tmp_path / "s.db").session("x")
    replies = await asyncio.gather(*(chat.asend(f"Message {i}.") for i in range(4)))
    assert len({id(r) for r in replies}) == 4 and len(chat.history()) == 8
    assert sorted(r.usage.reused_tokens for r in replies)[0] == 1
    pieces = [piece async for piece in chat.astream("Last.")]
    assert chat.last_reply is not None and "".join(pieces) == chat.last_reply.text


async def test_an_async_stream_left_early_is_undone(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    stream = chat.astream("Hello.", max_tokens=10**6)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert chat.history() == [] and chat.stats.logical_tokens == 1


async def test_a_cancelled_send_is_undone(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(chat.asend("Hello.", max_tokens=10**6), 0.3)
    assert chat.history() == [] and chat.stats.logical_tokens == 1


async def test_async_errors_arrive(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    with pytest.raises(InputError):
        await chat.asend("")
    with pytest.raises(InputError, match="no role"):
        await chat.asend("Hi.", role="stranger")


def test_threads_that_begin_a_session_at_once_share_one_object(tiny: FrozenModel) -> None:
    made, found = threading.Event(), threading.Event()

    class Slow(EphemeralStore):
        """Comes back from making a session only when another thread has found it."""

        def create(self, *args: Any, **kwargs: Any) -> Head:
            head = super().create(*args, **kwargs)
            made.set()
            assert found.wait(30)
            return head

    agent = Agent(tiny, StreamingCompactor(), Slow(), budget=Budget(slots=128))
    opened: list[Session] = []
    maker = threading.Thread(target=lambda: opened.append(agent.session("alice")))
    maker.start()
    assert made.wait(30)
    opened.append(agent.session("alice"))
    found.set()
    maker.join()
    assert opened[0] is opened[1]


def test_threads_take_turns(make_agent: MakeAgent) -> None:
    chat = make_agent().session("x")
    threads = [threading.Thread(target=chat.send, args=[f"Message {i}."]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chat.history()) == 8


# -- the store and its end --------------------------------------------------------------------


def test_closed_means_closed(make_agent: MakeAgent) -> None:
    with make_agent() as agent:
        with agent.session("x") as chat:
            stream = chat.stream("Hello.")
            next(stream)
        with pytest.raises(InputError, match="closed"):
            chat.send("Hello.")
        with pytest.raises(InputError, match="closed"):
            _ = chat.stats
        assert agent.session("x").history() == []
        chat.close()  # twice is fine


def test_a_deleted_session_is_gone(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    chat.send("Hello.")
    agent.delete("x")
    assert agent.sessions() == []
    with pytest.raises(UnknownSessionError, match="deleted"):
        chat.send("Hello.")
    with pytest.raises(UnknownSessionError):
        agent.delete("x")
    assert agent.session("x").history() == []


def test_the_files_tensors_do_not_grow_without_end(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent(tmp_path / "s.db")
    chat = agent.session("x")
    sizes = []
    for _ in range(10):
        chat.send(PROSE * 2)
        sizes.append(agent.store.stats().span_bytes)  # type: ignore[attr-defined]
    assert max(sizes[5:]) <= 1.2 * max(sizes[:5])


def test_an_ephemeral_store_keeps_the_stores_promises(tiny: FrozenModel) -> None:
    store = EphemeralStore()
    agent = Agent(tiny, StreamingCompactor(), store, budget=Budget(slots=64))
    chat = agent.session("x", system="Brief.")
    old = store.head("x")
    assert old is not None
    chat.send("Hello.", max_tokens=2)
    with pytest.raises(ConflictError):
        store.commit(old, chat._saved, [NewTurn("user", "late", [1])])
    assert [t.number for t in store.history("x")] == [1, 2, 3]
    with pytest.raises(UnknownSessionError):
        store.history("y")
