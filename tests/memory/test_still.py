"""The Still compactor's promises: identity start, any ratio, its own output, its folder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from still_memory.compactors.cache import Cache
from still_memory.compactors.still import StillCompactor, StillConfig, perceiver
from still_memory.errors import CompactorError, IdentityError, InputError
from still_memory.identity import ModelIdentity
from still_memory.span import Slots, Span, raw_slots

MODEL = ModelIdentity(name="m", weights="w", config="c", tokenizer="t", template="p", dtype="f")
PAPER = StillConfig(layers=2, kv_heads=2, head_dim=16)
SALIENT = StillConfig(
    layers=2, kv_heads=2, head_dim=16, placement="salient", beta=True, feed_forward=2
)


def cache(slots: int, batch: int = 1, seed: int = 0) -> Cache:
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, batch, 2, slots, 16, generator=g)
    return Cache.raw(list(keys), list(values))


def stacked(out: Cache) -> tuple[Tensor, Tensor]:
    return torch.stack(out.keys), torch.stack(out.values)


def span(start: int, end: int, seed: int = 0) -> Span:
    c = cache(end - start, seed=seed)
    layers = tuple(raw_slots(k[0], v[0], start) for k, v in zip(c.keys, c.values, strict=True))
    return Span(start, end, layers, rotated_at=None)


@pytest.mark.parametrize("config", [PAPER, SALIENT], ids=["paper", "salient"])
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_untrained_at_full_length_copies_the_cache(config, length):
    c = cache(length)
    out = StillCompactor(config, MODEL)(c, length)
    for got, source in zip(stacked(out), stacked(c), strict=True):
        assert torch.allclose(got, source, atol=1e-6)
    assert (out.bias == 0).all()


@pytest.mark.parametrize(("length", "slots"), [(64, 8), (1000, 125), (1024, 16), (2000, 10)])
def test_untrained_each_latent_is_the_mean_of_its_cell(length, slots):
    c = cache(length)
    out = StillCompactor(PAPER, MODEL)(c, slots)
    for got, source in zip(stacked(out), stacked(c), strict=True):
        means = source.unflatten(3, (slots, length // slots)).mean(4)
        assert torch.allclose(got, means, atol=1e-6)
    assert torch.allclose(out.positions[0, 0, 0], torch.linspace(0, length - 1, slots))


@pytest.mark.parametrize("config", [PAPER, SALIENT], ids=["paper", "salient"])
@pytest.mark.parametrize("ratio", [1, 3, 8, 50, 200])
def test_one_compactor_serves_every_ratio(config, ratio):
    out = StillCompactor(config, MODEL).compact([span(0, 400)], 400 // ratio)
    assert len(out) == 400 // ratio
    assert (out.start, out.end, out.rounds, out.rotated_at) == (0, 400, 1, None)
    assert all(torch.isfinite(s.keys).all() for s in out.layers)


def test_untrained_mean_weighs_compact_slots_by_the_tokens_they_stand_for():
    still = StillCompactor(PAPER, MODEL)
    first = still.compact([span(0, 60)], 10)  # six tokens a slot
    out = still.compact([first, span(60, 66, seed=1)], 1)
    c, d = cache(60), cache(6, seed=1)
    mean = torch.cat([stacked(c)[1], stacked(d)[1]], dim=3).mean(3)[:, 0]
    assert torch.allclose(torch.stack([s.values[:, 0] for s in out.layers]), mean, atol=1e-5)
    assert out.rounds == 2


def test_reads_its_own_output_many_times():
    still = StillCompactor(SALIENT, MODEL)
    memory = still.compact([span(0, 40)], 20)
    for n in range(1, 30):
        memory = still.compact([memory, span(40 * n, 40 * (n + 1), seed=n)], 20)
    assert memory.rounds == 30 and len(memory) == 20
    assert all((s.positions.diff() > 0).all() for s in memory.layers)


def test_a_settled_slot_is_never_written_again():
    still = StillCompactor(SALIENT, MODEL)
    with torch.no_grad():
        for p in still.parameters():
            p.add_(0.05 * torch.randn_like(p))
    memory = still.compact([span(0, 40)], 30)
    again = still.compact([memory], 12)
    for before, after in zip(memory.layers, again.layers, strict=True):
        for h in range(2):
            at = torch.isin(before.positions[h], after.positions[h])
            assert torch.equal(before.keys[h, at], after.keys[h])
            assert torch.equal(before.bias[h, at], after.bias[h])


def test_slots_that_another_compactor_wrote_are_scored_anew():
    """Logits of two scorers have two scales; memory must not live or die by that."""
    still, other = (StillCompactor(SALIENT, MODEL) for _ in range(2))
    with torch.no_grad():
        still.scorer.outward.bias.add_(5.0)
        other.scorer.outward.bias.sub_(100.0)
    memory = other.compact([span(0, 40)], 20)
    out = still.compact([memory, span(40, 60, seed=1)], 30)
    assert (out.layers[0].positions[0] < 40).sum() > 5
    assert all((s.salience > -50).all() for s in out.layers)


def test_the_bias_of_a_slot_weighs_when_it_is_compacted_again():
    c, still = cache(64), StillCompactor(PAPER, MODEL)
    plain = stacked(still(c, 8))[1]
    c.bias[..., 3] = 2.0
    moved = (stacked(still(c, 8))[1] - plain).abs().amax((0, 1, 2, 4))
    assert moved[0] > 0.01 and (moved[1:] < 1e-5).all()


def test_heads_with_fewer_slots_lend_no_empty_ones():
    c = cache(20)
    c.bias[0, 0, 1, 12:] = -torch.inf
    c.values[0][0, 1, 12:] = 1e6
    for config in (PAPER, SALIENT):
        out = StillCompactor(config, MODEL)(c, 5)
        filled = out.bias[..., None] > -torch.inf
        assert (stacked(out)[1].abs() * filled).max() < 1e3


@pytest.mark.parametrize("config", [PAPER, SALIENT], ids=["paper", "salient"])
def test_working_through_a_long_cache_by_parts_changes_nothing(config, monkeypatch):
    still = StillCompactor(config, MODEL)
    with torch.no_grad():
        for p in still.parameters():
            p.add_(0.05 * torch.randn_like(p))
    whole = stacked(still(cache(500), 20))
    monkeypatch.setattr(perceiver, "IN_CACHE", 2 * 32 * 77)  # two heads of width 32, 77 tokens
    for got, expected in zip(stacked(still(cache(500), 20)), whole, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("config", [PAPER, SALIENT], ids=["paper", "salient"])
def test_gradients_reach_every_parameter(config):
    """After one step, since a map that starts at zero hides what stands before it."""
    still = StillCompactor(config, MODEL)
    optimizer = torch.optim.SGD(still.parameters(), lr=1e-2)
    target = torch.randn(2, 2, 2, 2, 8, 16)
    for _ in range(3):
        optimizer.zero_grad()
        c = cache(64, batch=2)
        out = still(c, 8)
        keys, values = stacked(out)
        loss = (keys - target[0]).square().mean() + (values - target[1]).square().mean()
        loss = loss + (out.bias - 1).square().mean()
        if still.scorer is not None:
            loss = loss + still.score(c).square().mean()
        loss.backward()
        optimizer.step()
    dead = [n for n, p in still.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_the_query_bias_that_routing_needs_is_not_zero():
    """A reproduction that left it at zero lost the identity start."""
    for part in StillCompactor(PAPER, MODEL).perceivers:
        cross = part.cross[0]
        assert torch.equal(cross.query.bias, cross.key.bias)
        assert (cross.query.bias != 0).all()


def test_bias_stays_a_float():
    """A reproduction's mask cast it to bool without a word."""
    still = StillCompactor(SALIENT, MODEL)
    torch.nn.init.constant_(still.perceivers[0].to_beta.bias, math.log(3))
    out = still.compact([span(0, 40)], 10)
    assert out.layers[0].bias.dtype == torch.float32
    assert torch.allclose(out.layers[0].bias, torch.tensor(math.log(3)), atol=1e-5)


