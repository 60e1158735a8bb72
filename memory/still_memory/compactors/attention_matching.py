"""Attention Matching: some keys stay, and what hangs on them is fitted (arXiv 2602.16284).

Closed form, for each context, layer and KV head. Reference queries come from repeating the
context. The keys that stay are those with the largest root mean square of attention weights, or
those that orthogonal matching pursuit picks; a bias makes up, by non-negative least squares, for
the mass of the keys that go; values are fitted by least squares, so that the short cache's
attention output is the long one's. Fitted where the slots will stand: densely.

The paper compacts a context once. Here a chunk is scored and fitted when it is raw, alone; from
then on its slots keep their values and biases, and compete by the scores that they carry. (To
refit old slots with the queries of a new chunk would be to forget what they answer.)

Left out of the paper: queries of self-study, which the model would have to be able to write, and
the new choice of keys whose mass came out next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from still_memory.compactors.looks import Looks, Reader, repeated, told
from still_memory.compactors.matching_pursuit import pursued
from still_memory.compactors.selection import join, ranked_in_the_middle, remembered
from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity
from still_memory.rotation import rotate, unrotate
from still_memory.shares import Counts, best, counted
from still_memory.span import Slots, Span

Keys = Literal["attention", "pursuit"]
MASS: dict[Keys, tuple[float, float]] = {  # of one slot, in tokens: the authors' bounds
    "attention": (math.exp(-3.0), math.exp(3.0)),
    "pursuit": (math.exp(-7.0), math.exp(7.0)),
}
STEPS = 100  # of the multiplicative updates (Lee and Seung 2001)


@dataclass(frozen=True)
class Fresh:
    """One layer of a chunk that was raw, as the queries of its repetition see it."""

    queries: Tensor  # (H_kv, n, d) with the scale of their logits, not rotated
    after: Tensor  # (n,) how many tokens behind the chunk's end each one stands
    logits: Tensor  # (H_kv, n, T)
    values: Tensor  # (H_kv, T, d)


@dataclass(frozen=True)
class AttentionMatchingCompactor:
    """The defaults are what was best on the reference model (docs/experiments.md).

    keys: picked by "attention", or by matching "pursuit" (the paper's best; `pursued`).
    ridge: how firmly values are held to what they were, as a share of the fit's scale (paper: 0).
    queries: the most that a KV head is fitted to, evenly taken (paper: 50,000).
    on_policy: fit a layer to the queries that it gets when those below are short already, as the
        paper does. The text is then repeated once for each layer.
    questions: token ids to read in place of a repetition; no rival then, but a ruler.
    """

    reader: Reader = field(repr=False)
    keys: Keys = "attention"
    ridge: float = 1e-2
    queries: int = 1024
    on_policy: bool = True
    questions: tuple[int, ...] = ()

    @property
    def identity(self) -> CompactorIdentity:
        options = ("keys", "ridge", "queries", "on_policy", "questions")
        config = " ".join(f"{name}={getattr(self, name)}" for name in options)
        return CompactorIdentity(method="attention-matching", config=config)

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        if not spans:
            raise CompactorError("there is no span to compact: give one or more")
        _, _, ids = told(spans)
        whole = [join(parts) for parts in zip(*(span.layers for span in spans), strict=True)]
        each = counted(slots, len(whole), len(whole[0].keys)).to(whole[0].keys.device)
        counts = [n.clamp(max=len(layer)) for n, layer in zip(each, whole, strict=True)]
        most = max(int(count.max()) for count in counts)
        standing = [layer.cut(len(layer) - len(ids), len(layer)) for layer in whole]
        mine = self.identity.address
        layers: list[Slots] = []
        for n, layer in enumerate(whole):
            if ids and (n == 0 or self.on_policy):
                held = max(map(len, standing))
                flush = tuple(_padded(s, held - len(s), 0) for s in standing)
                context = Span(0, len(ids), flush, rotated_at=None)
                looks = list(repeated(self.reader, [context], ids, self.questions))
            chunk = layer.cut(len(layer) - len(ids), len(layer))
            fresh = self._fresh(chunk, [part[n] for part in looks], held) if ids else None
            known = remembered(spans, n, mine)
            short, alone = self._short(layer, known, fresh, counts[n], most)
            layers.append(short)
            if self.on_policy:
                standing[n] = _padded(alone, 0, most - len(alone))
        return Span(
            start=spans[0].start,
            end=spans[-1].end,
            layers=tuple(layers),
            rotated_at=None,
            rounds=1 + max(span.rounds for span in spans),
            compactor=mine,
        )

    def _fresh(self, chunk: Slots, looks: Sequence[Looks], held: int) -> Fresh:
        """What `looks` say of `chunk`; the text that they come from took `held` slots."""
        found = zip(*(self._free(look, held) for look in looks), strict=True)
        queries, after = (torch.cat(parts, dim=-2) for parts in found)
        after = after[:, 0]
        long = rotate(chunk.keys.float(), _places(chunk.keys), self.reader.rope)
        logits = rotate(queries, after + len(chunk), self.reader.rope) @ long.mT
        return Fresh(queries, after, logits, chunk.values.float())

    def _free(self, look: Looks, held: int) -> tuple[Tensor, Tensor]:
        """A sample of `Fresh.queries`, and of `Fresh.after` as a column."""
        heads, _, d = look.keys.shape
        after = torch.arange(look.queries.shape[1], device=look.queries.device, dtype=torch.float32)
        queries = unrotate(look.queries.float(), after + held, self.reader.rope) * d**-0.5
        queries, after = queries.reshape(heads, -1, d), after.repeat(len(queries) // heads)
        step = -(-len(after) // self.queries)
        return queries[:, ::step], after[::step, None]

    def _short(
        self, slots: Slots, scores: Tensor, fresh: Fresh | None, counts: Tensor, most: int
    ) -> tuple[Slots, Slots]:
        """One layer, and of it what came from `fresh` alone, its last slots, which were raw.

        `most`: slots at the largest layer, behind which queries will stand.
        """
        old = len(slots) if fresh is None else len(slots) - fresh.logits.shape[-1]
        widest = int(counts.max())
        if fresh is not None:
            scores[:, old:] = self._worth(fresh.logits, widest)
        bias = torch.zeros_like(slots.positions) if slots.bias is None else slots.bias
        scores = ranked_in_the_middle(scores).masked_fill(bias == -torch.inf, -torch.inf)
        kept, beyond = best(scores, counts)  # (H_kv, t)
        row = torch.arange(len(kept), device=kept.device)[:, None]
        keys, values, bias = slots.keys[row, kept], slots.values[row, kept], bias[row, kept]
        held = ~beyond  # what is left of a smaller head's is empty
        new = held & (kept >= old)
        if fresh is not None:
            fitted, mass = self._fitted(fresh, keys, values, new, most)
            values, bias = fitted.to(values.dtype), bias.where(~new, mass.log())
        bias, alone = (bias.masked_fill(~there, -torch.inf) for there in (held, new))
        short = Slots(keys, values, slots.positions[row, kept], bias, scores[row, kept])
        return short, replace(short, bias=alone)

    def _worth(self, logits: Tensor, count: int) -> Tensor:
        """Scores (H_kv, T) of fresh keys, of which at most `count` will stay in a head."""
        scores = logits.softmax(-1).square().mean(1).sqrt()
        if self.keys == "attention":
            return scores
        parts = (logits - logits.amax(-1, keepdim=True)).exp()
        picks = pursued(parts, min(count, parts.shape[-1]), MASS[self.keys])
        return _in_order(scores, picks)

    def _fitted(
        self, fresh: Fresh, keys: Tensor, values: Tensor, new: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Values (H_kv, t, d), and masses (H_kv, t), of slots of which only the new are fitted."""
        asking = rotate(fresh.queries, fresh.after + most, self.reader.rope)
        short = asking @ rotate(keys.float(), _places(keys), self.reader.rope).mT  # (H_kv, n, t)
        short = short.masked_fill(~new[:, None], torch.finfo(short.dtype).min)
        top = torch.maximum(fresh.logits.amax(-1, keepdim=True), short.amax(-1, keepdim=True))
        whole = (fresh.logits - top).exp().sum(-1)
        mass = _masses((short - top).exp(), whole, MASS[self.keys])
        mixing = (short + mass.log()[:, None]).softmax(-1) * new[:, None]
        missing = fresh.logits.softmax(-1) @ fresh.values - mixing @ values.float()
        return values + self._change(mixing, missing), mass

    def _change(self, mixing: Tensor, missing: Tensor) -> Tensor:
        """Of the values (H_kv, t, d), so that `mixing` of it is what was `missing`: ridge."""
        normal = mixing.mT @ mixing
        scale = normal.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        normal.diagonal(dim1=1, dim2=2).add_(self.ridge * scale + 1e-9)
        return torch.linalg.solve(normal, mixing.mT @ missing)


def _places(keys: Tensor) -> Tensor:
    """Where slots (H_kv, t, d) will stand."""
    return torch.arange(keys.shape[1], device=keys.device, dtype=torch.float32)


def _in_order(scores: Tensor, picks: Tensor) -> Tensor:
    """The same scores (H, T), dealt out anew: the n-th of `picks` (H, t) gets the n-th best."""
    others = scores.scatter(1, picks, -torch.inf).argsort(dim=1, descending=True)
    order = torch.cat([picks, others[:, : scores.shape[1] - picks.shape[1]]], dim=1)
    return scores.scatter(1, order, scores.sort(dim=1, descending=True).values)


def _padded(slots: Slots, front: int, back: int) -> Slots:
    """Empty slots before and behind; where there are none, the slots as they are."""
    if not front + back:
        return slots
    bias = torch.zeros_like(slots.positions) if slots.bias is None else slots.bias
    return Slots(
        pad(slots.keys, (0, 0, front, back)),
        pad(slots.values, (0, 0, front, back)),
        pad(slots.positions, (front, back)),
        pad(bias, (front, back), value=-torch.inf),
    )


def _masses(parts: Tensor, whole: Tensor, bounds: tuple[float, float]) -> Tensor:
    """w (H, t) within `bounds`, so that `parts` (H, n, t) times w comes near `whole` (H, n)."""
    mass = torch.ones_like(parts[:, 0])
    wanted = (parts.mT @ whole[..., None]).squeeze(-1)
    normal = parts.mT @ parts
    for _ in range(STEPS):
        got = (normal @ mass[..., None]).squeeze(-1)
        mass = (mass * wanted / got.clamp(min=1e-12)).clamp(*bounds)
    return mass
