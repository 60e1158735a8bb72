"""Positions can be undone exactly, and a model that would break that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from still_agent.models import FrozenModel, load_model
from still_memory.errors import BudgetError, InputError
from still_memory.rotation import place, rotate, unrotate
from still_memory.span import Span, raw_slots
from tests.conftest import tiny_model

PROMPT = [4081, 4083, 104, 512, 33, 900, 77, 4086, 4084]


def first_layer(model: FrozenModel, position: int) -> torch.Tensor:
    """Keys of the first layer, which depend on nothing but token and position."""
    cache = model.new_cache(len(PROMPT))
    model.forward(PROMPT, cache, position)
    return cache.raw(0, 0, len(PROMPT))[0]


@pytest.mark.parametrize("position", [1, 100, 500])
def test_unrotating_gives_the_keys_that_were_never_rotated(
    tiny: FrozenModel, position: int
) -> None:
    attention = tiny.model.model.layers[0]
    hidden = attention.input_layernorm(tiny.model.model.embed_tokens(torch.tensor([PROMPT])))
    never = attention.self_attn.k_proj(hidden).view(1, len(PROMPT), 2, 16)
    never = attention.self_attn.k_norm(never).transpose(1, 2)[0]
    positions = torch.arange(position, position + len(PROMPT))
    keys = first_layer(tiny, position)
    free = unrotate(keys, positions, tiny.rope)
    torch.testing.assert_close(free, never, rtol=0, atol=2e-6)
    assert torch.equal(rotate(never, positions, tiny.rope), keys)


def test_moving_slots_equals_computing_them_elsewhere(tiny: FrozenModel) -> None:
    keys = first_layer(tiny, 37)
    span = Span(0, len(PROMPT), (raw_slots(keys, keys, 0),), rotated_at=37)
    for base in (0, 5, 480):
        moved = place(span, 0, base, tiny.rope, torch.float32)
        torch.testing.assert_close(moved, first_layer(tiny, base), rtol=0, atol=5e-6)
    assert torch.equal(place(span, 0, 37, tiny.rope, torch.float32), keys)


def test_a_bfloat16_round_trip_gives_back_the_same_bits(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, device="cpu", dtype="bfloat16")
    keys = first_layer(model, 300)
    positions = torch.arange(300, 300 + len(PROMPT))
    assert keys.dtype == torch.bfloat16
    assert torch.equal(rotate(unrotate(keys, positions, model.rope), positions, model.rope)
                       .to(torch.bfloat16), keys)  # fmt: skip


def test_a_bfloat16_load_keeps_its_frequencies_in_fp32(
    tiny: FrozenModel, tiny_folder: Path
) -> None:
    model = load_model(tiny_folder, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.model.rotary_emb.inv_freq.dtype == torch.float32
    positions = torch.arange(512)
    for ours, theirs in zip(model.rope(positions), tiny.rope(positions), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_rope_keeps_the_shape_of_its_positions(tiny: FrozenModel) -> None:
    cos, sin = tiny.rope(torch.arange(6).reshape(2, 3))
    assert cos.shape == sin.shape == (2, 3, 16)
    assert torch.equal(cos[1], tiny.rope(torch.arange(3, 6))[0])


def test_yarn_scaling_is_undone_too(tiny: FrozenModel) -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    model = FrozenModel(tiny_model(rope_parameters=yarn), tiny.tokenizer, "yarn")
    span = Span(0, 9, (raw_slots(k := first_layer(model, 20), k, 0),), rotated_at=20)
    moved = place(span, 0, 70, model.rope, torch.float32)
    torch.testing.assert_close(moved, first_layer(model, 70), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(tiny: FrozenModel, kind: str) -> None:
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 256}
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(InputError, match="rope_type"):
        FrozenModel(tiny_model(rope_parameters=rope), tiny.tokenizer, kind)


def test_a_model_cast_to_bfloat16_is_refused(tiny: FrozenModel) -> None:
    cast = tiny_model().to(torch.bfloat16)
    with pytest.raises(InputError, match=r"from_pretrained\(dtype"):
        FrozenModel(cast, tiny.tokenizer, "cast")
    with pytest.raises(InputError, match="rounded"):
        FrozenModel(cast.to(torch.float32), tiny.tokenizer, "cast and back")


def test_sliding_layers_are_refused(tiny: FrozenModel) -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with pytest.raises(InputError, match="use_sliding_window"):
        FrozenModel(model, tiny.tokenizer, "sliding")


def test_no_weight_can_be_trained(tiny: FrozenModel) -> None:
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not tiny.forward(PROMPT, tiny.new_cache(16), 0).requires_grad


def test_forward_returns_fp32_logits_of_the_last_token(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, device="cpu", dtype="bfloat16")
    logits = model.forward(PROMPT, model.new_cache(16), 0)
    assert logits.shape == (model.vocab_size,) == (4096,)
    assert logits.dtype == torch.float32


def test_positions_past_the_window_are_refused_before_anything_is_written(
    tiny: FrozenModel,
) -> None:
    cache = tiny.new_cache(16)
    tiny.forward(PROMPT, cache, 512 - 9)
    with pytest.raises(BudgetError, match="window of 512"):
        tiny.forward([1], cache, 512)
    with pytest.raises(BudgetError, match="window"):
        tiny.forward([1], cache, -1)
    with pytest.raises(InputError, match="at least one"):
        tiny.forward([], cache, 0)
    assert cache.length == 9


def test_a_slot_has_a_price_in_bytes(tiny: FrozenModel, tiny_folder: Path) -> None:
    assert tiny.bytes_per_slot == 2 * 2 * 2 * 16 * 4
    assert load_model(tiny_folder, device="cpu", dtype="bfloat16").bytes_per_slot == 256
