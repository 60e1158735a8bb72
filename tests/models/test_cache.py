"""The live cache: allocated once, never copied, and equal to a stock one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from still_agent.models import FrozenModel, LiveCache
from still_memory.errors import BudgetError, InputError

PROMPT = [4081, 4083, 104, 512, 33, 900, 77, 4086, 4084]


def storages(cache: LiveCache) -> list[int]:
    return [t.data_ptr() for x in cache.layers for t in (x.keys, x.values, x.bias)]


def views(cache: LiveCache, n: int = 1) -> list[torch.Tensor]:
    new = torch.ones(1, 2, n, 16)
    return list(cache.update(new, new, 0))


def test_the_cache_is_allocated_once_for_a_whole_conversation(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(64)
    before, size = storages(cache), cache.nbytes
    logits = tiny.forward(PROMPT, cache, 0)
    for step in range(40):
        logits = tiny.forward([int(logits.argmax())], cache, len(PROMPT) + step)
    assert storages(cache) == before
    assert cache.nbytes == size == 64 * (tiny.bytes_per_slot + 2 * 2 * 4)
    assert cache.lengths == [len(PROMPT) + 40] * 2


def test_a_decode_step_copies_no_cache(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(8)
    views(cache, 3)
    keys, values = views(cache)
    assert keys.shape == (1, 2, 4, 16)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert values.data_ptr() == cache.layers[0].values.data_ptr()


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> Qwen3ForCausalLM:
    """From the same file: how far weights are from a cache line shows in the last bits."""
    return Qwen3ForCausalLM.from_pretrained(tiny_folder, attn_implementation="sdpa").eval()


def test_each_step_equals_stock_generate(tiny: FrozenModel, stock: Qwen3ForCausalLM) -> None:
    out = stock.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cache = tiny.new_cache(len(PROMPT) + 30)
    logits = tiny.forward(PROMPT, cache, 0)
    for step, expected in enumerate(out.logits):
        assert torch.equal(logits, expected[0])
        token = int(logits.argmax())
        assert token == int(out.sequences[0, len(PROMPT) + step])
        logits = tiny.forward([token], cache, len(PROMPT) + step)


def test_prefill_in_chunks_equals_a_dynamic_cache(
    tiny: FrozenModel, stock: Qwen3ForCausalLM
) -> None:
    live, dynamic = tiny.new_cache(32), DynamicCache(config=stock.config)
    for low in range(0, 9, 4):
        part = PROMPT[low : low + 4]
        ours = tiny.forward(part, live, low)
        with torch.inference_mode():
            theirs = stock(torch.tensor([part]), past_key_values=dynamic, logits_to_keep=1).logits
        assert torch.equal(ours, theirs[0, -1])


def test_stock_generate_runs_on_a_live_cache(tiny: FrozenModel) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([PROMPT])
    plain = tiny.model.generate(ids, **settings)
    live = tiny.model.generate(ids, past_key_values=tiny.new_cache(32), **settings)
    assert torch.equal(plain, live)


def test_positions_by_default_follow_the_slots(tiny: FrozenModel) -> None:
    ids = torch.tensor([PROMPT[:4]])
    explicit, default = tiny.new_cache(16), tiny.new_cache(16)
    for cache in (explicit, default):
        tiny.forward(PROMPT, cache, 0)
    with torch.inference_mode():
        at = torch.arange(9, 13)[None]
        a = tiny.model(ids, past_key_values=explicit, position_ids=at).logits
        b = tiny.model(ids, past_key_values=default).logits
    assert torch.equal(a, b)


def test_past_the_capacity_is_an_error_and_nothing_changes(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(10)
    tiny.forward(PROMPT, cache, 0)
    with pytest.raises(BudgetError, match="compact"):
        tiny.forward([1, 2], cache, 9)
    assert cache.lengths == [9, 9]
    with pytest.raises(BudgetError, match="raise the budget"):
        views(cache, 2)
    with pytest.raises(BudgetError, match="raise the budget"):
        cache.load(0, torch.zeros(2, 11, 16), torch.zeros(2, 11, 16))
    assert cache.lengths == [9, 9]
    tiny.forward([1], cache, 9)


def test_loading_overwrites_and_spans_follow_one_another(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(16)
    views(cache, 9)
    first, second = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    bias = torch.randn(2, 3)
    cache.load(0, first, -first)
    cache.load(0, second, -second, bias, at=5)
    assert cache.lengths == [8, 0]
    keys, values = cache.raw(0, 0, 8)
    assert torch.equal(keys, torch.cat([first, second], dim=1))
    assert torch.equal(values, -keys)
    held = views(cache)[0].slot_bias
    assert torch.equal(held[0], torch.cat([torch.zeros(2, 5), bias, torch.zeros(2, 1)], dim=1))
    cache.load(0, first, first)
    assert not hasattr(views(cache)[0], "slot_bias")


def test_a_stale_bias_never_comes_back(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(16)
    ones = torch.ones(2, 6, 16)
    cache.load(0, ones, ones, torch.full((2, 6), 9.0))
    cache.load(0, ones[:, :4], ones[:, :4])
    cache.load(0, ones[:, :1], ones[:, :1], torch.ones(2, 1), at=4)
    assert views(cache)[0].slot_bias[0, 0].tolist() == [0, 0, 0, 0, 1, 0]


def test_raw_returns_views_of_what_was_computed(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(16)
    tiny.forward(PROMPT, cache, 0)
    keys, values = cache.raw(1, 2, 6)
    assert keys.shape == values.shape == (2, 4, 16)
    assert keys.data_ptr() == cache.layers[1].keys[0, :, 2:].data_ptr()
    with pytest.raises(InputError, match="holds 9 slots"):
        cache.raw(1, 2, 10)


def test_cropping_keeps_the_oldest_slots_and_decoding_goes_on(tiny: FrozenModel) -> None:
    cache, fresh = tiny.new_cache(16), tiny.new_cache(16)
    expected = tiny.forward(PROMPT[:6], fresh, 0)
    tiny.forward(PROMPT[:5], cache, 0)
    tiny.forward(PROMPT[5:], cache, 5)
    cache.crop(5)
    assert cache.lengths == [5, 5]
    torch.testing.assert_close(tiny.forward(PROMPT[5:6], cache, 5), expected, rtol=0, atol=2e-5)
    cache.crop(-2)
    assert cache.lengths == [4, 4]
    cache.crop(9)
    assert cache.lengths == [4, 4]


def test_uneven_layers_lose_the_same_tokens(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(16)
    for layer, n in enumerate((7, 3)):
        cache.load(layer, torch.ones(2, n, 16), torch.ones(2, n, 16))
    tiny.forward(PROMPT[:4], cache, 7)
    assert cache.lengths == [11, 7]
    cache.crop(9)
    assert cache.lengths == [9, 5]


def test_beams_take_their_bias_along(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(4, batch=2)
    keys = torch.randn(2, 2, 3, 16)
    cache.load(0, keys, keys, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 2, 3))
    before = storages(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys[0, :, :3], keys[1])
    assert cache.layers[0].bias[0, 0, 0] == 2
    assert storages(cache) == before


def test_slots_of_another_shape_are_refused(tiny: FrozenModel) -> None:
    cache = tiny.new_cache(8)
    ones = torch.ones(2, 4, 16)
    with pytest.raises(InputError, match="another model"):
        cache.load(0, torch.ones(3, 4, 16), torch.ones(3, 4, 16))
    with pytest.raises(InputError, match="another model"):
        cache.load(0, ones, ones[:, :3])
    with pytest.raises(InputError, match="bias"):
        cache.load(0, ones, ones, torch.ones(4))
    with pytest.raises(InputError, match="load at 0"):
        cache.load(0, ones, ones, at=1)
    with pytest.raises(BudgetError, match="at least one"):
        tiny.new_cache(0)


def test_gradients_are_refused_rather_than_lost(tiny: FrozenModel) -> None:
    new = torch.ones(1, 2, 1, 16, requires_grad=True)
    with pytest.raises(InputError, match="inference_mode"):
        tiny.new_cache(4).update(new, new, 0)


def test_a_cache_made_in_inference_mode_works_outside_it(tiny: FrozenModel) -> None:
    with torch.inference_mode():
        cache = tiny.new_cache(8)
    views(cache)
    assert cache.length == 1
