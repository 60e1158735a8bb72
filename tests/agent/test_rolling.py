"""Promises of the rolling state."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from still_agent.budget import Budget
from still_agent.evaluation.shares import SharedOut
from still_agent.events import Compaction
from still_agent.models import FrozenModel, load_model
from still_agent.rolling import RollingState
from still_memory.checkpoint import Checkpoint
from still_memory.compactors import KNormCompactor, StreamingCompactor
from still_memory.compactors.still import StillCompactor, StillConfig
from still_memory.errors import BudgetError, CompactorError, DamageError
from still_memory.rotation import free
from still_memory.span import Slots
from still_memory.store import MemoryStore
from tests.agent.conftest import Pooling

WINDOW = 512
SCHEDULES = ("rolling", "tiered", "append")
COMPACTORS = (StreamingCompactor(), KNormCompactor(), Pooling())


def some_ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4000) for _ in range(count)]


def state_of(
    model: FrozenModel, compactor: Any = None, *, slots: int = 64, schedule: Any = "rolling",
    **options: Any,
) -> RollingState:  # fmt: skip
    horizon = 2 * slots if schedule == "append" else None
    budget = Budget(slots=slots, schedule=schedule, horizon=horizon)
    state = RollingState(model, compactor or StreamingCompactor(), budget, **options)
    state.pin(some_ids(5, seed=99))
    return state


def stock_logits(model: FrozenModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(input_ids=torch.tensor([ids])).logits[0, -1].float()


def saved_and_loaded(model: FrozenModel, checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Through a real store, opened anew."""
    with MemoryStore(path) as store:
        store.create("x", model.identity, checkpoint=checkpoint, turns=[], settings={})
    with MemoryStore(path) as store:
        head = store.head("x")
        assert head is not None
        return store.load(head)


def test_without_compaction_logits_are_the_stock_models(tiny: FrozenModel) -> None:
    state = state_of(tiny, slots=256)
    ids = some_ids(200)
    logits = state.extend(ids)
    assert torch.allclose(logits, stock_logits(tiny, [*some_ids(5, seed=99), *ids]), atol=1e-4)


def test_many_small_messages_equal_one_large(tiny: FrozenModel) -> None:
    whole, parts = state_of(tiny, slots=256), state_of(tiny, slots=256)
    ids = some_ids(200)
    expected = whole.extend(ids)
    for low in range(0, 200, 37):
        logits = parts.extend(ids[low : low + 37])
        parts.checkpoint()
    assert torch.allclose(logits, expected, atol=1e-4)


def test_token_by_token_equals_prefill(tiny: FrozenModel) -> None:
    whole, steps = state_of(tiny, slots=256), state_of(tiny, slots=256)
    ids = some_ids(40)
    expected = whole.extend(ids)
    for token in ids:
        logits = steps.step(token)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_message_longer_than_the_budget_is_taken_in(tiny: FrozenModel) -> None:
    state = state_of(tiny)
    state.extend(some_ids(300))
    assert state.length == 305 and state.slots <= 64 and state.compactions > 5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("compactor", COMPACTORS, ids=lambda c: c.identity.method)
