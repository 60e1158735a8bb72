"""Training-free compactors, against stock attention and cases that can be worked out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import Qwen3ForCausalLM

from still_agent import Budget
from still_agent.compactor import choose_compactor
from still_agent.models import FrozenModel, frozen
from still_agent.rolling import RollingState
from still_memory.compactors import (
    TRAINING_FREE,
    AttentionMatchingCompactor,
    H2OCompactor,
    KVzipCompactor,
    RandomCompactor,
    SnapKVCompactor,
    StrideCompactor,
    looks,
)
from still_memory.compactors.looks import REQUEST
from still_memory.compactors.quantised import GROUP, QuantisedCompactor, rounded
from still_memory.errors import CompactorError
from still_memory.rotation import free, rotate
from still_memory.span import Span, raw_slots
from still_memory.store import MemoryStore
from tests.agent.conftest import Pooling

IDS = tuple(random.Random(0).sample(range(4000), 60))


def raw(model: FrozenModel, start: int, end: int) -> Span:
    """IDS[start:end] as read after those before them; not rotated."""
    cache = model.new_cache(end)
    model.forward(IDS[:end], cache, 0)
    layers = tuple(
        raw_slots(*(t.clone() for t in cache.raw(n, start, end)), start) for n in range(2)
    )
    return free(Span(start, end, layers, rotated_at=start, ids=IDS[start:end]), model.rope)


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> Qwen3ForCausalLM:
    """transformers' eager attention, which tells its weights."""
    return Qwen3ForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")


@torch.inference_mode()
def weights(stock: Qwen3ForCausalLM, ids: tuple[int, ...] | list[int]) -> list[Tensor]:
    """(H_kv, G, n, n) a layer."""
    out = stock(input_ids=torch.tensor([list(ids)]), output_attentions=True)
    return [w[0].unflatten(0, (2, -1)) for w in out.attentions]


def test_looks_are_the_stock_models_attention(
    tiny: FrozenModel, stock: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "BLOCK", 7)  # in parts that do not come out even
    monkeypatch.setattr(frozen, "LOOK", 9)
    before = [raw(tiny, 0, 25), raw(tiny, 25, 40)]
    for look, expected in zip(tiny.look(before, IDS[40:]), weights(stock, IDS), strict=True):
        found = torch.cat(list(look.weights()), dim=2)
        torch.testing.assert_close(found, expected[:, :, 40:], rtol=1e-4, atol=1e-5)


def test_h2o_averages_what_a_token_received_over_all_that_could_see_it(
    tiny: FrozenModel, stock: Qwen3ForCausalLM
) -> None:
    h2o = H2OCompactor(tiny)
    first = h2o.compact([raw(tiny, 0, 40)], 40)
    second = h2o.compact([first, raw(tiny, 40, 60)], 60)
    for slots, w in zip(second.layers, weights(stock, IDS), strict=True):
        expected = w.mean(1).sum(1) / torch.arange(60, 0, -1)
        assert slots.salience is not None
        torch.testing.assert_close(slots.salience, expected, rtol=1e-3, atol=1e-5)
        kept = h2o.compact([raw(tiny, 0, 60)], 20).layers[0].positions
    best = (weights(stock, IDS)[0].mean(1).sum(1) / torch.arange(60, 0, -1))[:, :50]
    for head, positions in enumerate(kept):
        heavy = best[head].topk(10).indices.sort().values
        assert positions.tolist() == [*heavy.tolist(), *range(50, 60)]


