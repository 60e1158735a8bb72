"""Slots dealt out to layers: never more in all, none beyond use, one for each at least."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from still_memory.compactors.still import StillCompactor, StillConfig
from still_memory.errors import CompactorError
from still_memory.shares import Shares, at_ratio, best, dealt
from tests.memory.test_still import MODEL, PAPER, SALIENT, span

UNEVEN: Shares = ((1.0, 1.0), (4.0, 2.0))


@given(
    slots=st.integers(1, 500),
    wanted=st.lists(st.sampled_from((0.0, 0.01, 0.5, 1.0, 3.0, 100.0)), min_size=1, max_size=12),
    most=st.lists(st.integers(1, 900), min_size=12, max_size=12),
)
def test_layers_together_never_get_more(slots: int, wanted: list[float], most: list[int]) -> None:
    if not max(wanted):
        wanted[0] = 1.0
    given_ = dealt(slots, tuple((w, w) for w in wanted), most[: len(wanted)])
    assert not isinstance(given_, int)
    widest = [max(layer) for layer in given_]
    assert sum(widest) <= slots * len(wanted)
    assert all(1 <= n <= m for n, m in zip(widest, most, strict=False))
    idle = [n for n, (w, m) in enumerate(zip(wanted, most, strict=False)) if w and widest[n] < m]
    if len(idle) == sum(w > 0 for w in wanted):  # nothing is full: each has its share
        unit = (slots - 1) * len(wanted) / sum(wanted)
        assert all(abs(n - 1 - unit * w) <= 1 for n, w in zip(widest, wanted, strict=True))


def test_what_one_layer_cannot_use_goes_to_the_others() -> None:
    assert dealt(11, ((1.0,), (4.0,)), [100, 100]) == [[5], [17]]
    assert dealt(11, ((1.0,), (4.0,)), [100, 9]) == [[13], [9]]
    assert dealt(11, ((1.0,), (4.0,)), [6, 9]) == [[6], [9]]
    assert dealt(11, ((2.0, 1.0), (2.0, 0.0)), [100, 100]) == [[11, 6], [11, 1]]


@pytest.mark.parametrize("shares", [((1.0,),), ((1.0,), (-1.0,)), ((0.0,), (0.0,)), ((1.0,), ()),
                                    ((1.0,), (float("nan"),))])  # fmt: skip
def test_what_is_no_share_is_refused(shares: Shares) -> None:
    with pytest.raises(CompactorError, match="one number a KV head"):
        dealt(5, shares, [9, 9])


def test_the_best_of_each_head_stand_in_order_and_empty_slots_at_the_end() -> None:
    worth = torch.tensor([[5.0, 1.0, 9.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    chosen, beyond = best(worth, torch.tensor([3, 1]))
    assert chosen[0].tolist() == [0, 2, 3] and chosen[1, 0] == 3
    assert beyond.tolist() == [[False] * 3, [False, True, True]]


@pytest.mark.parametrize("paper", [True, False])
def test_each_layer_is_what_it_is_alone(paper: bool) -> None:
    """A layer with n slots is the layer that a compaction to n slots for all would write."""
    still = StillCompactor(PAPER if paper else SALIENT, MODEL)
    uneven = still.compact([span(0, 60)], [[6, 6], [24, 24]])
    assert [len(slots) for slots in uneven.layers] == [6, 24] and uneven.slots == 15
    for layer, count in enumerate((6, 24)):
        alone = still.compact([span(0, 60)], count).layers[layer]
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(uneven.layers[layer].tensors()[name], tensor)


@pytest.mark.parametrize("paper", [True, False])
def test_a_head_with_fewer_slots_ends_with_empty_ones(paper: bool) -> None:
    still = StillCompactor(PAPER if paper else SALIENT, MODEL)
    (even, uneven) = still.compact([span(0, 60)], [[8, 8], [8, 3]]).layers
    assert even.bias is None and uneven.bias is not None
    assert uneven.bias.isfinite().tolist() == [[True] * 8, [True] * 3 + [False] * 5]
    three = still.compact([span(0, 60)], 3).layers[1]
    torch.testing.assert_close(uneven.keys[1, :3], three.keys[1])


def test_layers_keep_their_own_tokens_over_many_rounds() -> None:
    """What a layer dropped never comes back, and each keeps the best of what it had."""
    still = StillCompactor(SALIENT, MODEL)
    assert still.scorer is not None
    with torch.no_grad():
        still.scorer.outward.weight.normal_()
    whole, memory = [span(0, 40)], still.compact([span(0, 40)], [[5, 5], [25, 25]])
    for n in range(1, 8):
        new = span(40 * n, 40 * (n + 1), seed=n)
        whole, memory = [*whole, new], still.compact([memory, new], [[5, 5], [25, 25]])
    at_once = still.compact(whole, [[5, 5], [25, 25]])
    few, many = (set(slots.positions[0].tolist()) for slots in memory.layers)
    assert len(few) == 5 and len(many) == 25 and few <= many
    # A chunk's edges are scored without their neighbours, so the choice is close, not equal.
    assert len(many & set(at_once.layers[1].positions[0].tolist())) > 12


@pytest.mark.parametrize("paper", [True, False])
def test_no_layer_gets_more_than_it_had(paper: bool) -> None:
    """Of uneven spans, by a compactor that has no shares, too."""
    still = StillCompactor(PAPER if paper else SALIENT, MODEL)
    uneven = still.compact([span(0, 60)], [[1, 1], [38, 38]])
    for slots, lengths in ((30, [21, 30]), (50, [21, 50]), (70, [21, 58])):
        out = still.compact([uneven, span(60, 80, seed=1)], slots)
        assert [len(layer) for layer in out.layers] == lengths


@pytest.mark.parametrize("shares", [((1.0, 1.0),), ((1.0,), (1.0,)), ((0.0, 0.0),) * 2])
def test_a_config_with_shares_of_another_model_is_refused(shares: Shares) -> None:
    with pytest.raises((ValueError, CompactorError)):
        StillConfig(**{**SALIENT.model_dump(), "shares": shares})


def test_its_config_names_its_shares() -> None:
    config = StillConfig(**{**SALIENT.model_dump(), "shares": UNEVEN})
    still = StillCompactor(config, MODEL)
    assert still.identity.address != StillCompactor(SALIENT, MODEL).identity.address
    short = still.compact([span(0, 64)], 8)
    assert [len(slots) for slots in short.layers] == [3, 12] and short.slots == 8
    short = still.compact([span(0, 64)], 8, longest=10)
    assert [len(slots) for slots in short.layers] == [6, 10]
    assert len(StillCompactor(SALIENT, MODEL).compact([span(0, 64)], 8)) == 8


def test_tokens_of_no_worth_give_a_layer_no_more_than_the_mean() -> None:
    config = StillConfig(**{**SALIENT.model_dump(), "shares": UNEVEN, "worth": 1.9})
    still = StillCompactor(config, MODEL)  # gates begin at a logit of 2
    assert still.scorer is not None
    assert [len(slots) for slots in still.compact([span(0, 64)], 8).layers] == [3, 12]
    with torch.no_grad():
        still.scorer.outward.bias.sub_(1.0)
    assert [len(slots) for slots in still.compact([span(0, 64)], 8).layers] == [8, 8]


def test_shares_between_two_ratios_are_mixed_by_its_logarithm() -> None:
    low, high = ((1.0, 1.0), (1.0, 0.5)), ((0.0, 0.0), (8.0, 4.0))
    table = {32.0: high, 8.0: low}
    for ratio, wanted in ((2.0, low), (8.0, low), (32.0, high), (500.0, high)):
        assert at_ratio(table, ratio) == wanted
    assert at_ratio(table, 16.0) == ((0.25, 0.25), (0.75, 0.375))
    assert at_ratio(UNEVEN, 16.0) == UNEVEN
    assert at_ratio({4.0: UNEVEN}, 1.0) == at_ratio({4.0: UNEVEN}, 9.0) == UNEVEN


def test_a_config_may_name_shares_for_each_ratio() -> None:
    table = {"4": ((1.0, 1.0), (1.0, 1.0)), "16": UNEVEN}
    config = StillConfig(**{**SALIENT.model_dump(), "shares": table})
    assert StillConfig.model_validate_json(config.model_dump_json()) == config
    still = StillCompactor(config, MODEL)
    (few, many), (one, other) = (
        [len(layer) for layer in still.compact([span(0, 64)], slots).layers] for slots in (4, 16)
    )
    assert (few, many) == (2, 5) and (one, other) == (16, 16)
    first = still.compact([span(0, 32)], 8)  # of all tokens, not of the slots that are left of them
    later = still.compact([first, span(32, 64, seed=1)], 4)
    assert [len(layer) for layer in later.layers] == [2, 5]
    for wrong in ({"4": ((1.0,), (1.0,))}, {"0.5": UNEVEN}, {"4": ((0.0, 0.0), (0.0, 0.0))}):
        with pytest.raises((ValueError, CompactorError)):
            StillConfig(**{**SALIENT.model_dump(), "shares": wrong})
