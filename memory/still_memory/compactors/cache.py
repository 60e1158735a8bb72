"""Spans as a batch of tensors, as trained compactors compute on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from still_memory.errors import CompactorError, InputError
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass
class Cache:
    """A batch of caches; keys carry no rotation.

    Keys and values are one tensor a layer (stacked, a long cache would be copied whole). Layers
    with fewer slots are padded; a slot with bias minus infinity is empty. `settled` slots were
    written by an earlier round.
    """

    keys: list[Tensor]  # L of (B, H, S, d)
    values: list[Tensor]  # L of (B, H, S, d)
    positions: Tensor  # (L, B, H, S) logical
    bias: Tensor  # (L, B, H, S)
    mass: Tensor  # (L, B, H, S) tokens each slot stands for
    salience: Tensor  # (L, B, H, S) scorer's logits; NaN where it has not seen a slot
    settled: Tensor  # (L, B, H, S) bool

    @classmethod
    def raw(cls, keys: list[Tensor], values: list[Tensor], start: int = 0) -> Cache:
        """Freshly computed keys and values, one slot a token."""
        shape, device = (len(keys), *keys[0].shape[:-1]), keys[0].device
        positions = torch.arange(start, start + shape[-1], dtype=torch.float32, device=device)
        zero = torch.zeros(shape, device=device)
        return cls(
            keys, values, positions.expand(shape), zero, torch.ones_like(zero),
            torch.full_like(zero, torch.nan), torch.zeros_like(zero, dtype=torch.bool),
        )  # fmt: skip

    @classmethod
    def of(cls, span: Span) -> Cache:
        """A span as a batch of one. Layers are padded to the longest with empty slots.

        Raises InputError for a span whose keys are rotated.
        """
        if span.rotated_at is not None:
            raise InputError(f"{span} is rotated: pass it through still_memory.rotation.free first")
        longest = len(span)

        def padded(t: Tensor, filler: float) -> Tensor:
            room = longest - t.shape[1]
            pad = (0, 0, 0, room) if t.dim() == 3 else (0, room)
            return nn.functional.pad(t, pad, value=filler)[None] if room else t[None]

        def stack(name: str, missing: float, filler: float) -> Tensor:
            rows = []
            for slots in span.layers:
                t = getattr(slots, name)
                if t is None:
                    t = torch.full(slots.positions.shape, missing, device=slots.keys.device)
                rows.append(padded(t.float(), filler))
            return torch.stack(rows)  # (L, 1, H, S)

        bias = stack("bias", 0.0, -torch.inf)
        filled = (bias > -torch.inf).sum(-1, keepdim=True).clamp(min=1)
        return cls(
            [padded(slots.keys, 0.0) for slots in span.layers],
            [padded(slots.values, 0.0) for slots in span.layers],
            stack("positions", 0.0, span.end),
            bias,
            (span.tokens / filled).expand(bias.shape),
            stack("salience", torch.nan, -torch.inf),
            torch.full(bias.shape, not span.raw, device=bias.device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Cache]) -> Cache:
        """Caches one after the other. One alone is not copied."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            [torch.cat(layer, dim=2) for layer in zip(*(p.keys for p in parts), strict=True)],
            [torch.cat(layer, dim=2) for layer in zip(*(p.values for p in parts), strict=True)],
            *(torch.cat([getattr(p, name) for p in parts], dim=3) for name in PER_SLOT),
        )

    @classmethod
    def joined(
        cls, spans: Sequence[Span], compactor: CompactorIdentity, shape: tuple[int, int]
    ) -> Cache:
        """Spans end to end, as a batch of one. `shape`: the layers and KV heads they must have.

        What another than `compactor` noted of a slot's worth is left out: it has another scale.
        Raises InputError for rotated spans, CompactorError for spans of another shape.
        """
        parts = [cls.of(span) for span in spans]
        for part, span in zip(parts, spans, strict=True):
            if span.compactor != compactor.address:
                part.salience.fill_(torch.nan)
        cache = cls.cat(parts)
        layers, _, heads, _ = cache.bias.shape
        if (layers, heads) != shape:
            raise CompactorError(
                f"these spans have {layers} layers of {heads} KV heads, and this compactor takes "
                f"{shape[0]} of {shape[1]}: use it with the model that it was trained for"
            )
        return cache

    def written(
        self, dtype: torch.dtype, lengths: Sequence[int], *, salience: bool
    ) -> tuple[Slots, ...]:
        """The first row as layers of a span, each its first `lengths` slots; values in `dtype`."""
        layers = []
        for n, length in enumerate(lengths):
            slots = Slots(
                keys=self.keys[n][0, :, :length].float().contiguous(),
                values=self.values[n][0, :, :length].to(dtype).contiguous(),
                positions=self.positions[n, 0, :, :length].contiguous(),
                bias=self.bias[n, 0, :, :length].contiguous(),
                salience=self.salience[n, 0, :, :length].contiguous() if salience else None,
            )
            empty = slots.bias is None or not slots.bias.any()
            layers.append(replace(slots, bias=None) if empty else slots)
        return tuple(layers)

    def cut(self, low: int, high: int) -> Cache:
        """Views of slots `[low, high)`."""
        return Cache(
            [x[:, :, low:high] for x in self.keys], [x[:, :, low:high] for x in self.values],
            *(getattr(self, name)[..., low:high] for name in PER_SLOT),
        )  # fmt: skip

    def detached(self) -> Cache:
        """The same slots; nothing is learnt through them."""
        return Cache(
            [x.detach() for x in self.keys], [x.detach() for x in self.values],
            *(getattr(self, name).detach() for name in PER_SLOT),
        )  # fmt: skip

    def gather(self, index: Tensor) -> Cache:
        """Slots `index` (L, B, H, t) of each head."""

        def pick(layers: list[Tensor]) -> list[Tensor]:
            return [
                x.gather(2, i[..., None].expand(*i.shape, x.shape[-1]))
                for x, i in zip(layers, index, strict=True)
            ]

        return Cache(
            pick(self.keys), pick(self.values),
            *(getattr(self, name).gather(3, index) for name in PER_SLOT),
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]


PER_SLOT = [f.name for f in fields(Cache)][2:]  # (L, B, H, S) each