def test_no_norm_stands_between_the_latents_and_the_cache():
    """A norm after the blocks would give every slot one length."""
    c = cache(64)
    for values in c.values:
        values[..., :32, :] *= 100
    out = StillCompactor(PAPER, MODEL)(c, 8)
    length = stacked(out)[1].norm(dim=-1)
    assert (length[..., :4].mean() / length[..., 4:].mean()) > 50


def test_inputs_are_left_as_they_were():
    s = span(0, 40)
    before = [t.clone() for layer in s.layers for t in layer.tensors().values()]
    StillCompactor(SALIENT, MODEL).compact([s], 8)
    after = [t for layer in s.layers for t in layer.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_folder_round_trip(tmp_path):
    still = StillCompactor(SALIENT, MODEL)
    still.save(tmp_path)
    again = StillCompactor.load(tmp_path, MODEL)
    assert again.identity == still.identity
    a, b = still.compact([span(0, 90)], 9), again.compact([span(0, 90)], 9)
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(a.layers, b.layers, strict=True))


def test_refuses_another_model(tmp_path):
    StillCompactor(PAPER, MODEL).save(tmp_path)
    with pytest.raises(IdentityError, match="weights"):
        StillCompactor.load(tmp_path, MODEL.model_copy(update={"weights": "other"}))


