"""Rotary positions of stored keys: undone, and done anew where a slot is placed.

Live and resumed state share `place`, and it always starts from a span's stored bytes, in
fp32. So placements do not drift, and a resumed cache equals the one that was saved, bit for
bit. RoPE: arXiv 2104.09864, in the half-split layout of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from still_memory.span import Span


class Rope(Protocol):
    """The base model's rotary embedding."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, `(*positions.shape, d)` in fp32, attention scaling included."""
        ...


def rotate(keys: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Keys `(H, S, d)` rotated at `positions`, `(S,)` or `(H, S)`; fp32 inside."""
    cos, sin = rope(positions)
    return _turn(keys.float(), cos, sin).to(keys.dtype)


def unrotate(keys: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotate`, returned in fp32."""
    cos, sin = rope(positions)
    scaling = cos.square() + sin.square()
    return _turn(keys.float(), cos / scaling, -sin / scaling)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of `x` as two axes, turned; `cos` and `sin` are the same for both halves."""
    a, b = x.chunk(2, dim=-1)
    c, s = (t.chunk(2, dim=-1)[0] for t in (cos, sin))
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def _positions(first: int, count: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32, device=like.device)


def free(span: Span, rope: Rope) -> Span:
    """The span with the rotation of its keys undone (fp32 keys), as compactors read it."""
    if span.rotated_at is None:
        return span
    layers = [
        replace(s, keys=unrotate(s.keys, _positions(span.rotated_at, len(s), s.keys), rope))
        for s in span.layers
    ]
    return replace(span, layers=tuple(layers), rotated_at=None)


def place(span: Span, layer: int, base: int, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Layer `layer`'s keys `(H_kv, S, d)` rotated at `base`, `base + 1`, ...

    Slots are placed densely, in order: a slot takes one position, whatever it stands for.
    So a layer of `n` slots never uses a position past `base + n - 1`, and a conversation may
    outgrow the model's window by any factor. Keys that already stand there are returned as they
    are.
    """
    slots = span.layers[layer]
    if span.rotated_at == base:
        return slots.keys.to(dtype)
    keys = slots.keys
    if span.rotated_at is not None:
        keys = unrotate(keys, _positions(span.rotated_at, len(slots), keys), rope)
    return rotate(keys.float(), _positions(base, len(slots), keys), rope).to(dtype)