def test_snapkv_keeps_what_the_window_votes_for(tiny: FrozenModel, stock: Qwen3ForCausalLM) -> None:
    for window, count in ((8, 20), (24, 20)):  # the larger window has half of the slots
        kept = SnapKVCompactor(tiny, window=window).compact([raw(tiny, 0, 60)], count)
        newest = min(window, count // 2)
        for slots, w in zip(kept.layers, weights(stock, IDS), strict=True):
            votes = w[:, :, -window:, :-window].mean(2)
            pooled = avg_pool1d(votes, 5, stride=1, padding=2).mean(1)
            for head, positions in enumerate(slots.positions):
                best = pooled[head].topk(count - newest).indices.sort().values
                assert positions.tolist() == [*best.tolist(), *range(60 - newest, 60)]


def test_kvzip_scores_by_the_most_attention_in_repeating(
    tiny: FrozenModel, stock: Qwen3ForCausalLM
) -> None:
    kvzip = KVzipCompactor(tiny)
    span = kvzip.compact([raw(tiny, 0, 60)], 60)
    repeating = [*IDS, *tiny.encode(REQUEST), *IDS]
    for slots, w in zip(span.layers, weights(stock, repeating), strict=True):
        assert slots.salience is not None
        expected = w[:, :, 60:, :60].amax((1, 2))
        torch.testing.assert_close(slots.salience, expected, rtol=1e-3, atol=1e-5)
    later = kvzip.compact([span, raw(tiny, 0, 60)], 70)
    assert torch.equal(later.layers[0].salience.sort(1).values,  # type: ignore[union-attr]
                       torch.cat([span.layers[0].salience] * 2, 1)  # type: ignore[list-item]
                       .topk(70, dim=1).values.flip(1))  # fmt: skip


def test_attention_matching_with_room_for_all_changes_nothing(tiny: FrozenModel) -> None:
    span = raw(tiny, 0, 60)
    same = AttentionMatchingCompactor(tiny).compact([span], 60)
    for slots, before in zip(same.layers, span.layers, strict=True):
        assert torch.equal(slots.keys, before.keys)
        torch.testing.assert_close(slots.values, before.values, rtol=1e-4, atol=1e-4)
        assert slots.bias is not None
        torch.testing.assert_close(slots.bias, torch.zeros_like(slots.bias), atol=1e-4, rtol=0)


def test_attention_matching_answers_its_queries_as_the_whole_cache_does(
    tiny: FrozenModel,
) -> None:
    span, count = raw(tiny, 0, 60), 20
    short = AttentionMatchingCompactor(tiny).compact([span], count)
    repeating = tiny.look([span], [*tiny.encode(REQUEST), *IDS])
    for slots, look, before in zip(short.layers, repeating, span.layers, strict=True):
        queries = look.queries.unflatten(0, (2, -1)).flatten(1, 2) * 16**-0.5

        def answer(keys: Tensor, values: Tensor, bias: Tensor | float, shift: int) -> Tensor:
            at = torch.arange(keys.shape[1]) + float(shift)
            logits = queries @ rotate(keys, at, tiny.rope).mT + bias  # noqa: B023
            return logits.softmax(-1) @ values

        whole = answer(before.keys, before.values, 0.0, 0)
        assert slots.bias is not None
        fitted = answer(slots.keys, slots.values, slots.bias[:, None], 60 - count)
        row = torch.arange(2)[:, None]
        kept = before.values[row, slots.positions.long()]
        chosen = answer(slots.keys, kept, 0.0, 60 - count)
        assert (fitted - whole).norm() < 0.5 * (chosen - whole).norm()


@pytest.mark.parametrize("compactor", [RandomCompactor(), RandomCompactor(7), StrideCompactor()])
def test_what_stays_does_not_depend_on_the_number_of_rounds(
    tiny: FrozenModel, compactor: RandomCompactor | StrideCompactor
) -> None:
    at_once = compactor.compact([raw(tiny, 0, 60)], 10)
    by_and_by = compactor.compact([raw(tiny, 0, 20)], 10)
    for start in (20, 40):
        by_and_by = compactor.compact([by_and_by, raw(tiny, start, start + 20)], 10)
    kept = at_once.layers[0].positions
    assert torch.equal(kept, by_and_by.layers[0].positions) and by_and_by.rounds == 3
    if isinstance(compactor, StrideCompactor):
        assert kept[0].diff().max() <= 2 * kept[0].diff().min()
    assert RandomCompactor(1).compact([raw(tiny, 0, 60)], 10).layers[0].positions.tolist() != (
        kept.tolist()
    )


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
@pytest.mark.parametrize("name", TRAINING_FREE)
def test_every_method_runs_for_many_rounds_and_resumes_bit_for_bit(
    tiny: FrozenModel, name: str, schedule: Literal["rolling", "tiered"], tmp_path: Path
) -> None:
    rng = random.Random(3)
    ids = [rng.randrange(4000) for _ in range(400)]
    budget = Budget(slots=64, schedule=schedule, fan_in=2)  # merges compact spans alone
    state = RollingState(tiny, TRAINING_FREE[name](tiny), budget)
    state.pin(ids[:5])
    state.extend(ids[5:300])
    with MemoryStore(tmp_path / "s.db") as store:
        store.create("x", tiny.identity, checkpoint=state.checkpoint(), turns=[], settings={})
    with MemoryStore(tmp_path / "s.db") as store:
        head = store.head("x")
        assert head is not None
        saved = store.load(head)
    resumed = RollingState(tiny, TRAINING_FREE[name](tiny), budget)
    resumed.restore(saved)
    assert torch.equal(state.extend(ids[300:]), resumed.extend(ids[300:]))
    assert state.rounds > (10 if schedule == "rolling" else 1) and state.slots <= 64


@pytest.mark.parametrize("name", ["h2o", "snapkv", "kvzip", "attention-matching"])
def test_a_span_whose_tokens_are_not_known_is_refused(tiny: FrozenModel, name: str) -> None:
    span = replace(raw(tiny, 0, 20), ids=None)
    with pytest.raises(CompactorError, match=r'not known.*compactor="streaming"'):
        TRAINING_FREE[name](tiny).compact([span], 10)


def test_a_context_too_long_to_repeat_is_refused(tiny: FrozenModel) -> None:
    for compactor in (AttentionMatchingCompactor(tiny), KVzipCompactor(tiny)):
        with pytest.raises(CompactorError, match="smaller budget"):
            compactor.compact([raw(tiny, 0, 60)] * 9, 10)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_another_compactors_uneven_and_empty_slots_are_taken_in(
    tiny: FrozenModel, name: str
) -> None:
    pooled = Pooling().compact([raw(tiny, 0, 40)], 12)  # fewer in the last layer, one empty
    fresh = replace(raw(tiny, 0, 60).cut(40, 60))
    short = TRAINING_FREE[name](tiny).compact([pooled, fresh], 25)
    for slots in short.layers:
        assert slots.keys.isfinite().all() and slots.values.isfinite().all()
        assert slots.bias is not None and not slots.bias.isnan().any()
        assert slots.bias.isfinite().sum(1).min() >= min(25, len(slots) - 1)
    assert short.layers[0].bias is not None and short.layers[0].bias.isfinite().all()


# -- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_rounding_stays_within_half_a_step_of_each_group(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 70, 48, generator=generator) * torch.logspace(-2, 2, 48)
    for dim in (1, 2):
        parts = x.split(GROUP, dim)
        got = rounded(x, bits, dim).split(GROUP, dim)
        for part, near in zip(parts, got, strict=True):
            step = (part.amax(dim, keepdim=True) - part.amin(dim, keepdim=True)) / (2**bits - 1)
            assert ((part - near).abs() <= step / 2 * 1.001 + 1e-6).all()
            assert near.unique().numel() <= near.numel()
    assert rounded(x[:, :0], bits, 1).shape == (2, 0, 48)


def test_a_group_is_rounded_to_few_numbers() -> None:
    x = torch.randn(1, GROUP, 1, generator=torch.Generator().manual_seed(0))
    assert rounded(x, 4, 1).unique().numel() <= 16 < x.unique().numel()
    already = rounded(x, 4, 1)
    assert torch.allclose(rounded(already, 4, 1), already, atol=1e-6)


def test_rounding_leaves_the_choice_of_slots_alone_in_every_round(tiny: FrozenModel) -> None:
    plain = KVzipCompactor(tiny)
    round8 = QuantisedCompactor(plain, 8)
    kept = plain.compact([raw(tiny, 0, 40)], 20)
    near = round8.compact([raw(tiny, 0, 40)], 20)
    assert near.compactor == round8.identity.address != kept.compactor
    for _ in range(2):
        for a, b in zip(kept.layers, near.layers, strict=True):
            assert a.positions.equal(b.positions)
            assert not a.keys.equal(b.keys)
            assert torch.allclose(a.keys, b.keys, atol=0.05 * a.keys.abs().max().item())
        kept = plain.compact([kept, raw(tiny, 40, 60)], 24)
        near = round8.compact([near, raw(tiny, 40, 60)], 24)


def test_rounding_is_chosen_by_name(tiny: FrozenModel) -> None:
    chosen = choose_compactor("kvzip+int4", "tiny", tiny)
    assert chosen == QuantisedCompactor(KVzipCompactor(tiny), 4)
    with pytest.raises(CompactorError, match="there is no compactor 'gzip'"):
        choose_compactor("gzip+int4", "tiny", tiny)
    with pytest.raises(CompactorError, match="9 bits"):
        QuantisedCompactor(KVzipCompactor(tiny), 9)
