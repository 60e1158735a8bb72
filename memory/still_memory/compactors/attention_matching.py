"""Attention Matching: some keys stay, and what hangs on them is fitted (arXiv 2602.16284).

Closed form, for each context, layer and KV head. Reference queries come from repeating the
context. The keys that stay are those with the largest root mean square of attention weights; a
bias makes up, by non-negative least squares, for the mass of the keys that go; values are fitted
by least squares, so that the short cache's attention output is the long one's. Fitted where the
slots will stand: densely, from position 0 on.

Left out of the paper: orthogonal matching pursuit as the other way to pick keys, later layers'
queries recomputed on the earlier layers' short caches, and budgets of unequal heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from still_memory.compactors.looks import Looks, Reader, repeated, told
from still_memory.compactors.selection import join
from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.rotation import rotate, unrotate
from still_memory.span import Slots, Span

HEAVIEST = 20.0  # tokens' worth of mass that one slot may be given at most
STEPS = 100  # of the multiplicative updates (Lee and Seung 2001)


@dataclass(frozen=True)
class AttentionMatchingCompactor:
    """`ridge`: how firmly values are held to what they were, as a share of the fit's scale."""

    reader: Reader = field(repr=False)
    ridge: float = 1e-2

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(method="attention-matching", config=f"ridge={self.ridge}")

    def compact(self, spans: Sequence[Span], slots: int) -> Span:
        if not spans or slots < 1:
            raise CompactorError(f"cannot keep {slots} slots of {len(spans)} spans: give one each")
        _, _, ids = told(spans)
        parts = list(repeated(self.reader, spans, ids))
        layers = [join(layer) for layer in zip(*(span.layers for span in spans), strict=True)]
        return Span(
            start=spans[0].start,
            end=spans[-1].end,
            layers=tuple(
                self._fitted(layer, looks, slots)
                for layer, looks in zip(layers, zip(*parts, strict=True), strict=True)
            ),
            rotated_at=None,
            rounds=1 + max(span.rounds for span in spans),
            compactor=self.identity.address,
        )

    def _fitted(self, slots: Slots, looks: Sequence[Looks], count: int) -> Slots:
        held, count = len(slots), min(count, len(slots))
        heads, _, d = slots.keys.shape
        long = looks[0].keys[:, :held].float()
        queries = torch.cat([look.queries for look in looks], dim=1).float()  # (H, n, d)
        at = torch.cat([torch.arange(look.queries.shape[1]) for look in looks]) + held
        at = at.to(queries)
        moved = rotate(unrotate(queries, at, self.reader.rope), at - held + count, self.reader.rope)
        queries, moved = (q.reshape(heads, -1, d) * d**-0.5 for q in (queries, moved))
        bias = torch.zeros_like(slots.positions) if slots.bias is None else slots.bias
        logits = queries @ long.mT + bias[:, None]  # (H_kv, G n, S)
        weights = logits.softmax(-1)

        kept = weights.square().mean(1).topk(count, dim=1).indices.sort(dim=1).values
        row = torch.arange(heads, device=kept.device)[:, None]
        keys, values = slots.keys[row, kept].float(), slots.values[row, kept].float()
        places = torch.arange(count, device=kept.device, dtype=torch.float32)
        short = moved @ rotate(keys, places, self.reader.rope).mT  # (H_kv, G n, t)

        most = torch.maximum(logits.amax(-1, keepdim=True), short.amax(-1, keepdim=True))
        mass = _masses((short - most).exp(), (logits - most).exp().sum(-1))
        beta = mass.clamp(min=1e-6).log()
        mixing = (short + beta[:, None]).softmax(-1)
        values = values + self._change(mixing, weights @ slots.values.float() - mixing @ values)
        return Slots(keys, values.to(slots.values.dtype), slots.positions[row, kept], beta.float())

    def _change(self, mixing: Tensor, missing: Tensor) -> Tensor:
        """Of the values (H_kv, t, d), so that `mixing` of it is what was `missing`: ridge."""
        normal = mixing.mT @ mixing
        scale = normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        normal.diagonal(dim1=1, dim2=2).add_(self.ridge * scale + 1e-9)
        return torch.linalg.solve(normal, mixing.mT @ missing)


def _masses(parts: Tensor, whole: Tensor) -> Tensor:
    """w (H, t), 0 <= w <= HEAVIEST, so that `parts` (H, n, t) times w comes near `whole` (H, n)."""
    mass = torch.ones_like(parts[:, 0])
    wanted = (parts.mT @ whole[..., None]).squeeze(-1)
    normal = parts.mT @ parts
    for _ in range(STEPS):
        got = (normal @ mass[..., None]).squeeze(-1)
        mass = (mass * wanted / got.clamp(min=1e-12)).clamp(max=HEAVIEST)
    return mass
