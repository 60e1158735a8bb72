"""One layer's slots as bytes, and back: exact, or with keys and values in 8 or 4 bits.

The bytes are a safetensors file: eight bytes of header length, a JSON header, the tensors'
own bytes in little-endian order. They are written and read here rather than by the library,
because slots are often views of one storage, which the library refuses, and because what is
read must be *these* tensors with *these* shapes: everything the header says is checked
against the length of the data before any tensor is made. Nothing is ever unpickled.

INT8 and INT4 round keys and values to `grids`; positions, bias and salience stay exact, for they
are a small part and say where a slot stands and what it weighs. Rounded numbers are not rounded
again: a span keeps the bytes that it was rounded to, and is written as these.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from still_memory.errors import DamageError, InputError
from still_memory.grids import Grid, groups_of, numbers, quantised
from still_memory.span import Slots, Span

EXACT = "exact"
BITS = {"int8": 8, "int4": 4}
CODECS = (EXACT, *BITS)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STORED = {**_DTYPES, "U8": torch.uint8}
_STORED_NAMES = {dtype: name for name, dtype in _STORED.items()}
_SLOTS = ("positions", "bias", "salience")  # float32 each; the last two where there are
_ORDER = ("keys", "values", *_SLOTS)
_GROUPED = {"keys": 1, "values": 2}  # the axis along which numbers share a grid
_EDGES = tuple(f"{name}_{edge}" for name in _GROUPED for edge in ("low", "high"))
_ORDER_ON_GRIDS = (*_SLOTS, *_EDGES, *_GROUPED)  # the widest numbers first: they stay aligned
_MAX_HEADER = 4096  # nine tensors need under 800 bytes
_MAX_DIM = 2**31 - 1

assert sys.byteorder == "little", "the codecs write tensors' own bytes"

_Seen = Mapping[str, tuple[str | None, tuple[int, ...]]]


def check_codec(codec: str) -> str:
    """InputError for a name that is none of `CODECS`."""
    if codec not in CODECS:
        raise InputError(f"there is no codec {codec!r}: choose one of {', '.join(CODECS)}")
    return codec


def settled(span: Span, codec: str) -> Span:
    """The span as a store will give it back: under "exact" with the same numbers, else rounded.

    Whoever makes a span settles it before it is used, so that what is computed now and what is
    computed after a resume are the same. InputError for numbers that cannot be rounded.
    """
    coded: tuple[bytes, ...] = ()
    layers = span.layers
    if check_codec(codec) != EXACT:
        coded = tuple(encode(slots, codec) for slots in span.layers)
        layers = tuple(
            decode(data, f"a layer of {span}", slots.keys.device, codec)
            for data, slots in zip(coded, span.layers, strict=True)
        )
    return replace(span, layers=layers, codec=codec, coded=coded)


def encode(slots: Slots, codec: str = EXACT) -> bytes:
    """Safetensors bytes of a layer's tensors. Exact: in the dtypes they have.

    InputError for tensors that are not one layer's slots, and, where they are to be rounded, for
    keys and values that are not finite or too large.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in slots.tensors().items()}
    if fault := _fault({n: (_NAMES.get(t.dtype), tuple(t.shape)) for n, t in tensors.items()}):
        raise InputError(f"these slots cannot be stored: {fault}")
    if codec in BITS:
        tensors = _on_grids(tensors, BITS[codec])
    header: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {
            "dtype": _STORED_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor's bytes start aligned
    return b"".join([struct.pack("<Q", len(text)), text, *map(_bytes, tensors.values())])


def decode(data: bytes, what: str, device: torch.device | str = "cpu", codec: str = EXACT) -> Slots:
    """The slots that `encode` wrote; exact ones bit for bit, as views of one copy of `data`.

    Raises DamageError, naming `what`, if the header does not describe exactly these bytes.
    """
    start, layout = _read_header(data, what, BITS.get(codec))
    buffer = bytearray(data)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, low) in layout.items():
        count = math.prod(shape)
        tensors[name] = (
            torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + low)
            if count
            else torch.empty(0, dtype=dtype)
        ).view(shape)
    if codec in BITS:
        tensors = _off_grids(tensors, BITS[codec])
    return Slots(**{name: tensor.to(device) for name, tensor in tensors.items()})


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    if flat.numel() == 1:  # of any stride, which a view as bytes does not bear
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _on_grids(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, dim in _GROUPED.items():
        grid = quantised(tensors[name], bits, dim)
        if not numbers(grid, bits, dim).isfinite().all():
            raise InputError(
                f"{name} that are not finite, or too large, cannot be rounded to {bits} bits: look "
                "at the model that made them, or store them with the codec 'exact'"
            )
        found |= {f"{name}_low": grid.low, f"{name}_high": grid.high}
        found[name] = grid.steps if bits == 8 else _paired(grid.steps)
    found |= {name: tensors[name] for name in _SLOTS if name in tensors}
    return {name: found[name].contiguous() for name in _ORDER_ON_GRIDS if name in found}


def _off_grids(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    found = {name: tensors[name] for name in _SLOTS if name in tensors}
    slots = tensors["positions"].shape[1]
    for name, dim in _GROUPED.items():
        steps = tensors[name] if bits == 8 else _parted(tensors[name], slots)
        grid = Grid(steps, tensors[f"{name}_low"], tensors[f"{name}_high"])
        found[name] = numbers(grid, bits, dim)
    return found


def _paired(steps: Tensor) -> Tensor:
    """Steps `(H, n, d)` below 16, those of slots 2i and 2i + 1 in the halves of one byte."""
    even, odd = steps[:, ::2].clone(), steps[:, 1::2]
    even[:, : odd.shape[1]] |= odd << 4
    return even


def _parted(pairs: Tensor, slots: int) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1, 2)[:, :slots]


_Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


def _read_header(data: bytes, what: str, bits: int | None) -> tuple[int, _Layout]:
    """Where the tensors' bytes start; dtype, shape and offset of each, all checked."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(data[8 : 8 + length])
        seen = {n: (f["dtype"], tuple(f["shape"])) for n, f in header.items()}
        if fault := _fault(seen) if bits is None else _fault_on_grids(seen, bits):
            raise ValueError(fault)
        layout: _Layout = {}
        at = 0
        for name, (dtype, shape) in seen.items():
            size = _STORED[dtype].itemsize * math.prod(shape)
            if header[name]["data_offsets"] != [at, at + size]:
                raise ValueError(f"{name} is not at bytes {at} to {at + size}")
            layout[name] = _STORED[dtype], shape, at
            at += size
        if 8 + length + at != len(data):
            raise ValueError(f"{at} bytes of tensors in a row of {len(data)}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise DamageError(
            f"{what} is damaged: {error}. Restore the store from a copy, or start a new session"
        ) from None
    return 8 + length, layout


def _fault(tensors: _Seen) -> str | None:
    """Why these dtypes and shapes are not one layer's slots, or None."""
    if tuple(tensors) != tuple(n for n in _ORDER if n in tensors or n in _ORDER[:3]):
        return f"tensors {', '.join(map(str, tensors))} instead of {', '.join(_ORDER)}"
    for name, (dtype, shape) in tensors.items():
        if dtype not in _DTYPES or (name in _SLOTS and dtype != "F32"):
            return f"{name} of dtype {dtype}"
        if not _sizes(shape):
            return f"{name} of shape {shape}"
    heads = tensors["keys"][1][:2]
    for name, (_, shape) in tensors.items():
        if shape[:2] != heads or len(shape) != (2 if name in _SLOTS else 3):
            return f"{name} of shape {shape} beside {heads[0] if heads else '?'} heads of keys"
    return None


def _fault_on_grids(tensors: _Seen, bits: int) -> str | None:
    """Why these are not one layer's slots with keys and values in so many bits, or None."""
    needed = {"positions", *_EDGES, *_GROUPED}
    if tuple(tensors) != tuple(n for n in _ORDER_ON_GRIDS if n in tensors or n in needed):
        return f"tensors {', '.join(map(str, tensors))} instead of {', '.join(_ORDER_ON_GRIDS)}"
    for name, (_, shape) in tensors.items():
        if not _sizes(shape) or len(shape) != (2 if name in _SLOTS else 3):
            return f"{name} of shape {shape}"
    heads, slots = tensors["positions"][1]
    expected: dict[str, tuple[str | None, tuple[int, ...]]]
    expected = {name: ("F32", (heads, slots)) for name in _SLOTS}
    for name, dim in _GROUPED.items():
        width, dtype = tensors[name][1][2], tensors[f"{name}_low"][0]
        if dtype not in _DTYPES:
            return f"{name}_low of dtype {dtype}"
        groups = (groups_of(slots), width) if dim == 1 else (slots, groups_of(width))
        expected |= {f"{name}_{edge}": (dtype, (heads, *groups)) for edge in ("low", "high")}
        expected[name] = "U8", (heads, -(-slots * bits // 8), width)
    for name, found in tensors.items():
        if found != expected[name]:
            return f"{name} of {found[0]} {found[1]} in {slots} slots of {heads} heads"
    return None


def _sizes(shape: tuple[int, ...]) -> bool:
    return all(type(n) is int and 0 <= n <= _MAX_DIM for n in shape)
