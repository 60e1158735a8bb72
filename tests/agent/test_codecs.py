"""A lossy codec rounds what a session computes with, so that a resume changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from still_agent import InputError
from still_agent.models import FrozenModel, load_model
from still_memory.checkpoint import Checkpoint
from still_memory.codec import BITS
from still_memory.grids import rounded
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.test_fork import mark, state_of, talk
from tests.agent.test_rebuild import lived
from tests.agent.test_rolling import SCHEDULES, saved_and_loaded, some_ids
from tests.agent.test_rolling import state_of as rolling

LOSSY = sorted(BITS)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_state_computes_the_bits_of_one_that_never_stopped(
    tiny: FrozenModel, tmp_path: Path, schedule: str, codec: str
) -> None:
    def new() -> Any:
        return rolling(tiny, Pooling(), schedule=schedule, codec=codec)

    live, exact = new(), rolling(tiny, Pooling(), schedule=schedule)
    for state in (live, exact):
        state.extend(some_ids(75, seed=1))
        for token in some_ids(9, seed=2):
            state.step(token)
        assert state.compactions
    for turn in range(4):
        resumed = new()
        checkpoint = live.checkpoint()
        resumed.restore(saved_and_loaded(tiny, checkpoint, tmp_path / f"{turn}.db"))
        for layer, length in enumerate(live.cache.lengths):
            caches = (state.cache.raw(layer, 0, length) for state in (live, resumed))
            assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
        ids = some_ids(7, seed=10 + turn)
        logits = live.extend(ids)
        assert torch.equal(logits, resumed.extend(ids))
        assert not torch.equal(logits, exact.extend(ids))  # it is the rounded state that is read
        exact.checkpoint()
    assert live.compactions > 2


@pytest.mark.parametrize("codec", LOSSY)
def test_half_precision_resumes_bit_for_bit_too(
    tiny_folder: Path, tmp_path: Path, codec: str
) -> None:
    model = load_model(tiny_folder, device="cpu", dtype="bfloat16")
    live, resumed = (rolling(model, Pooling(), codec=codec) for _ in range(2))
    live.extend(some_ids(90, seed=1))
    resumed.restore(saved_and_loaded(model, live.checkpoint(), tmp_path / "s.db"))
    for turn in range(3):
        ids = some_ids(21, seed=10 + turn)
        assert torch.equal(live.extend(ids), resumed.extend(ids))
        live.checkpoint(), resumed.checkpoint()


@pytest.mark.parametrize("codec", LOSSY)
def test_a_state_holds_the_numbers_of_the_evaluations_rounding(
    tiny: FrozenModel, codec: str
) -> None:
    """Pinned prefix, memory and tail alike, each rounded once and as a span of its own."""
    exact, lossy = (rolling(tiny, Pooling(), codec=c) for c in ("exact", codec))
    first, near = (state.checkpoint() for state in (exact, lossy))
    (pinned,), (rounds,) = first.entries, near.entries
    for a, b in zip(pinned.span.layers, rounds.span.layers, strict=True):
        assert torch.equal(rounded(a.keys, BITS[codec], 1), b.keys)
        assert torch.equal(rounded(a.values, BITS[codec], 2), b.values)
        assert not torch.equal(a.keys, b.keys)
    lossy.extend(some_ids(200, seed=1))
    shares = {e.share: e.span for e in lossy.checkpoint().entries}
    assert set(shares) == {"pinned", "memory", "tail"}
    assert all(span.codec == codec and span.coded for span in shares.values())


@pytest.mark.parametrize("codec", LOSSY)
def test_a_session_goes_on_as_if_it_had_never_stopped(
    make_agent: MakeAgent, tmp_path: Path, codec: str
) -> None:
    def states(store: MemoryStore, stopping: bool) -> list[str]:
        found, agent = [], make_agent(store, compactor=Pooling())
        for n in range(6):
            talk(agent.session("x", system="Brief."), 1)
            found.append(state_of(agent.session("x")))
            if stopping and n % 2:
                agent.close()
                agent = make_agent(MemoryStore(store.path), compactor=Pooling())
        return found

    paths = (tmp_path / name for name in ("a.db", "b.db"))
    never, often = (
        states(MemoryStore(path, codec=codec), stopping)
        for path, stopping in zip(paths, (False, True), strict=True)
    )
    assert never == often and len(set(never)) == 6


@pytest.mark.parametrize("codec", LOSSY)
def test_rebuilt_with_the_codec_it_had_it_is_the_same_and_with_another_says_so(
    make_agent: MakeAgent, tmp_path: Path, codec: str
) -> None:
    store = MemoryStore(tmp_path / "s.db", codec=codec)
    agent = make_agent(store, compactor=Pooling())
    chat = lived(agent)
    state = state_of(chat)
    assert agent.rebuild("x") is chat and state_of(chat) == state
    assert mark(store.load(chat._head)) == state
    assert chat.restored is not None and chat.restored.faithful
    agent.close()
    again = make_agent(MemoryStore(tmp_path / "s.db", codec="exact"), compactor=Pooling())
    other = again.rebuild("x")
    assert state_of(other) != state
    assert other.restored is not None and "codec" in other.restored.differs
    assert again.rebuild("x").restored == other.restored.__class__(
        0, other.stats.logical_tokens, other.restored.compactions
    )


def test_what_was_exact_says_so_when_it_is_taken_in_rounded(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    """Also where nothing was compacted, and the ledger has not a word of codecs."""
    first = make_agent(MemoryStore(tmp_path / "s.db"), slots=256)
    talk(first.session("x"), 2)
    first.close()
    agent = make_agent(MemoryStore(tmp_path / "s.db", codec="int8"), slots=256)
    chat = agent.rebuild("x")
    assert chat.restored is not None and chat.restored.differs == ("codec",)
    assert chat.stats.memory == 0


def test_a_change_of_codec_leaves_old_spans_alone(make_agent: MakeAgent, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    for codec in (None, "int8", "int4"):
        agent = make_agent(MemoryStore(path, codec=codec), slots=512)
        talk(agent.session("x", system="Brief."), 1)
        store = agent.store
        head = store.head("x")
        assert head is not None
        loaded: Checkpoint = store.load(head)
        agent.close()
    codecs = [e.span.codec for e in loaded.entries]
    assert codecs == sorted(codecs, key=["exact", "int8", "int4"].index)
    assert set(codecs) == {"exact", "int8", "int4"}


def test_an_agent_without_a_file_has_codecs_too(make_agent: MakeAgent) -> None:
    from still_agent.ephemeral import EphemeralStore

    with pytest.raises(InputError, match="exact, int8, int4"):
        EphemeralStore("int3")
    agents = [make_agent(EphemeralStore(codec)) for codec in ("exact", "int4")]
    states = []
    for agent in agents:
        chat = agent.session("x")
        talk(chat, 2)
        states.append(state_of(chat))
    assert states[0] != states[1]
