"""Spans and where they are placed: nothing drifts, whatever is done in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.codec import decode, encode
from still_memory.errors import InputError
from still_memory.rotation import free, place, rotate, unrotate
from still_memory.span import Slots, Span, raw_slots


class Rope:
    """RoPE of width `d`; `scaling` as YaRN's attention factor."""

    def __init__(self, d: int, scaling: float = 1.0) -> None:
        self.inverse = 1.0 / 10_000 ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        self.scaling = scaling

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[..., None] * self.inverse
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling


ROPE = Rope(16)
BASES = st.integers(0, 4096)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ropes = st.sampled_from([ROPE, Rope(16, 1.25)])


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def raw(start: int, count: int, rotated_at: int, dtype: torch.dtype = torch.float32) -> Span:
    seed = torch.Generator().manual_seed(start * 31 + count)
    keys, values = torch.randn(2, 2, count, 16, generator=seed).to(dtype)
    return Span(start, start + count, (raw_slots(keys, values, start),), rotated_at)


@given(BASES, st.integers(1, 40), ropes)
@settings(max_examples=50, deadline=None)
def test_unrotating_undoes_rotating(base: int, count: int, rope: Rope) -> None:
    keys = raw(0, count, 0).layers[0].keys
    positions = torch.arange(base, base + count)
    back = unrotate(rotate(keys, positions, rope), positions, rope)
    torch.testing.assert_close(back, keys, rtol=0, atol=2e-6)


@given(BASES, DTYPES)
@settings(max_examples=30, deadline=None)
def test_keys_placed_where_they_were_computed_are_the_stored_bytes(
    at: int, dtype: torch.dtype
) -> None:
    span = raw(7, 12, at, dtype)
    assert place(span, 0, at, ROPE, dtype).data_ptr() == span.layers[0].keys.data_ptr()


@given(BASES, st.lists(BASES, max_size=5), BASES, DTYPES)
@settings(max_examples=40, deadline=None)
def test_a_placement_does_not_depend_on_the_placements_before_it(
    at: int, before: list[int], base: int, dtype: torch.dtype
) -> None:
    span, twin = raw(0, 9, at, dtype), raw(0, 9, at, dtype)
    for other in before:
        place(span, 0, other, ROPE, dtype)
    placed = place(span, 0, base, ROPE, dtype)
    assert bits_equal(placed, place(twin, 0, base, ROPE, dtype))


@given(BASES, BASES, DTYPES)
@settings(max_examples=40, deadline=None)
def test_a_stored_span_is_placed_as_the_live_one_is(at: int, base: int, dtype: torch.dtype) -> None:
    span = raw(3, 10, at, dtype)
    stored = replace(span, layers=tuple(decode(encode(s), "it") for s in span.layers))
    placed = place(stored, 0, base, ROPE, dtype)
    assert bits_equal(placed, place(span, 0, base, ROPE, dtype))


@given(BASES, BASES, st.integers(0, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_part_is_placed_as_that_part_of_the_whole(
    at: int, base: int, skip: int, count: int
) -> None:
    span = raw(100, 16, at)
    part = span.cut(100 + skip, 100 + skip + count)
    whole = place(span, 0, base, ROPE, torch.float32)[:, skip : skip + count]
    assert torch.equal(place(part, 0, base + skip, ROPE, torch.float32), whole)


@given(BASES, BASES)
@settings(max_examples=30, deadline=None)
def test_freeing_first_changes_no_bit_of_a_later_placement(at: int, base: int) -> None:
    span = raw(0, 9, at)
    if at != base:
        freed = place(free(span, ROPE), 0, base, ROPE, torch.float32)
        assert torch.equal(freed, place(span, 0, base, ROPE, torch.float32))


@given(BASES, st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_attention_sees_only_distances(at: int, low: int, high: int) -> None:
    """A query that stands d past a key scores it alike, wherever the two are placed."""
    span = raw(0, 5, at)
    query = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(at))

    def scores(base: int) -> Tensor:
        turned = rotate(query, torch.tensor([base + 9]), ROPE)
        return turned @ place(span, 0, base, ROPE, torch.float32).transpose(1, 2)

    torch.testing.assert_close(scores(low), scores(high), rtol=0, atol=2e-3)


def test_a_compact_spans_own_keys_are_rotated_from_where_it_is_placed() -> None:
    keys = torch.randn(2, 4, 16)
    span = Span(0, 40, (Slots(keys, keys, torch.zeros(2, 4)),), None, rounds=1)
    placed = place(span, 0, 6, ROPE, torch.float32)
    assert torch.equal(placed, rotate(keys, torch.arange(6.0, 10.0), ROPE))


def test_a_cut_is_a_view() -> None:
    span = raw(10, 8, 50)
    part = span.cut(12, 15)
    assert (part.start, part.end, part.rotated_at, len(part)) == (12, 15, 52, 3)
    assert part.layers[0].positions.tolist() == [[12.0, 13.0, 14.0]] * 2
    storage = span.layers[0].keys.untyped_storage().data_ptr()
    assert part.layers[0].keys.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize(("low", "high"), [(9, 12), (12, 12), (14, 12), (12, 19)])
def test_a_cut_outside_the_span_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        raw(10, 8, 0).cut(low, high)


def test_a_span_counts_slots_at_its_largest_layer(compact_span: Callable[..., Span]) -> None:
    span = compact_span(0, 50, 6)
    assert [len(s) for s in span.layers] == [6, 5]
    assert (len(span), span.tokens) == (6, 50)
    with pytest.raises(ValueError, match="cannot cut"):
        span.cut(0, 10)


def test_a_compact_span_stands_whole_and_a_raw_one_may_stand_in_part(
    compact_span: Callable[..., Span],
) -> None:
    assert Entry(raw(10, 8, 0), 12, 18, 0, "tail").slots == 6
    assert Entry(compact_span(0, 50, 6), 0, 50, 0, "memory").slots == 6
    with pytest.raises(InputError, match="cannot stand"):
        Entry(compact_span(0, 50, 6), 10, 50, 0, "memory")
    with pytest.raises(InputError, match="cannot stand"):
        Entry(raw(10, 8, 0), 9, 18, 0, "tail")


def test_a_checkpoint_has_no_gap_and_no_disorder() -> None:
    first = Entry(raw(0, 4, 0), 0, 4, 0, "memory")
    gap = Entry(raw(5, 4, 5), 5, 9, 4, "tail")
    pinned = Entry(raw(4, 4, 4), 4, 8, 4, "pinned")
    assert Checkpoint((first,), 4).slots == 4
    for entries, length in [((first, gap), 9), ((first, pinned), 8), ((first,), 5), ((gap,), 9)]:
        with pytest.raises(InputError, match="entries"):
            Checkpoint(entries, length)