def test_a_restored_state_computes_the_same_bits(
    tiny: FrozenModel, tmp_path: Path, schedule: str, compactor: Any
) -> None:
    live = state_of(tiny, compactor, schedule=schedule)
    live.extend(some_ids(75, seed=1))
    for token in some_ids(9, seed=2):
        live.step(token)
    assert live.compactions
    checkpoint = live.checkpoint()
    resumed = state_of(tiny, compactor, schedule=schedule)
    resumed.restore(saved_and_loaded(tiny, checkpoint, tmp_path / "s.db"))
    assert resumed.slots == live.slots and resumed.length == live.length
    for turn in range(3):  # compactions of resumed memory among them
        ids = some_ids(11, seed=10 + turn)
        assert torch.equal(live.extend(ids), resumed.extend(ids))
        for token in ids[:3]:
            assert torch.equal(live.step(token), resumed.step(token))
        live.checkpoint(), resumed.checkpoint()
    for layer, length in enumerate(live.cache.lengths):
        for a, b in zip(
            live.cache.raw(layer, 0, length), resumed.cache.raw(layer, 0, length), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("placement", ["even", "salient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_still_and_bf16_resume_bit_for_bit_too(
    tiny_folder: Path, tmp_path: Path, dtype: str, placement: Any
) -> None:
    model = load_model(tiny_folder, device="cpu", dtype=dtype)
    config = StillConfig(layers=2, kv_heads=2, head_dim=16, placement=placement, beta=True)
    compactor = StillCompactor(config, model.identity).eval()
    live, resumed = (state_of(model, compactor, schedule="tiered") for _ in range(2))
    live.extend(some_ids(150, seed=1))
    resumed.restore(saved_and_loaded(model, live.checkpoint(), tmp_path / "s.db"))
    for turn in range(3):
        ids = some_ids(21, seed=10 + turn)
        logits = live.extend(ids)
        assert torch.isfinite(logits).all() and torch.equal(logits, resumed.extend(ids))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rolling_back_leaves_no_trace(tiny: FrozenModel, schedule: str) -> None:
    """The abandoned tokens outlast compactions and leave a bias behind in the cache."""
    straight = state_of(tiny, Pooling(), schedule=schedule)
    detour = state_of(tiny, Pooling(), schedule=schedule)
    for state in (straight, detour):
        state.extend(some_ids(40, seed=3))
        saved = state.checkpoint()
    detour.extend(some_ids(60, seed=4))
    assert detour.compactions
    detour.restore(saved)
    ids = some_ids(13, seed=5)
    assert torch.equal(straight.extend(ids), detour.extend(ids))


def test_positions_stay_bounded_over_twenty_windows(tiny: FrozenModel) -> None:
    budget = Budget(slots=WINDOW, chunk=160, schedule="tiered")
    state = RollingState(tiny, StreamingCompactor(), budget)
    state.pin(some_ids(5))
    while state.length < 20 * WINDOW:
        logits = state.extend(some_ids(1000, seed=state.length))
        assert state.slots <= WINDOW
        bases = [e.base for e in state.checkpoint().entries]
        assert bases == sorted(bases) and bases[-1] < WINDOW
    assert torch.isfinite(logits).all()


def test_a_placement_never_drifts(tiny: FrozenModel) -> None:
    """A raw slot moved many times is the slot moved once: from stored bytes, never from copies."""
    state = state_of(tiny)
    state.extend(some_ids(59, seed=6))
    (first,) = [e.span for e in state.checkpoint().entries if e.share == "tail"]
    held = [slots.keys.clone() for slots in first.layers]
    state.extend(some_ids(40, seed=7))
    assert state.compactions >= 2
    assert all(torch.equal(a, s.keys) for a, s in zip(held, first.layers, strict=True))


def test_the_lookahead_and_the_pinned_prefix_stay_raw(tiny: FrozenModel) -> None:
    state = state_of(tiny)
    state.extend(some_ids(500))
    for token in some_ids(50):
        state.step(token)
        shares = [(e.share, e.span.raw) for e in state.checkpoint().entries]
        assert shares[0] == ("pinned", True) and shares[1] == ("memory", False)
        assert state.shares["pinned"] == 5 and state.shares["tail"] >= 4


def test_each_compaction_is_told(tiny: FrozenModel) -> None:
    told: list[Compaction] = []
    state = state_of(tiny, on_compaction=told.append)
    state.extend(some_ids(200))
    assert len(told) == state.compactions
    assert [e.rounds for e in told] == list(range(1, len(told) + 1))
    assert all(e.slots_after < e.slots_before and e.seconds >= 0 for e in told)
    assert told[0].tokens_start == 5  # after the pinned prefix
    assert told[-1].tokens_end <= state.length - 4  # before the look-ahead


def test_held_bytes_do_not_grow(tiny: FrozenModel) -> None:
    state = state_of(tiny)
    held = []
    for _ in range(12):
        state.extend(some_ids(100))
        state.checkpoint()
        held.append(state.held_bytes)
    assert max(held[6:]) <= max(held[:6]) * 1.1


def test_a_budget_larger_than_the_window_is_refused(tiny: FrozenModel) -> None:
    with pytest.raises(BudgetError, match=f"slots={WINDOW} or fewer"):
        RollingState(tiny, StreamingCompactor(), Budget(slots=WINDOW + 1))


def test_a_prefix_that_leaves_no_room_is_refused_before_anything_runs(tiny: FrozenModel) -> None:
    state = RollingState(tiny, StreamingCompactor(), Budget(slots=64))
    with pytest.raises(BudgetError, match="pinned prefix of 50 tokens"):
        state.pin(some_ids(50))
    assert state.length == 0 and state.cache.length == 0


def test_a_state_too_large_for_a_smaller_budget_is_refused(tiny: FrozenModel) -> None:
    large = state_of(tiny, slots=128)
    large.extend(some_ids(100))
    small = state_of(tiny, slots=64)
    with pytest.raises(BudgetError, match="slots=105"):
        small.restore(large.checkpoint())


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
@pytest.mark.parametrize("slots", [64, 300])
def test_unequal_layers_stay_within_budget_memory_and_window(
    tiny: FrozenModel, schedule: str, slots: int, tmp_path: Path
) -> None:
    """The mean layer holds what the budget says, and no slot stands past the window."""
    compactor = SharedOut(KNormCompactor(), ((1.0, 1.0), (9.0, 9.0)))
    state = state_of(tiny, compactor, slots=slots, schedule=schedule)
    allocated = state.cache.nbytes
    largest = 0
    for ids in range(40):
        state.extend(some_ids(50, seed=ids))
        held = state.cache.lengths
        assert sum(held) <= 2 * state.slots <= 2 * slots
        assert max(held) <= state.position <= WINDOW
        largest = max(largest, held[1])
    assert state.cache.nbytes == allocated
    if schedule == "rolling":
        assert largest > slots if slots == 64 else largest > 0.8 * WINDOW
    elif slots == 300:  # spans of 64 slots are too small to be dealt out
        assert held[1] > 1.05 * held[0]
    saved = saved_and_loaded(tiny, state.checkpoint(), tmp_path / "s.db")
    resumed = state_of(tiny, compactor, slots=slots, schedule=schedule)
    resumed.restore(saved)
    more = some_ids(200, seed=77)
    assert torch.equal(state.extend(more), resumed.extend(more))


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
@pytest.mark.parametrize(("slots", "more"), [(160, 480), (192, 480), (224, 510), (288, 510)])
def test_a_larger_budget_takes_over_what_unequal_layers_held(
    tiny: FrozenModel, schedule: str, slots: int, more: int
) -> None:
    """The window is full before the budget is, and the session goes on."""
    compactor = SharedOut(KNormCompactor(), ((1.0, 1.0), (9.0, 9.0)))
    state = state_of(tiny, compactor, slots=slots)
    state.extend(some_ids(700))
    other = RollingState(tiny, compactor, Budget(slots=more, schedule=schedule))
    other.restore(state.checkpoint())
    for n in range(12):
        other.extend(some_ids(60, seed=n))
        assert other.slots <= more and max(other.cache.lengths) <= other.position <= WINDOW


def test_a_state_past_the_window_is_refused(tiny: FrozenModel) -> None:
    compactor = SharedOut(KNormCompactor(), ((1.0, 1.0), (9.0, 9.0)))
    state = state_of(tiny, compactor, slots=300)
    state.extend(some_ids(600))
    (pinned, memory, *rest) = state.checkpoint().entries
    layers = tuple(
        Slots(**{n: t.repeat_interleave(k, dim=1) for n, t in layer.tensors().items()})
        for layer, k in zip(memory.span.layers, (1, 2), strict=True)
    )
    wide = replace(memory, span=replace(memory.span, layers=layers))
    other = state_of(tiny, slots=510)
    with pytest.raises(DamageError, match="positions"):
        other.restore(Checkpoint((pinned, wide, *rest), state.length))


def test_a_compactor_that_breaks_its_promise_is_caught(tiny: FrozenModel) -> None:
    class TooLong(StreamingCompactor):
        def compact(self, spans: Any, slots: Any, longest: int | None = None) -> Any:
            return super().compact(spans, slots + 1)

    state = state_of(tiny, TooLong())
    saved = state.checkpoint()
    with pytest.raises(CompactorError, match="asked for"):
        state.extend(some_ids(200))
    state.restore(saved)
    assert state.length == 5


def test_selection_keeps_whole_slots_in_order(tiny: FrozenModel) -> None:
    state = state_of(tiny, slots=128)
    state.extend(some_ids(60))
    (raw,) = [e.span for e in state.checkpoint().entries if e.share == "tail"]
    for compactor in (StreamingCompactor(), KNormCompactor()):
        span = compactor.compact([free(raw, tiny.rope)], 16)
        assert len(span) == 16 and (span.start, span.end) == (raw.start, raw.end)
        for slots, source in zip(span.layers, raw.layers, strict=True):
            at = (slots.positions - raw.start).long()  # (H_kv, 16)
            assert (at.diff(dim=1) > 0).all()
            picked = source.values.gather(1, at[..., None].expand(-1, -1, 16))
            assert torch.equal(slots.values, picked)
    kept = StreamingCompactor().compact([free(raw, tiny.rope)], 16).layers[0].positions[0]
    expected = [0, 1, 2, 3, *range(48, 60)]
    assert (kept - raw.start).tolist() == expected


def test_selection_drops_empty_slots_first(tiny: FrozenModel) -> None:
    state = state_of(tiny, slots=128)
    state.extend(some_ids(60))
    (raw,) = [e.span for e in state.checkpoint().entries if e.share == "tail"]
    pooled = Pooling().compact([free(raw, tiny.rope)], 20)
    for compactor in (StreamingCompactor(), KNormCompactor()):
        bias = compactor.compact([pooled], 18).layers[0].bias
        assert bias is not None and torch.isfinite(bias).all()
