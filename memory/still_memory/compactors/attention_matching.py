"""Attention Matching: some keys stay, and what hangs on them is fitted (arXiv 2602.16284).

Closed form, for each context, layer and KV head. Reference queries come from repeating the
context. The keys that stay are those with the largest root mean square of attention weights; a
bias makes up, by non-negative least squares, for the mass of the keys that go; values are fitted
by least squares, so that the short cache's attention output is the long one's. Fitted where the
slots will stand: densely.

The paper compacts a context once. Here a chunk is scored and fitted when it is raw, alone; from
then on its slots keep their values and biases, and compete by the scores that they carry. (To
refit old slots with the queries of a new chunk would be to forget what they answer.)

Left out of the paper: orthogonal matching pursuit as the other way to pick keys, later layers'
queries recomputed on the earlier layers' short caches, and budgets of unequal heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from still_memory.compactors.looks import Looks, Reader, repeated, told
from still_memory.compactors.selection import join, ranked_in_the_middle, remembered
from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.rotation import rotate, unrotate
from still_memory.span import Slots, Span

MASS = math.exp(-3.0), math.exp(3.0)  # of one slot, in tokens: the authors' bounds
STEPS = 100  # of the multiplicative updates (Lee and Seung 2001)
MOST_QUERIES = 1024  # of a head, evenly taken: more than slots are fitted to


@dataclass(frozen=True)
class Fresh:
    """A chunk that was raw, and the queries of its repetition, for one layer."""

    slots: int
    queries: Tensor  # (H_kv, n, d) with the scale of their logits, not rotated
    after: Tensor  # (n,) how many tokens behind the chunk's end each one stands


@dataclass(frozen=True)
class AttentionMatchingCompactor:
    """`ridge`: how firmly values are held to what they were, as a share of the fit's scale.

    `questions`: token ids to read in place of a repetition; no rival then, but a ruler.
    """

    reader: Reader = field(repr=False)
    ridge: float = 1e-2
    questions: tuple[int, ...] = ()

    @property
    def identity(self) -> CompactorIdentity:
        config = f"ridge={self.ridge}" + (f" questions={self.questions}" if self.questions else "")
        return CompactorIdentity(method="attention-matching", config=config)

    def compact(self, spans: Sequence[Span], slots: int) -> Span:
        if not spans or slots < 1:
            raise CompactorError(f"cannot keep {slots} slots of {len(spans)} spans: give one each")
        _, raw, ids = told(spans)
        asked: list[list[Tensor]] = [[] for _ in spans[0].layers]
        after: list[Tensor] = []
        for part in repeated(self.reader, raw, ids, self.questions):
            for queries, look in zip(asked, part, strict=True):
                found, at = _free(look, len(ids), self.reader)
                queries.append(found)
            after.append(at)
        mine = self.identity.address
        layers = []
        for n, parts in enumerate(zip(*(span.layers for span in spans), strict=True)):
            layer, known = join(parts), remembered(spans, n, mine)
            fresh = Fresh(len(ids), torch.cat(asked[n], dim=1), torch.cat(after)) if ids else None
            layers.append(self._short(layer, known, fresh, slots))
        return Span(
            start=spans[0].start,
            end=spans[-1].end,
            layers=tuple(layers),
            rotated_at=None,
            rounds=1 + max(span.rounds for span in spans),
            compactor=mine,
        )

    def _short(self, slots: Slots, scores: Tensor, fresh: Fresh | None, count: int) -> Slots:
        """One layer; `fresh` tells of its last slots, which were raw."""
        count = min(count, len(slots))
        rope = self.reader.rope
        bias = torch.zeros_like(slots.positions) if slots.bias is None else slots.bias
        if fresh is not None:
            old = len(slots) - fresh.slots
            places = torch.arange(fresh.slots, device=bias.device, dtype=torch.float32)
            long = rotate(slots.keys[:, old:].float(), places, rope)
            logits = rotate(fresh.queries, fresh.after + fresh.slots, rope) @ long.mT
            weights = logits.softmax(-1)
            scores[:, old:] = weights.square().mean(1).sqrt()
        scores = ranked_in_the_middle(scores).masked_fill(bias == -torch.inf, -torch.inf)

        kept = scores.topk(count, dim=1).indices.sort(dim=1).values
        row = torch.arange(len(kept), device=kept.device)[:, None]
        keys, values, bias = slots.keys[row, kept], slots.values[row, kept].float(), bias[row, kept]
        if fresh is not None:
            new = kept >= old  # (H_kv, t)
            places = torch.arange(count, device=kept.device, dtype=torch.float32)
            asking = rotate(fresh.queries, fresh.after + count, rope)
            short = asking @ rotate(keys.float(), places, rope).mT  # (H_kv, n, t)
            short = short.masked_fill(~new[:, None], torch.finfo(short.dtype).min)
            most = torch.maximum(logits.amax(-1, keepdim=True), short.amax(-1, keepdim=True))
            mass = _masses((short - most).exp(), (logits - most).exp().sum(-1))
            bias = bias.where(~new, mass.log())
            mixing = (short + mass.log()[:, None]).softmax(-1) * new[:, None]
            missing = weights @ slots.values[:, old:].float() - mixing @ values
            values = values + self._change(mixing, missing)
        return Slots(
            keys, values.to(slots.values.dtype), slots.positions[row, kept], bias, scores[row, kept]
        )

    def _change(self, mixing: Tensor, missing: Tensor) -> Tensor:
        """Of the values (H_kv, t, d), so that `mixing` of it is what was `missing`: ridge."""
        normal = mixing.mT @ mixing
        scale = normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        normal.diagonal(dim1=1, dim2=2).add_(self.ridge * scale + 1e-9)
        return torch.linalg.solve(normal, mixing.mT @ missing)


def _free(look: Looks, held: int, reader: Reader) -> tuple[Tensor, Tensor]:
    """A sample of `Fresh.queries` and `Fresh.after`; the text takes `held` slots."""
    heads, _, d = look.keys.shape
    after = torch.arange(look.queries.shape[1], device=look.queries.device, dtype=torch.float32)
    queries = unrotate(look.queries.float(), after + held, reader.rope) * d**-0.5
    queries, after = queries.reshape(heads, -1, d), after.repeat(len(queries) // heads)
    step = -(-len(after) // MOST_QUERIES)
    return queries[:, ::step], after[::step]


def _masses(parts: Tensor, whole: Tensor) -> Tensor:
    """w (H, t) within MASS, so that `parts` (H, n, t) times w comes near `whole` (H, n)."""
    mass = torch.ones_like(parts[:, 0])
    wanted = (parts.mT @ whole[..., None]).squeeze(-1)
    normal = parts.mT @ parts
    for _ in range(STEPS):
        got = (normal @ mass[..., None]).squeeze(-1)
        mass = (mass * wanted / got.clamp(min=1e-12)).clamp(*MASS)
    return mass
