"""Bytes of a layer: exact both ways, and never trusted on the way in."""

from __future__ import annotations

import json
import math
import struct
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from still_memory.codec import decode, encode
from still_memory.errors import DamageError, InputError, StillError
from still_memory.span import Slots

ONE = ((1, 1, 1), (1, 1, 1), (1, 1))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def layers(draw: st.DrawFn) -> Slots:
    heads, n, d, e = (draw(st.integers(low, 5)) for low in (1, 0, 1, 1))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Any bits at all: NaNs, infinities, subnormal numbers."""
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=seed)
        return raw.view(dtype).view(shape)

    dtype = draw(st.sampled_from(DTYPES))
    bias, salience = (
        bits(torch.float32, heads, n) if draw(st.booleans()) else None for _ in range(2)
    )
    return Slots(
        bits(dtype, heads, n, d), bits(dtype, heads, n, e), bits(torch.float32, heads, n),
        bias, salience,
    )  # fmt: skip


def equal(a: Slots, b: Slots) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(
        x[n].dtype == y[n].dtype
        and x[n].shape == y[n].shape
        and x[n].reshape(-1).view(torch.uint8).equal(y[n].reshape(-1).view(torch.uint8))
        for n in x
    )


@given(layers())
@settings(max_examples=60, deadline=None)
def test_every_bit_comes_back(slots: Slots) -> None:
    assert equal(decode(encode(slots), "it"), slots)


@given(layers())
@settings(max_examples=20, deadline=None)
def test_the_bytes_are_a_safetensors_file(slots: Slots) -> None:
    assert equal(Slots(**load(encode(slots))), slots)


def test_the_tensors_stand_in_the_documented_order() -> None:
    one = torch.ones(1, 2)
    slots = Slots(torch.ones(1, 2, 4), torch.ones(1, 2, 4), one, 2 * one, 3 * one)
    data = encode(slots)
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["keys", "values", "positions", "bias", "salience"]
    assert header["salience"] == {"dtype": "F32", "shape": [1, 2], "data_offsets": [80, 88]}
    assert data[-16:] == struct.pack("<4f", 2, 2, 3, 3)


def test_views_of_one_storage_are_written_as_what_they_show() -> None:
    both = torch.arange(48.0).view(2, 2, 6, 2)
    slots = Slots(both[0, :, 1:4], both[1, :, 1:4], torch.arange(3.0).expand(2, 3))
    data = encode(slots)
    assert len(data) < 48 * 4 + 300
    assert equal(decode(data, "it"), slots)


def test_a_single_number_of_any_stride_is_written() -> None:
    one = torch.ones(64).as_strided((1, 1, 1), (64, 32, 32))
    slots = Slots(one, one, one[0])
    assert equal(decode(encode(slots), "it"), Slots(*(torch.ones(s) for s in ONE)))


def test_what_is_read_can_be_used_without_a_warning() -> None:
    slots = Slots(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.zeros(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encode(slots), "it").keys.add_(1)


@pytest.mark.parametrize(
    "slots",
    [
        Slots(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 2)),
        Slots(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2)),
        Slots(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2).long()),
        Slots(torch.ones(1, 2, 4).int(), torch.ones(1, 2, 4), torch.ones(1, 2)),
        Slots(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2), torch.ones(2)),
        Slots(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2), None, torch.ones(1, 3)),
    ],
    ids=[
        "lengths differ",
        "no heads",
        "integer positions",
        "integer keys",
        "flat bias",
        "long salience",
    ],
)
def test_what_could_not_be_read_is_not_written(slots: Slots) -> None:
    with pytest.raises(InputError, match="cannot be stored"):
        encode(slots)


def field(dtype: str, shape: list[object], low: object, high: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


GOOD = {
    "keys": field("F32", [1, 2, 4], 0, 32),
    "values": field("F32", [1, 2, 4], 32, 64),
    "positions": field("F32", [1, 2], 64, 72),
}


def file(header: object, data: bytes = bytes(72)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = 2**40
ATTACKS = {
    "nothing": b"",
    "a length alone": struct.pack("<Q", 8),
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "a header of megabytes": file(b" " * 5_000_000 + json.dumps(GOOD).encode()),
    "not JSON": file(b"\x80\x04pickle"),
    "a list": file([1, 2, 3]),
    "JSON nested without end": file(b"[" * 4000),
    "no tensors": file({}),
    "a tensor too few": file({"keys": GOOD["keys"], "values": GOOD["values"]}),
    "salience before bias": file(
        {**GOOD, "salience": field("F32", [1, 2], 72, 80), "bias": field("F32", [1, 2], 80, 88)},
        bytes(88),
    ),
    "half salience": file({**GOOD, "salience": field("F16", [1, 2], 72, 76)}, bytes(76)),
    "salience of another length": file(
        {**GOOD, "salience": field("F32", [1, 3], 72, 84)}, bytes(84)
    ),
    "a tensor too many": file({**GOOD, "other": field("F32", [1], 72, 76)}, bytes(76)),
    "fields missing": file({**GOOD, "keys": {"dtype": "F32"}}),
    "a dtype that is none": file({**GOOD, "keys": field("PICKLE", [1, 2, 4], 0, 32)}),
    "integers": file({**GOOD, "keys": field("I32", [1, 2, 4], 0, 32)}),
    "half positions": file({**GOOD, "positions": field("F16", [1, 2], 64, 68)}, bytes(68)),
    "petabytes of keys": file(
        {n: field("F32", [1, HUGE, 4][: 2 + (n != "positions")], 0, HUGE * 16) for n in GOOD}
    ),
    "sizes that overflow": file(
        {n: field("F32", [2**62, 2**62, 4][: 2 + (n != "positions")], 0, 0) for n in GOOD}
    ),
    "a huge empty tensor": file(
        {n: field("F32", [2**62, 0, 4][: 2 + (n != "positions")], 0, 0) for n in GOOD}, b""
    ),
    "a negative size": file({**GOOD, "keys": field("F32", [1, -2, -4], 0, 32)}),
    "a size that is no integer": file({**GOOD, "keys": field("F32", [1, 2.0, 4], 0, 32)}),
    "a size that is a truth": file({**GOOD, "keys": field("F32", [True, 2, 4], 0, 32)}),
    "tensors that overlap": file({**GOOD, "values": field("F32", [1, 2, 4], 0, 32)}, bytes(40)),
    "offsets past the end": file({**GOOD, "positions": field("F32", [1, 2], 640, 648)}),
    "lengths that differ": file({**GOOD, "positions": field("F32", [1, 3], 64, 76)}, bytes(76)),
    "bytes after the tensors": file(GOOD, bytes(80)),
    "bytes cut off": file(GOOD, bytes(71)),
}


def test_the_file_that_the_attacks_change_is_a_good_one() -> None:
    assert len(decode(file(GOOD), "it")) == 2


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_hostile_file_is_refused_before_a_tensor_is_made(data: bytes) -> None:
    with pytest.raises(DamageError, match="layer 3 is damaged"):
        decode(data, "layer 3")


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_slots_or_a_typed_error(noise: bytes, at: int) -> None:
    good = file(GOOD)
    try:
        slots = decode(good[:at] + noise + good[at + len(noise) :], "it")
    except StillError:
        return
    assert isinstance(slots, Slots)
