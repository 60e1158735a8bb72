"""INT8 and INT4: the numbers of an evaluation's rounding, in few bytes, and in mixed stores."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint
from still_memory.codec import BITS, decode, encode, settled
from still_memory.errors import DamageError, InputError, StillError, StoreError
from still_memory.identity import ModelIdentity
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.span import Slots, Span, raw_slots
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Same = Callable[[Checkpoint, Checkpoint], bool]
LOSSY = sorted(BITS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def kivi(x: Tensor, bits: int, dim: int) -> Tensor:
    """The evaluation's rounding in one line of arithmetic, as it was before any codec."""
    if not x.numel():
        return x
    groups = x.float().movedim(dim, -1)
    n = groups.shape[-1]
    groups = torch.cat([groups, groups[..., -1:].expand(*groups.shape[:-1], -n % 32)], -1)
    groups = groups.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    grid = ((groups - low) / step).round() * step + low
    return grid.flatten(-2)[..., :n].movedim(-1, dim).to(x.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    mine, theirs = (t.contiguous().view(-1).clone() for t in (a, b))
    bits = (t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (mine, theirs))
    return a.dtype == b.dtype and a.shape == b.shape and next(bits).equal(next(bits))


@st.composite
def layers(draw: st.DrawFn) -> Slots:
    """Odd shapes; channels that are large, constant, subnormal, of either sign."""
    heads, n = draw(st.integers(1, 3)), draw(st.integers(0, 70))
    d, e = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def side(width: int) -> Tensor:
        x = torch.randn(heads, n, width, generator=seed)
        for channel in range(width):
            kind = draw(st.sampled_from(["plain", "far", "constant", "subnormal", "zero", "large"]))
            some = x[..., channel]
            if kind == "far":
                some += 1e3
            elif kind == "constant":
                some[:] = -7.3
            elif kind == "subnormal":
                some *= 1e-40
            elif kind == "zero":
                some[:] = -0.0
            elif kind == "large":
                some *= 1e4
        return x.to(dtype)

    one = torch.randn(heads, n, generator=seed)
    bias, salience = (one + k if draw(st.booleans()) else None for k in (1, 2))
    if bias is not None and n:
        bias[0, 0] = -torch.inf
    return Slots(side(d), side(e), one, bias, salience)


@pytest.mark.parametrize("codec", LOSSY)
@given(layers())
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_what_the_evaluation_rounds(codec: str, slots: Slots) -> None:
    found = decode(encode(slots, codec), "it", codec=codec)
    assert same_bits(found.keys, kivi(slots.keys, BITS[codec], 1))
    assert same_bits(found.values, kivi(slots.values, BITS[codec], 2))
    assert found.tensors().keys() == slots.tensors().keys()
    for name in ("positions", "bias", "salience"):
        if (kept := getattr(slots, name)) is not None:
            assert same_bits(getattr(found, name), kept)


@pytest.mark.parametrize("codec", LOSSY)
def test_the_error_is_half_a_step_of_a_group_and_the_bytes_are_few(codec: str) -> None:
    chance = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 4, 64, 64, generator=chance)
    keys *= torch.logspace(-2, 2, 64)  # channels differ: one grid for all would lose the small
    slots = raw_slots(keys, values, 0)
    data = encode(slots, codec)
    found = decode(data, "it", codec=codec)
    for low in (0, 32):
        part, near = keys[:, low : low + 32], found.keys[:, low : low + 32]
        step = (part.amax(1) - part.amin(1)) / (2 ** BITS[codec] - 1)
        assert ((part - near).abs().amax(1) <= step * 0.5001).all()
    # codes, an eighth of the numbers as edges (two in 32 at 4 bytes), positions, a header
    numbers = 2 * 4 * 64 * 64
    assert len(data) <= numbers * BITS[codec] // 8 + numbers // 4 + 4 * 64 * 4 + 800


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(
    "bad",
    [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0], [3.4e38, -3.4e38]],
    ids=["nan", "inf", "minus inf", "a range past float32"],
)
def test_what_is_no_number_is_not_rounded(codec: str, side: str, bad: list[float]) -> None:
    tensors = {"keys": torch.zeros(1, 2, 2), "values": torch.zeros(1, 2, 2)}
    tensors[side][0] = torch.tensor([bad, bad[::-1]])
    with pytest.raises(InputError, match=f"{side} that are not finite, or too large"):
        encode(Slots(**tensors, positions=torch.zeros(1, 2)), codec)


