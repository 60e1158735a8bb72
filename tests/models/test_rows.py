"""One token for each of many live caches in one pass: what each would get alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from still_agent.models import FrozenModel, LiveCache, load_model
from still_agent.models.attention import still_attention
from still_agent.models.rows import Rows
from still_memory.errors import BudgetError, InputError

LENGTHS = [(1, 1), (40, 40), (9, 30), (25, 7), (0, 0)]  # of both layers, session by session


def session(model: FrozenModel, lengths: tuple[int, ...], biased: bool, seed: int) -> LiveCache:
    """A live cache of random slots; a head of a biased one may have an empty slot."""
    cache = model.new_cache(48)
    random = torch.Generator().manual_seed(seed)
    for layer, n in enumerate(lengths):
        keys, values = torch.randn(2, 2, n, 16, generator=random).to(model.dtype)
        bias = torch.randn(2, n, generator=random)
        bias[0, : n // 3] = -torch.inf
        cache.load(layer, keys, values, bias if biased else None)
    return cache


def sessions(model: FrozenModel) -> list[LiveCache]:
    return [
        session(model, lengths, biased, seed)
        for seed, lengths in enumerate(LENGTHS)
        for biased in (False, True)
    ]


def held(caches: list[LiveCache]) -> list[torch.Tensor]:
    """Every key and value held, then every bias."""
    layers = [x for cache in caches for x in cache.live]
    slots = [t[:, :, : x.length] for x in layers for t in (x.keys, x.values)]
    return slots + [x.bias[:, :, : x.length] for x in layers if x.biased]


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_each_row_gets_what_it_gets_alone(tiny_folder: Path, dtype: str, close: float) -> None:
    model = load_model(tiny_folder, device="cpu", dtype=dtype)
    together, alone = sessions(model), sessions(model)
    positions = [max(cache.lengths) for cache in together]
    tokens = list(range(100, 100 + len(together)))
    for step in range(3):
        at = [p + step for p in positions]
        logits = model.forward_rows(tokens, together, at)
        expected = torch.stack(
            [model.forward([t], c, p) for t, c, p in zip(tokens, alone, at, strict=True)]
        )
        assert logits.dtype == torch.float32 and logits.shape == (len(tokens), model.vocab_size)
        assert expected.std() > 10 * close  # so that to be close says something
        torch.testing.assert_close(logits, expected, rtol=0, atol=close)
        assert [c.lengths for c in together] == [c.lengths for c in alone]
        for ours, theirs in zip(held(together), held(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_attention_is_the_one_it_has_alone_bit_for_bit(
    tiny_folder: Path, dtype: str
) -> None:
    model = load_model(tiny_folder, device="cpu", dtype=dtype)
    together, alone = sessions(model), sessions(model)
    n = len(together)
    query = torch.randn(n, 1, 4, 16).transpose(1, 2).to(model.dtype)
    keys, values = torch.randn(2, n, 1, 2, 16).transpose(2, 3).to(model.dtype)
    module = model.model.model.layers[1].self_attn
    out, _ = still_attention(module, query, *Rows(together).update(keys, values, 1), None)
    assert out.shape == (n, 1, 4, 16)
    for i, cache in enumerate(alone):
        one = slice(i, i + 1)
        expected, _ = still_attention(
            module, query[one], *cache.update(keys[one], values[one], 1), None
        )
        assert torch.equal(out[one], expected)


def test_no_cache_is_copied(tiny: FrozenModel) -> None:
    caches = sessions(tiny)
    new = torch.ones(len(caches), 2, 1, 16)
    keys, _ = Rows(caches).update(new, new, 0)
    for (seen, values), cache in zip(keys.rows, caches, strict=True):
        assert seen.data_ptr() == cache.live[0].keys.data_ptr()
        assert values.data_ptr() == cache.live[0].values.data_ptr()
        assert (cache.live[0].keys[:, :, cache.live[0].length - 1] == 1).all()


def test_a_row_at_fault_is_an_error_before_anything_is_changed(tiny: FrozenModel) -> None:
    caches = [session(tiny, (48, 48), False, 0), *sessions(tiny)]
    n = len(caches)
    lengths = [c.lengths for c in caches]
    with pytest.raises(BudgetError, match="room for 0 slots"):
        tiny.forward_rows([5] * n, caches, [48] * n)
    with pytest.raises(BudgetError, match="window of 512"):
        tiny.forward_rows([5] * (n - 1), caches[1:], [48] * (n - 2) + [512])
    with pytest.raises(InputError, match="each one once"):
        tiny.forward_rows([5, 6], [caches[1], caches[1]], [48, 49])
    with pytest.raises(InputError, match="each one once"):
        tiny.forward_rows([], [], [])
    assert [c.lengths for c in caches] == lengths


@pytest.mark.parametrize("many", [False, True])
def test_a_pass_that_is_interrupted_leaves_every_cache_as_it_was(
    tiny: FrozenModel, many: bool
) -> None:
    caches, fresh = sessions(tiny), sessions(tiny)
    lengths = [c.lengths for c in caches]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = tiny.model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            if many:
                tiny.forward_rows([5] * len(caches), caches, [48] * len(caches))
            else:
                tiny.forward([5], caches[0], 48)
    finally:
        hook.remove()
    assert [c.lengths for c in caches] == lengths
    for ours, theirs in zip(caches, fresh, strict=True):
        assert torch.equal(tiny.forward([6], ours, 48), tiny.forward([6], theirs, 48))
