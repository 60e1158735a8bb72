"""Training-free compactors, against stock attention and cases that can be worked out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import Qwen3ForCausalLM

from still_agent import Budget
from still_agent.compactor import choose_compactor
from still_agent.evaluation.shares import SharedOut
from still_agent.models import FrozenModel, frozen, load_model
from still_agent.rolling import RollingState
from still_memory.compactors import (
    TRAINING_FREE,
    AttentionMatchingCompactor,
    Compactor,
    H2OCompactor,
    KVzipCompactor,
    RandomCompactor,
    SnapKVCompactor,
    StrideCompactor,
    looks,
)
from still_memory.compactors.attention_matching import Keys
from still_memory.compactors.looks import REQUEST, Looks
from still_memory.compactors.matching_pursuit import pursued
from still_memory.compactors.quantised import QuantisedCompactor
from still_memory.errors import CompactorError
from still_memory.grids import GROUP, rounded
from still_memory.rotation import free, rotate, unrotate
from still_memory.shares import Counts
from still_memory.span import Slots, Span, raw_slots
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


OPTIONS: list[dict[str, Any]] = [
    {"keys": "attention", "on_policy": False},
    {"keys": "pursuit", "on_policy": False},
    {"on_policy": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_matching_with_room_for_all_changes_nothing(
    tiny: FrozenModel, options: dict[str, Any]
) -> None:
    span = raw(tiny, 0, 60)
    same = AttentionMatchingCompactor(tiny, **options).compact([span], 60)
    for slots, before in zip(same.layers, span.layers, strict=True):
        assert torch.equal(slots.keys, before.keys)
        torch.testing.assert_close(slots.values, before.values, rtol=1e-4, atol=1e-4)
        assert slots.bias is not None
        torch.testing.assert_close(slots.bias, torch.zeros_like(slots.bias), atol=1e-4, rtol=0)


@dataclass
class Fit:
    """What reference queries get of a span's layer, and of what it was made of."""

    mass: Tensor  # (H_kv, n) of the short one beyond the whole one's, in tokens like the best
    error: float  # of the attention's output
    chosen: float  # the same, were the chosen slots neither biased nor fitted


def fit(model: FrozenModel, span: Span, short: Span, layer: int) -> Fit:
    look = model.look([span], [*model.encode(REQUEST), *(span.ids or ())])[layer]
    queries = look.queries.unflatten(0, (model.kv_heads, -1)).flatten(1, 2) * model.head_dim**-0.5

    def logits(slots: Slots) -> Tensor:
        at = torch.arange(len(slots)) + float(len(span) - len(short))
        return queries @ rotate(slots.keys, at, model.rope).mT

    before, slots = span.layers[layer], short.layers[layer]
    assert slots.bias is not None
    exact, bare = logits(before), logits(slots)
    fitted = bare + slots.bias[:, None]
    whole = exact.softmax(-1) @ before.values
    kept = before.values[torch.arange(model.kv_heads)[:, None], slots.positions.long()]
    top = exact.amax(-1)
    return Fit(
        (fitted.logsumexp(-1) - top).exp() - (exact.logsumexp(-1) - top).exp(),
        (fitted.softmax(-1) @ slots.values - whole).norm().item(),
        (bare.softmax(-1) @ kept - whole).norm().item(),
    )


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_attention_matching_answers_its_queries_as_the_whole_cache_does(
    tiny: FrozenModel, options: dict[str, Any]
) -> None:
    span = raw(tiny, 0, 60)
    short = AttentionMatchingCompactor(tiny, **options).compact([span], 20)
    for layer in range(2):
        found = fit(tiny, span, short, layer)
        assert found.error < 0.6 * found.chosen


def test_matching_pursuit_picks_what_a_search_of_all_picks() -> None:
    one, two, three = torch.eye(5)[:3]
    head = torch.stack([4 * one, 4 * one, 4 * one, 3 * two, two, 2 * three + one], dim=1)
    columns = torch.stack([head, head.flip(1)])  # three of the largest are all alike
    for part, picks in zip(columns, pursued(columns, 3, (0.0, torch.inf)).tolist(), strict=True):
        whole = part.sum(1, keepdim=True)
        left = {
            chosen: (whole - part[:, chosen] @ torch.linalg.pinv(part[:, chosen]) @ whole).norm()
            for chosen in combinations(range(6), 3)
        }
        assert left[tuple(sorted(picks))] < min(left.values()) + 1e-4 < max(left.values())