def test_a_float64_past_float32_is_not_rounded() -> None:
    keys = torch.full((1, 2, 2), 1e300, dtype=torch.float64)
    with pytest.raises(InputError, match="too large"):
        encode(Slots(keys, torch.zeros(1, 2, 2), torch.zeros(1, 2)), "int8")


def test_a_codec_that_is_none_is_an_input_error(path: Path, raw_span: Callable[..., Span]) -> None:
    with pytest.raises(InputError, match="exact, int8, int4"):
        MemoryStore(path, codec="int2")
    assert not path.exists()
    with pytest.raises(InputError, match="'zip'"):
        settled(raw_span(0, 4), "zip")


# -- bytes that are not trusted -----------------------------------------------------------------

SLOTS = raw_slots(torch.randn(2, 5, 8), torch.randn(2, 5, 6), 0)


def changed(codec: str, change: Callable[[dict[str, dict[str, object]]], object]) -> bytes:
    """The bytes of SLOTS under another header."""
    data = encode(SLOTS, codec)
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


HOSTILE: dict[str, Callable[[dict[str, dict[str, object]]], object]] = {
    "edges missing": lambda h: h.pop("keys_low"),
    "steps of another type": lambda h: h["keys"].update(dtype="I8"),
    "edges that are steps": lambda h: h["values_low"].update(dtype="U8"),
    "edges of two types": lambda h: h["keys_high"].update(dtype="BF16"),
    "half positions": lambda h: h["positions"].update(dtype="F16"),
    "another number of slots": lambda h: h["positions"].update(shape=[2, 6]),
    "no heads": lambda h: h["positions"].update(shape=[5]),
    "too many groups": lambda h: h["keys_low"].update(shape=[2, 2, 8]),
    "petabytes": lambda h: [f.update(shape=[2, 2**30, 2**30]) for f in h.values()],
    "past any size": lambda h: [f.update(shape=[2**62, 0, 2**62]) for f in h.values()],
    "a negative size": lambda h: h["keys"].update(shape=[-2, -5, 8]),
    "a truth": lambda h: h["keys"].update(shape=[True, 10, 8]),
    "overlapping": lambda h: h["values"].update(data_offsets=h["keys"]["data_offsets"]),
    "a tensor too many": lambda h: h.update(more=h["positions"]),
}


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(
    codec: str, change: Callable[[dict[str, dict[str, object]]], object]
) -> None:
    assert len(decode(changed(codec, lambda header: None), "it", codec=codec)) == 5
    with pytest.raises(DamageError, match="layer 3 is damaged"):
        decode(changed(codec, change), "layer 3", codec=codec)


def test_bytes_of_one_codec_are_none_of_another() -> None:
    for mine in ("exact", *LOSSY):
        for other in {"exact", *LOSSY} - {mine}:
            with pytest.raises(DamageError):
                decode(encode(SLOTS, mine), "it", codec=other)


