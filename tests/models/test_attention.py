"""What the bias promises, and that without one nothing changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer

from still_agent.models import FrozenModel, attention
from tests.conftest import tiny_model

IDS = [[5, 77, 312, 9, 2048, 41, 7, 1000]]


class SlotLayer(DynamicLayer):
    """A growing layer with a bias on its first slots, as a trainer would use it."""

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.slot_bias = keys, values, bias

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        if self.slot_bias is not None:
            new = keys.new_zeros(*self.slot_bias.shape[:2], key_states.shape[2])
            keys.slot_bias = torch.cat([self.slot_bias, new], dim=-1)
        return keys, values


class SlotCache(DynamicCache):
    """Slots of different layers; the mask is made for the first."""

    def __init__(self, *layers: SlotLayer) -> None:
        super().__init__()
        self.layers = list(layers)


@pytest.fixture(scope="module")
def still() -> Qwen3ForCausalLM:
    attention.register()
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("still")
    return model


@pytest.fixture(scope="module")
def stock() -> Qwen3ForCausalLM:
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    return model


def slots(seed: int, n: int, *, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, n, 16, generator=generator)
    values = torch.randn(1, 2, n, 16, generator=generator)
    return keys.requires_grad_(requires_grad), values.requires_grad_(requires_grad)


def logits(model: Qwen3ForCausalLM, cache: Any, ids: list[list[int]] = IDS) -> Tensor:
    at = torch.arange(20, 20 + len(ids[0]))[None]
    out: Tensor = model(
        torch.tensor(ids), past_key_values=cache, position_ids=at, use_cache=True
    ).logits
    return out


def exact(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """The definition, in float64: softmax(q k / sqrt(d) + bias) v, causal at the right."""
    group = query.shape[1] // key.shape[1]
    k, v, b = (t.double().repeat_interleave(group, dim=1) for t in (key, value, bias))
    scores = query.double() @ k.transpose(-1, -2) * scaling + b[:, :, None]
    n, s = scores.shape[-2:]
    seen = torch.ones(n, s, dtype=torch.bool).tril(s - n)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 8])
def test_without_a_bias_logits_are_bit_equal_to_stock_sdpa(
    still: Qwen3ForCausalLM, stock: Qwen3ForCausalLM, length: int, dtype: torch.dtype
) -> None:
    results = []
    for name in ("sdpa", "still"):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM._from_config(stock.config, dtype=dtype).eval()
        model.set_attn_implementation(name)
        cache = DynamicCache(config=model.config)
        steps = [logits(model, cache, [IDS[0][:length]]) for _ in range(4)]
        results.append(torch.cat(steps, dim=1))
    assert torch.equal(*results)


def test_a_padding_mask_is_handled_as_stock_does(
    still: Qwen3ForCausalLM, stock: Qwen3ForCausalLM
) -> None:
    ids = torch.tensor(IDS * 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(
        still(ids, attention_mask=mask).logits[:, 3:], stock(ids, attention_mask=mask).logits[:, 3:]
    )


@pytest.mark.parametrize("length", [1, 8])
def test_a_zero_bias_changes_nothing(still: Qwen3ForCausalLM, length: int) -> None:
    ids = [IDS[0][:length]]
    pairs = [slots(1, 12), slots(2, 12)]
    plain = SlotCache(*(SlotLayer(k, v, None) for k, v in pairs))
    zero = SlotCache(*(SlotLayer(k, v, torch.zeros(1, 2, 12)) for k, v in pairs))
    torch.testing.assert_close(
        logits(still, plain, ids), logits(still, zero, ids), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("length", [1, 8])
def test_a_bias_of_log_n_equals_storing_the_slot_n_times(
    still: Qwen3ForCausalLM, length: int
) -> None:
    ids = [IDS[0][:length]]
    pairs = [slots(1, 6), slots(2, 6)]
    bias = torch.zeros(1, 2, 6)
    bias[:, :, 2] = math.log(3)
    index = torch.tensor([0, 1, 2, 2, 2, 3, 4, 5])
    thrice = SlotCache(*(SlotLayer(k[:, :, index], v[:, :, index], None) for k, v in pairs))
    biased = SlotCache(*(SlotLayer(k, v, bias) for k, v in pairs))
    torch.testing.assert_close(
        logits(still, thrice, ids), logits(still, biased, ids), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("length", [1, 8])
def test_each_head_has_its_own_bias_and_its_own_empty_slots(
    tiny: FrozenModel, length: int, learned: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, length, 16, generator=generator)
    key = torch.randn(2, 2, 30, 16, generator=generator)
    value = torch.randn(2, 2, 30, 16, generator=generator)
    bias = torch.randn(2, 2, 30, generator=generator)
    bias[0, 0, :7] = -torch.inf
    bias[1, 1, 3:9] = -torch.inf
    bias.requires_grad_(learned)  # takes another way, by which gradients come back
    expected = exact(query, key, value, bias, 0.25)
    key.slot_bias = bias
    module = tiny.model.model.layers[0].self_attn
    out, _ = attention.still_attention(module, query, key, value, None, scaling=0.25)
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-5)
    if learned:
        weights = torch.randn(out.shape, generator=generator)
        ours, theirs = (
            torch.autograd.grad((o * weights).sum(), bias)[0] for o in (out, expected.float())
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("counts", [(12, 5), (5, 12), (0, 9), (9, 0)])
def test_layers_may_hold_different_numbers_of_slots(
    tiny: FrozenModel, still: Qwen3ForCausalLM, counts: tuple[int, int], length: int
) -> None:
    """A shorter layer equals the same layer padded to the longer one with empty slots."""
    ids = [IDS[0][:length]]
    uneven, padded = tiny.new_cache(32), tiny.new_cache(32)
    for layer, count in enumerate(counts):
        keys, values = slots(layer, count)
        uneven.load(layer, keys, values)
        gap = max(counts) - count
        wide = [torch.cat([torch.zeros(1, 2, gap, 16), t], dim=2) for t in (keys, values)]
        bias = torch.zeros(1, 2, max(counts))
        bias[:, :, :gap] = -torch.inf
        padded.load(layer, wide[0], wide[1], bias)
    with torch.no_grad():
        a, b = logits(still, uneven, ids), logits(still, padded, ids)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert uneven.lengths == [count + length for count in counts]


def test_a_row_that_sees_only_empty_slots_is_finite(tiny: FrozenModel) -> None:
    query, key = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    key.slot_bias = torch.full((1, 2, 2), -torch.inf)
    module = tiny.model.model.layers[0].self_attn
    out, _ = attention.still_attention(module, query, key, key, None, scaling=0.25)
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [1, 8])
def test_gradients_reach_bias_keys_and_values(still: Qwen3ForCausalLM, length: int) -> None:
    leaves: list[Tensor] = []
    layers = []
    for seed in (1, 2):
        keys, values = slots(seed, 6, requires_grad=True)
        bias = torch.randn(1, 2, 6, requires_grad=True)
        leaves += [keys, values, bias]
        layers.append(SlotLayer(keys, values, bias))
    logits(still, SlotCache(*layers), [IDS[0][:length]])[0, -1].square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert (leaf.grad != 0).all()


def test_rows_with_fewer_slots_are_padded_on_the_left(tiny: FrozenModel) -> None:
    """Two sessions in one batch, 4 and 9 slots, each as if it were alone."""
    counts = (4, 9)
    batch = tiny.new_cache(24, batch=2)
    alone = [tiny.new_cache(24), tiny.new_cache(24)]
    for layer in range(tiny.layers):
        rows = [slots(10 * layer + count, count) for count in counts]
        keys, values = torch.zeros(2, 2, 2, 9, 16)
        bias = torch.full((2, 2, 9), -torch.inf)
        for row, (count, (k, v)) in enumerate(zip(counts, rows, strict=True)):
            keys[row, :, 9 - count :], values[row, :, 9 - count :] = k[0], v[0]
            bias[row, :, 9 - count :] = 0
            alone[row].load(layer, k, v)
        batch.load(layer, keys, values, bias)
    at = torch.stack([torch.arange(c, c + 8) for c in counts])
    with torch.no_grad():
        both = tiny.model(torch.tensor(IDS * 2), past_key_values=batch, position_ids=at).logits
        for row, cache in enumerate(alone):
            one = tiny.model(torch.tensor(IDS), past_key_values=cache, position_ids=at[row, None])
            torch.testing.assert_close(both[row], one.logits[0], rtol=0, atol=2e-5)