def test_matching_pursuit_keeps_more_of_the_mass_on_the_reference_model() -> None:
    model = load_model("reference", dtype="float32")
    ids = tuple(
        model.encode("Ana lives in Porto. Her boat is red. The code of the gate is 4711. " * 4)
    )
    cache = model.new_cache(len(ids))
    model.forward(ids, cache, 0)
    layers = [raw_slots(*cache.raw(n, 0, len(ids)), 0) for n in range(model.layers)]
    span = free(Span(0, len(ids), tuple(layers), rotated_at=0, ids=ids), model.rope)
    off = {}
    rules: tuple[Keys, ...] = ("attention", "pursuit")
    for keys in rules:
        matching = AttentionMatchingCompactor(model, keys=keys, on_policy=False)
        short = matching.compact([span], len(ids) // 8)
        fits = [fit(model, span, short, n) for n in range(model.layers)]
        off[keys] = torch.cat([f.mass for f in fits]).square().mean().item()
    assert off["pursuit"] < off["attention"]


def test_queries_on_policy_are_those_that_the_short_layers_below_give(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, repeating = raw(tiny, 0, 60), [*tiny.encode(REQUEST), *IDS]
    looked: list[list[Looks]] = []

    def look(self: FrozenModel, before: Sequence[Span], ids: Sequence[int]) -> list[Looks]:
        looked.append(read(self, before, ids))
        return looked[-1]

    read = FrozenModel.look
    monkeypatch.setattr(FrozenModel, "look", look)
    short = AttentionMatchingCompactor(tiny, on_policy=True).compact([span], 20)
    assert len(looked) == 2  # once for each layer

    def queries(look: Looks, held: int) -> Tensor:
        at = torch.arange(held, held + len(repeating), dtype=torch.float32)
        return unrotate(look.queries, at, tiny.rope)

    fitted, wanted = queries(looked[1][1], 60), queries(read(tiny, [short], repeating)[1], 20)
    torch.testing.assert_close(fitted, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(queries(looked[0][1], 60), wanted, rtol=1e-1, atol=1e-1)
    off = AttentionMatchingCompactor(tiny, on_policy=False).compact([span], 20)
    assert torch.equal(off.layers[0].values, short.layers[0].values)
    assert not torch.equal(off.layers[1].values, short.layers[1].values)


@pytest.mark.parametrize("on_policy", [False, True])
def test_heads_hold_their_counts(tiny: FrozenModel, on_policy: bool) -> None:
    matching = AttentionMatchingCompactor(tiny, on_policy=on_policy)
    span = raw(tiny, 0, 60)
    short = matching.compact([span], [[20, 5], [10, 15]])
    assert [len(slots) for slots in short.layers] == [20, 15]
    assert (len(short), short.slots) == (20, 18)
    filled = [s.bias.isfinite().sum(1).tolist() for s in short.layers]  # type: ignore[union-attr]
    assert filled == [[20, 5], [10, 15]]
    for layer in range(2):
        found = fit(tiny, span, short, layer)
        assert found.error < found.chosen
    later = matching.compact([short, raw(tiny, 0, 60)], [[24, 6], [12, 18]])
    filled = [s.bias.isfinite().sum(1).tolist() for s in later.layers]  # type: ignore[union-attr]
    assert filled == [[24, 6], [12, 18]]


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_every_method_takes_a_count_for_each_head(tiny: FrozenModel, name: str) -> None:
    compactor = TRAINING_FREE[name](tiny)
    short = compactor.compact([raw(tiny, 0, 30)], [[6, 3], [20, 20]])
    short = compactor.compact([short, raw(tiny, 30, 60)], [[7, 3], [24, 24]])
    assert [len(slots) for slots in short.layers] == [7, 24]
    (uneven, even) = short.layers
    assert uneven.bias is not None and uneven.bias.isfinite().sum(1).tolist() == [7, 3]
    assert even.bias is None or even.bias.isfinite().all()
    for slots in short.layers:
        assert (slots.positions[0].diff() > 0).all()


@pytest.mark.parametrize("counts", [[[1, 1]], [[1], [1]], [[1, 1], [0, 1]], 0])
def test_counts_of_another_model_are_refused(tiny: FrozenModel, counts: Counts | int) -> None:
    for name in TRAINING_FREE:
        with pytest.raises(CompactorError, match=r"one number a KV head|one or more"):
            TRAINING_FREE[name](tiny).compact([raw(tiny, 0, 60)], counts)


def test_every_option_that_changes_slots_is_part_of_the_identity(tiny: FrozenModel) -> None:
    options = {"keys": "pursuit", "ridge": 0.5, "queries": 64, "on_policy": False,
               "questions": (1, 2, 3)}  # fmt: skip
    fields = {f.name for f in dataclass_fields(AttentionMatchingCompactor)} - {"reader"}
    assert fields == {*options}
    made = [AttentionMatchingCompactor(tiny, **{k: v}) for k, v in options.items()]  # type: ignore[arg-type]
    assert len({c.identity.address for c in [AttentionMatchingCompactor(tiny), *made]}) == 6


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


MADE: dict[str, Callable[[FrozenModel], Compactor]] = {
    **TRAINING_FREE,
    "pursuit, uneven": lambda model: SharedOut(
        AttentionMatchingCompactor(model, keys="pursuit"), ((4.0, 1.0), (2.0, 3.0))
    ),
    "kvzip, uneven": lambda model: SharedOut(KVzipCompactor(model), ((1.0, 1.0), (9.0, 9.0))),
}


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
@pytest.mark.parametrize("name", MADE)
def test_every_method_runs_for_many_rounds_and_resumes_bit_for_bit(
    tiny: FrozenModel, name: str, schedule: Literal["rolling", "tiered"], tmp_path: Path
) -> None:
    rng = random.Random(3)
    ids = [rng.randrange(4000) for _ in range(400)]
    budget = Budget(slots=64, schedule=schedule, fan_in=2)  # merges compact spans alone
    state = RollingState(tiny, MADE[name](tiny), budget)
    state.pin(ids[:5])
    state.extend(ids[5:300])
    with MemoryStore(tmp_path / "s.db") as store:
        store.create("x", tiny.identity, checkpoint=state.checkpoint(), turns=[], settings={})
    with MemoryStore(tmp_path / "s.db") as store:
        head = store.head("x")
        assert head is not None
        saved = store.load(head)
    resumed = RollingState(tiny, MADE[name](tiny), budget)
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
            lines = near.movedim(dim, -1).flatten(0, 1)
            assert max(line.unique().numel() for line in lines) <= 2**bits
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
