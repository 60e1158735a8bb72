"""KV-Distill's promises: selection at the start, absorption after, one model untouched."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from still_agent import Budget
from still_agent.compactor import choose_compactor
from still_agent.models import FrozenModel, frozen
from still_agent.rolling import RollingState
from still_memory.compactors.cache import Cache
from still_memory.compactors.kv_distill import KVDistillCompactor, KVDistillConfig
from still_memory.compactors.still import StillCompactor, StillConfig
from still_memory.errors import CompactorError, IdentityError, InputError
from still_memory.rotation import free
from still_memory.span import Span, raw_slots
from tests.agent.conftest import Pooling

IDS = tuple(random.Random(0).sample(range(4000), 60))


def made(model: FrozenModel, *, learnt: bool = False, seed: int = 0) -> KVDistillCompactor:
    """Untrained; or with LoRA that is not zero, as if something had been learnt."""
    torch.manual_seed(seed)
    config = KVDistillConfig(
        layers=model.layers, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
        width=model.width, rank=4, scored_at=1, scorer_width=8,
    )  # fmt: skip
    distill = KVDistillCompactor(config, model.identity, model)
    if learnt:
        with torch.no_grad():
            for adapter in distill.adapters.values():
                adapter.up.normal_(std=0.1)
    return distill.requires_grad_(False)


def raw(model: FrozenModel, start: int, end: int) -> Span:
    """IDS[start:end] as read after those before them; not rotated."""
    cache = model.new_cache(end)
    model.forward(IDS[:end], cache, 0)
    layers = tuple(
        raw_slots(*(t.clone() for t in cache.raw(n, start, end)), start) for n in range(2)
    )
    return free(Span(start, end, layers, rotated_at=start, ids=IDS[start:end]), model.rope)


def kept_of(span: Span) -> list[int]:
    (positions,) = {tuple(p.tolist()) for slots in span.layers for p in slots.positions}
    return [int(p) for p in positions]


def test_with_lora_at_zero_it_is_selection_bit_for_bit(tiny: FrozenModel) -> None:
    distill, span = made(tiny), raw(tiny, 0, 60)
    out = distill.compact([span], 20)
    ids = torch.tensor([IDS])
    scores = distill.score(Cache.of(span), ids)[0]
    kept = sorted(scores.topk(20).indices.tolist())
    assert kept_of(out) == kept and (out.start, out.end, out.rounds) == (0, 60, 1)
    for slots, whole in zip(out.layers, span.layers, strict=True):
        assert torch.equal(slots.keys, whole.keys[:, kept])
        assert torch.equal(slots.values, whole.values[:, kept])
        assert slots.bias is None and slots.salience is not None
        assert torch.equal(slots.salience, scores[kept].expand(2, -1))


def test_what_is_kept_absorbs_what_came_before_it(tiny: FrozenModel) -> None:
    distill, cache = made(tiny, learnt=True), Cache.of(raw(tiny, 0, 60))
    kept = torch.zeros(1, 60, dtype=torch.bool)
    kept[0, [10, 40]] = True

    def gains(ids: tuple[int, ...]) -> list[Tensor]:
        """(60,) a layer: the most that a value gains."""
        row = torch.tensor([ids])
        plain, _ = distill._read_plainly(cache.cut(0, 0), row)
        out = distill._absorbed(cache, row, kept, plain)
        return [
            (a - b)[0].abs().amax((0, 2)) for a, b in zip(out.values, cache.values, strict=True)
        ]

    first, second = gains(IDS)
    assert (first > 1e-3).tolist() == kept[0].tolist()  # there the token is all that is known
    assert (second[[10, 40]] > 1e-3).all() and (second[:10] < 1e-5).all()
    changed = abs(gains((*IDS[:25], 7, *IDS[26:]))[1] - second)
    assert changed[40] > 1e-4 and changed[10] < 1e-5


def test_reading_in_parts_is_reading_at_once(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill, spans = made(tiny, learnt=True), [raw(tiny, 0, 30), raw(tiny, 30, 60)]
    spans[0] = distill.compact(spans[:1], 12)
    whole = distill.compact(spans, 20)
    monkeypatch.setattr(frozen, "LOOK", 7)
    for a, b in zip(whole.layers, distill.compact(spans, 20).layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)


def test_compact_slots_stay_as_they_are_and_compete_by_the_score_they_carry(
    tiny: FrozenModel,
) -> None:
    distill = made(tiny, learnt=True)
    memory = distill.compact([raw(tiny, 0, 40)], 20)
    out = distill.compact([memory, raw(tiny, 40, 60)], 16)
    old = [p for p in kept_of(out) if p < 40]
    at = [kept_of(memory).index(p) for p in old]
    assert out.rounds == 2 and 0 < len(old) < 16
    for now, then in zip(out.layers, memory.layers, strict=True):
        assert torch.equal(now.keys[:, : len(old)], then.keys[:, at])
        assert torch.equal(now.values[:, : len(old)], then.values[:, at])
        assert now.salience is not None and then.salience is not None
        assert torch.equal(now.salience[:, : len(old)], then.salience[:, at])
        dropped = torch.ones(20, dtype=torch.bool)
        dropped[at] = False
        assert then.salience[:, dropped].max() <= now.salience.min()
    merged = distill.compact([memory], 5)  # nothing raw: nothing is read
    assert set(kept_of(merged)) <= set(kept_of(memory)) and merged.rounds == 2


def test_the_model_is_the_same_after_and_for_others_meanwhile(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: p.clone() for name, p in tiny.model.named_parameters()}
    plain = tiny.forward(IDS, tiny.new_cache(60), 0)
    found: list[Tensor] = []

    class Meddling(KVDistillCompactor):
        def _absorbed(self, *args: object) -> Cache:
            reader = tiny.read

            def read(before: Cache, ids: Tensor, adapt: object) -> object:
                def nosy(layer: int, name: str, x: Tensor, tokens: slice) -> Tensor | None:
                    if (layer, name) == (1, "v"):
                        other = threading.Thread(
                            target=lambda: found.append(tiny.forward(IDS, tiny.new_cache(60), 0))
                        )
                        other.start()
                        other.join()
                    return adapt(layer, name, x, tokens)  # type: ignore[operator]

                return reader(before, ids, nosy)

            with monkeypatch.context() as patch:
                patch.setattr(tiny, "read", read)
                return super()._absorbed(*args)  # type: ignore[arg-type]

    torch.manual_seed(0)
    distill = Meddling(made(tiny).config, tiny.identity, tiny)
    torch.nn.init.normal_(distill.adapters["0v"].up)
    distill.compact([raw(tiny, 0, 60)], 20)
    assert len(found) == 1 and torch.equal(found[0], plain)
    assert torch.equal(tiny.forward(IDS, tiny.new_cache(60), 0), plain)
    assert all(torch.equal(p, before[name]) for name, p in tiny.model.named_parameters())


@pytest.mark.parametrize("schedule", ["rolling", "tiered"])
def test_it_runs_for_many_rounds_and_resumes_bit_for_bit(tiny: FrozenModel, schedule: str) -> None:
    rng = random.Random(3)
    ids = [rng.randrange(4000) for _ in range(400)]
    distill = made(tiny, learnt=True)
    budget = Budget(slots=64, schedule=schedule, fan_in=2)  # type: ignore[arg-type]
    state = RollingState(tiny, distill, budget)
    state.pin(ids[:5])
    state.extend(ids[5:300])
    resumed = RollingState(tiny, distill, budget)
    resumed.restore(state.checkpoint())
    assert torch.equal(state.extend(ids[300:]), resumed.extend(ids[300:]))
    assert state.rounds > (10 if schedule == "rolling" else 1) and state.slots <= 64


def test_slots_of_another_compactor_rank_in_the_middle(tiny: FrozenModel) -> None:
    pooled = Pooling().compact([raw(tiny, 0, 40)], 12)  # fewer in the last layer, one empty
    out = made(tiny, learnt=True).compact([pooled, raw(tiny, 40, 60)], 16)
    for slots in out.layers:
        assert slots.keys.isfinite().all() and slots.values.isfinite().all()
        assert slots.bias is not None and not slots.bias.isnan().any()
        assert slots.salience is not None and not slots.salience.isnan().any()
        assert 0 < (slots.positions < 40).sum() < slots.positions.numel()


def test_a_folder_comes_back_the_same_and_says_which_method_it_is(
    tiny: FrozenModel, tmp_path: Path
) -> None:
    distill = made(tiny, learnt=True)
    distill.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = choose_compactor(tmp_path, "tiny", tiny)
    assert isinstance(again, KVDistillCompactor) and again.identity == distill.identity
    span = raw(tiny, 0, 60)
    for a, b in zip(
        distill.compact([span], 9).layers, again.compact([span], 9).layers, strict=True
    ):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_another_models_folder_is_refused(tiny: FrozenModel, tmp_path: Path) -> None:
    distill = made(tiny)
    distill.model = tiny.identity.model_copy(update={"weights": "other"})
    distill.save(tmp_path)
    with pytest.raises(IdentityError, match="weights"):
        choose_compactor(tmp_path, "tiny", tiny)
    with pytest.raises(IdentityError, match="weights"):
        choose_compactor(distill, "tiny", tiny)


def test_another_methods_folder_is_refused(tiny: FrozenModel, tmp_path: Path) -> None:
    config = StillConfig(layers=2, kv_heads=2, head_dim=16)
    StillCompactor(config, tiny.identity).save(tmp_path)
    with pytest.raises(CompactorError, match="a compactor of 'still', not of 'kv-distill'"):
        KVDistillCompactor.load(tmp_path, tiny.identity, tiny)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"newer": {}, "model": about["model"]}))
    with pytest.raises(CompactorError, match="'newer', which this version does not know"):
        choose_compactor(tmp_path, "tiny", tiny)


@pytest.mark.parametrize("damage", ["config", "list", "settings", "weights", "missing"])
def test_a_damaged_folder_is_a_typed_error(tiny: FrozenModel, tmp_path: Path, damage: str) -> None:
    made(tiny).save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "config":
        config.write_text("{]")
    elif damage == "list":
        config.write_text("[1]")
    elif damage == "settings":
        config.write_text(config.read_text().replace('"rank": 4', '"rank": "four"'))
    elif damage == "weights":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    else:
        weights.unlink()
    with pytest.raises(CompactorError):
        choose_compactor(tmp_path, "tiny", tiny)


def test_what_it_cannot_do_is_a_typed_error(tiny: FrozenModel) -> None:
    distill, span = made(tiny), raw(tiny, 0, 20)
    with pytest.raises(CompactorError, match="one or more"):
        distill.compact([span], 0)
    with pytest.raises(CompactorError, match="not known"):
        distill.compact([replace(span, ids=None)], 5)
    with pytest.raises(CompactorError, match="1 layers of 2 KV heads"):
        distill.compact([replace(span, layers=span.layers[:1])], 5)
    with pytest.raises(InputError, match="token ids past"):
        distill.compact([replace(span, ids=(9999,) * 20)], 5)
    with pytest.raises(InputError, match="no layer 2"):
        KVDistillCompactor(distill.config.model_copy(update={"scored_at": 2}), tiny.identity, tiny)