@pytest.mark.parametrize("damage", ["config", "weights", "missing"])
def test_damaged_folder_is_a_typed_error(tmp_path, damage):
    StillCompactor(PAPER, MODEL).save(tmp_path)
    if damage == "config":
        (tmp_path / "config.json").write_text("{]")
    elif damage == "weights":
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + data[8:])
    else:
        (tmp_path / "config.json").unlink()
    with pytest.raises(CompactorError):
        StillCompactor.load(tmp_path, MODEL)


def test_no_slots_is_refused():
    with pytest.raises(CompactorError, match="one or more"):
        StillCompactor(PAPER, MODEL).compact([span(0, 4)], 0)


def test_rotated_spans_are_refused():
    rotated = Span(
        0, 4, tuple(Slots(*s.tensors().values()) for s in span(0, 4).layers), rotated_at=0
    )
    with pytest.raises(InputError):
        StillCompactor(PAPER, MODEL).compact([rotated], 2)


def test_a_cache_read_in_parts_is_the_cache_read_at_once(monkeypatch):
    torch.manual_seed(0)
    one = perceiver.Perceiver(
        2, 8, blocks=2, bank=4, base=10.0, beta=True, feed_forward=1, neighbourhood=0.5
    )
    with torch.no_grad():
        for weight in one.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    tokens, mass = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30)
    mass[0, 0, :8] = -torch.inf  # a whole part of one head is empty
    cells, at = torch.arange(30).expand(1, 2, 30) // 5, torch.arange(6).expand(1, 2, 6)
    where = torch.linspace(0, 1, 6).expand(1, 2, 6)

    def run() -> tuple[Tensor, list[Tensor]]:
        one.zero_grad()
        out = torch.cat([t.flatten() for t in one(tokens, cells, mass, where, at)])
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in one.parameters() if p.grad is not None]

    whole, gradients = run()
    monkeypatch.setattr(perceiver, "IN_CACHE", 7 * 2 * 16)  # 7 tokens at once
    parts, others = run()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    for mine, other in zip(gradients, others, strict=True):
        # A change in the tokens' last bit alone moves a gradient by a thousandth of its length.
        assert (other - mine).norm() <= 0.01 * mine.norm()
    mass[0, 0] = -torch.inf  # all of it
    assert all(t.isfinite().all() for t in one(tokens, cells, mass, where, at))