@pytest.mark.parametrize("codec", LOSSY)
@given(st.binary(max_size=100), st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_slots_or_a_typed_error(codec: str, noise: bytes, at: int) -> None:
    good = encode(SLOTS, codec)
    assume(at < len(good))
    try:
        slots = decode(good[:at] + noise + good[at + len(noise) :], "it", codec=codec)
    except StillError:
        return
    assert isinstance(slots, Slots)


# -- in a store ---------------------------------------------------------------------------------


@pytest.fixture
def state(
    raw_span: Callable[..., Span],
    compact_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> Callable[..., Checkpoint]:
    """A state of 64 tokens, its spans settled in `codec` (None: not yet)."""

    def make(codec: str | None = None, seed: int = 0) -> Checkpoint:
        spans = [compact_span(0, 30, 9, seed), raw_span(30, 64, seed)]
        if codec is not None:
            spans = [settled(span, codec) for span in spans]
        return checkpoint_of(spans)

    return make


def saved(store: MemoryStore, model: ModelIdentity, name: str, state: Checkpoint) -> None:
    turns = [NewTurn("user", "hello", [1])]
    store.create(name, model, checkpoint=state, turns=turns, settings={})


def loaded(store: MemoryStore, name: str) -> Checkpoint:
    head = store.head(name)
    assert head is not None
    return store.load(head)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_settled_state_comes_back_bit_for_bit(
    codec: str, open_store: Opens, model: ModelIdentity, state: Callable[..., Checkpoint],
    same: Same,
) -> None:  # fmt: skip
    live, first = state(codec), open_store(codec=codec)
    saved(first, model, "x", live)
    again = loaded(open_store(), "x")
    assert same(again, live)
    head = first.head("x")
    assert head is not None
    size = first.stats().span_bytes
    # a span that was read is written again as it was, also where the store has lost it since
    other = open_store(first.path.with_name("other.db"))
    saved(other, model, "y", again)
    assert same(loaded(other, "y"), live) and other.stats().span_bytes == size
    assert check_store(first.path).findings == check_store(other.path).findings == []


@pytest.mark.parametrize("codec", LOSSY)
def test_a_store_rounds_what_its_maker_has_not(
    codec: str, open_store: Opens, model: ModelIdentity, state: Callable[..., Checkpoint],
    same: Same,
) -> None:  # fmt: skip
    store = open_store(codec=codec)
    saved(store, model, "x", state())
    store.close()
    assert same(loaded(open_store(), "x"), state(codec))


def test_a_choice_is_kept_and_stores_are_mixed(
    path: Path, open_store: Opens, model: ModelIdentity, state: Callable[..., Checkpoint],
    same: Same,
) -> None:  # fmt: skip
    for n, (chosen, held) in enumerate(
        [(None, "exact"), ("int8", "int8"), (None, "int8"), ("int4", "int4"), ("exact", "exact")]
    ):
        with MemoryStore(path, codec=chosen) as store:
            assert store.codec == held
            saved(store, model, f"{n} {held}", state(seed=10 * n))
    with sqlite3.connect(path) as conn:
        rows = conn.execute("select codec, count(*) from spans group by codec order by codec")
        assert rows.fetchall() == [("exact", 4), ("int4", 2), ("int8", 4)]
    conn.close()
    store = open_store()
    for info in store.sessions():
        n, codec = info.name.split()
        assert same(loaded(store, info.name), state(codec, seed=10 * int(n)))
    assert check_store(path).findings == []


def test_the_codec_is_part_of_an_address(
    open_store: Opens, path: Path, model: ModelIdentity, state: Callable[..., Checkpoint]
) -> None:
    store = open_store(codec="int8")
    saved(store, model, "x", state())
    store.close()
    with sqlite3.connect(path) as conn:
        conn.execute("update spans set codec = 'int4'")
    conn.close()
    with pytest.raises(DamageError, match="its description is not what was written"):
        loaded(open_store(), "x")


def test_a_codec_from_the_future_is_told(
    open_store: Opens, path: Path, model: ModelIdentity, state: Callable[..., Checkpoint]
) -> None:
    with open_store() as store:
        saved(store, model, "x", state())
    with sqlite3.connect(path) as conn:
        conn.execute("insert into meta values ('codec', ?)", [b"int1"])
    conn.close()
    with pytest.raises(StoreError, match="upgrade still-agent"):
        MemoryStore(path)
    assert open_store(codec="exact").codec == "exact"  # a choice is a way out


@pytest.mark.parametrize("codec", LOSSY)
def test_an_export_keeps_the_bytes(
    codec: str, open_store: Opens, model: ModelIdentity, state: Callable[..., Checkpoint],
    same: Same, tmp_path: Path,
) -> None:  # fmt: skip
    mixed = state(codec, seed=1)
    store = open_store()
    saved(store, model, "x", mixed)
    out = tmp_path / "x.still"
    Portable.of(store, "x").write(out)
    assert out.read_bytes().startswith(b"still session 2\n")
    found = Portable.read(out)
    assert same(found.checkpoint, mixed)
    other = open_store(tmp_path / "other.db", codec="int4")  # what is settled is not rounded again
    found.save(other, "y")
    read = loaded(other, "y")
    assert [e.span.codec for e in read.entries] == [codec, codec]
    assert all(
        same_bits(a, b)
        for x, y in zip(read.entries, mixed.entries, strict=True)
        for m, n in zip(x.span.layers, y.span.layers, strict=True)
        for a, b in zip(m.tensors().values(), n.tensors().values(), strict=True)
    )


def test_the_reference_is_what_the_evaluation_uses() -> None:
    from still_memory.grids import rounded

    x = torch.randn(2, 45, 37, generator=torch.Generator().manual_seed(1))
    for bits in (1, 4, 8):
        for dim in (1, 2):
            assert same_bits(rounded(x, bits, dim), kivi(x, bits, dim))
    assert F.mse_loss(rounded(x, 8, 1), x) < F.mse_loss(rounded(x, 4, 1), x)
