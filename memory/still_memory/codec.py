"""One layer's slots as bytes, and back: the exact codec.

The bytes are a safetensors file: eight bytes of header length, a JSON header, the tensors'
own bytes in little-endian order. They are written and read here rather than by the library,
because slots are often views of one storage, which the library refuses, and because what is
read must be *these* tensors with *these* shapes: everything the header says is checked
against the length of the data before any tensor is made. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from still_memory.errors import DamageError, InputError
from still_memory.span import Slots

EXACT = "exact"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = ("keys", "values", "positions", "bias", "salience")  # the last two where there are
_MAX_HEADER = 4096  # five tensors need under 400 bytes
_MAX_DIM = 2**31 - 1

assert sys.byteorder == "little", "the exact codec writes tensors' own bytes"


def encode(slots: Slots) -> bytes:
    """Safetensors bytes of a layer's tensors, in the dtypes they have."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in slots.tensors().items()}
    if fault := _fault({n: (_NAMES.get(t.dtype), tuple(t.shape)) for n, t in tensors.items()}):
        raise InputError(f"these slots cannot be stored: {fault}")
    header: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor's bytes start aligned
    return b"".join([struct.pack("<Q", len(text)), text, *map(_bytes, tensors.values())])


def decode(data: bytes, what: str, device: torch.device | str = "cpu") -> Slots:
    """The slots that `encode` wrote, bit for bit, as views of one copy of `data`.

    Raises DamageError, naming `what`, if the header does not describe exactly these bytes.
    """
    start, layout = _read_header(data, what)
    buffer = bytearray(data)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, low) in layout.items():
        count = math.prod(shape)
        tensors[name] = (
            torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + low)
            if count
            else torch.empty(0, dtype=dtype)
        ).view(shape)
        tensors[name] = tensors[name].to(device)
    return Slots(**tensors)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


_Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


def _read_header(data: bytes, what: str) -> tuple[int, _Layout]:
    """Where the tensors' bytes start; dtype, shape and offset of each, all checked."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(data[8 : 8 + length])
        seen = {n: (f["dtype"], tuple(f["shape"])) for n, f in header.items()}
        if fault := _fault(seen):
            raise ValueError(fault)
        layout: _Layout = {}
        at = 0
        for name, (dtype, shape) in seen.items():
            size = _DTYPES[dtype].itemsize * math.prod(shape)
            if header[name]["data_offsets"] != [at, at + size]:
                raise ValueError(f"{name} is not at bytes {at} to {at + size}")
            layout[name] = _DTYPES[dtype], shape, at
            at += size
        if 8 + length + at != len(data):
            raise ValueError(f"{at} bytes of tensors in a row of {len(data)}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise DamageError(
            f"{what} is damaged: {error}. Restore the store from a copy, or start a new session"
        ) from None
    return 8 + length, layout


def _fault(tensors: Mapping[str, tuple[str | None, tuple[int, ...]]]) -> str | None:
    """Why these dtypes and shapes are not one layer's slots, or None."""
    if tuple(tensors) != tuple(n for n in _ORDER if n in tensors or n in _ORDER[:3]):
        return f"tensors {', '.join(map(str, tensors))} instead of {', '.join(_ORDER)}"
    for name, (dtype, shape) in tensors.items():
        if dtype not in _DTYPES or (name in _ORDER[2:] and dtype != "F32"):
            return f"{name} of dtype {dtype}"
        if not all(type(n) is int and 0 <= n <= _MAX_DIM for n in shape):
            return f"{name} of shape {shape}"
    heads = tensors["keys"][1][:2]
    for name, (_, shape) in tensors.items():
        if shape[:2] != heads or len(shape) != (3 if name in _ORDER[:2] else 2):
            return f"{name} of shape {shape} beside {heads[0] if heads else '?'} heads of keys"
    return None
