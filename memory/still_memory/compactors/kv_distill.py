"""KV-Distill: keep the best tokens, and let them absorb the rest (arXiv 2503.10337).

A scorer ranks tokens by a hidden state of the frozen model. The model then reads them a second
time: where a token will be kept, its attention's projections carry LoRA (arXiv 2106.09685), so that
its keys and values gather what the dropped ones said. Every layer and head keeps the same tokens.
The model that decodes is the frozen one.

A compactor gets keys and values, and hidden states are gone by then; so raw spans are read again,
on top of the compact ones, once plainly and once adapted. What a kept slot gains is the difference
of the two: its own keys and values have seen what a re-read cannot, such as a pinned prefix, and
LoRA at zero changes no bit of them. Slots that are compact already stay as they are, and compete
by the score they carry. docs/evaluation.md names every departure from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from still_memory.compactors.cache import Cache
from still_memory.compactors.looks import told
from still_memory.compactors.selection import ranked_in_the_middle
from still_memory.compactors.trained import TrainedCompactor, settings_of
from still_memory.errors import CompactorError, InputError
from still_memory.identity import ModelIdentity
from still_memory.shares import Counts, best, counted, even, most
from still_memory.span import Span

Adapt = Callable[[int, str, Tensor, slice], Tensor | None]
"""What to add to a projection's output: (layer; "q", "k", "v" or "o"; its input (B, n, w); which of
the tokens being read these n are), or None for nothing."""


class Reader(Protocol):
    """A frozen model that can be read with changed projections."""

    def read(self, before: Cache, ids: Tensor, adapt: Adapt) -> tuple[list[Tensor], list[Tensor]]:
        """Un-rotated keys and values, L of (B, H_kv, n, d), of tokens (B, n) read after `before`.

        Differentiable. Changes nothing, and no other reading that runs at the same time.
        """
        ...


class KVDistillConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(gt=0, le=1024)
    heads: int = Field(gt=0, le=1024)
    kv_heads: int = Field(gt=0, le=1024)
    head_dim: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=65536)
    """Of the model's hidden states."""

    rank: int = Field(32, gt=0, le=1024)
    scored_at: int = Field(2, ge=0, lt=1024)
    """The layer, counted from 0, whose attention input the scorer reads."""
    scorer_width: int = Field(64, gt=0, le=4096)


class LoRA(nn.Module):
    """A change of low rank to a linear map; none at the start."""

    def __init__(self, inward: int, outward: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inward) * inward**-0.5)
        self.up = nn.Parameter(torch.zeros(outward, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class KVDistillCompactor(TrainedCompactor):
    """See the module. `model` is the identity of the model that `reader` is."""

    method = "kv-distill"
    config: KVDistillConfig

    def __init__(self, config: KVDistillConfig, model: ModelIdentity, reader: Reader) -> None:
        super().__init__(config, model)
        c = config
        if c.scored_at >= c.layers:
            raise InputError(f"there is no layer {c.scored_at} to score at, of {c.layers}")
        self.reader = reader
        inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = {
            "q": (c.width, inner), "k": (c.width, kv), "v": (c.width, kv), "o": (inner, c.width)
        }  # fmt: skip
        self.adapters = nn.ModuleDict(
            {
                f"{layer}{name}": LoRA(*shape, c.rank)
                for layer in range(c.layers)
                for name, shape in shapes.items()
                # Nothing is kept of what the last layer's attention gives.
                if name in "kv" or layer < c.layers - 1
            }
        )
        self.scorer = nn.Sequential(
            nn.Linear(c.width, c.scorer_width), nn.SiLU(), nn.Linear(c.scorer_width, 1)
        )

    # -- one compaction -----------------------------------------------------------------------

    def forward(self, cache: Cache, slots: int | Counts, ids: Tensor) -> Cache:
        """At most `slots` slots of `cache`, whose last ones are the raw tokens `ids` (B, n).

        A kept slot's bias is what it was; a raw one's is a zero with the gradient of its score, so
        that the scorer learns from how much attention the slot should get (the straight-through
        estimator of Dodo, arXiv 2310.02409).
        """
        n = ids.shape[1]
        old = cache.slots - n
        salience = cache.salience.masked_fill(cache.bias == -torch.inf, torch.nan)
        if n:
            plain, scores = self._read_plainly(cache.cut(0, old), ids)
            score = scores[:, None].expand(cache.bias[..., old:].shape)  # (L, B, H, n)
            salience = torch.cat([salience[..., :old], score.detach()], dim=-1)
        salience = ranked_in_the_middle(salience)
        worth = salience.masked_fill(cache.bias == -torch.inf, -torch.inf)
        layers, _, heads, _ = worth.shape
        counts = counted(slots, layers, heads).to(worth.device)
        chosen, beyond = best(worth, counts[:, None])
        cache = replace(cache, salience=salience)
        if n:
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter(3, chosen, ~beyond)
            cache = self._absorbed(cache, ids, kept[..., old:].any(2).any(0), plain)
            through = F.pad(score - score.detach(), (old, 0))
            cache = replace(cache, bias=cache.bias + through)
        short = cache.gather(chosen)
        return replace(
            short,
            bias=short.bias.masked_fill(beyond, -torch.inf),
            settled=torch.ones_like(chosen, dtype=torch.bool),
        )

    @torch.no_grad()
    def score(self, cache: Cache, ids: Tensor) -> Tensor:
        """Scores (B, n) of the raw tokens that end `cache`."""
        return self._read_plainly(cache.cut(0, cache.slots - ids.shape[1]), ids)[1]

    def _read_plainly(
        self, before: Cache, ids: Tensor
    ) -> tuple[tuple[list[Tensor], list[Tensor]], Tensor]:
        """Keys and values as the frozen model gives them, and scores (B, n), which learn."""
        hidden: list[Tensor] = []

        def listen(layer: int, name: str, x: Tensor, tokens: slice) -> None:
            if (layer, name) == (self.config.scored_at, "q"):
                hidden.append(x)

        with torch.no_grad():
            plain = self.reader.read(before, ids, listen)
        return plain, self.scorer(torch.cat(hidden, dim=1).float()).squeeze(-1)

    def _absorbed(
        self, cache: Cache, ids: Tensor, kept: Tensor, plain: tuple[list[Tensor], list[Tensor]]
    ) -> Cache:
        """`cache` with what the raw tokens gain where they are `kept` (B, n)."""
        old = cache.slots - ids.shape[1]

        def adapt(layer: int, name: str, x: Tensor, tokens: slice) -> Tensor | None:
            if (key := f"{layer}{name}") not in self.adapters:
                return None
            return self.adapters[key](x) * kept[:, tokens, None].to(x.dtype)

        before = cache.cut(0, old)
        adapted = self.reader.read(before.detached(), ids, adapt)
        keys, values = (
            [
                torch.cat([own[:, :, :old].float(), own[:, :, old:].float() + (a - p)], dim=2)
                for own, a, p in zip(side, changed, unchanged, strict=True)
            ]
            for side, changed, unchanged in zip(
                (cache.keys, cache.values), adapted, plain, strict=True
            )
        )
        return replace(cache, keys=keys, values=values)

    # -- over spans ---------------------------------------------------------------------------

    @torch.inference_mode()
    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        """See `Compactor.compact`.

        Raises CompactorError for fewer than one slot, for raw spans whose tokens are not known
        and for spans of another model.
        """
        if not spans:
            raise CompactorError("there is no span to compact: give one or more")
        compact, raw, ids = told(spans)
        shape = (self.config.layers, self.config.kv_heads)
        cache = Cache.joined([*compact, *raw], self.identity, shape)
        if isinstance(slots, int):
            slots = even(slots, most(spans, longest), self.config.kv_heads)
        out = self(cache, slots, torch.tensor([ids], dtype=torch.long, device=cache.bias.device))
        lengths = counted(slots, *shape).amax(1).clamp(max=cache.slots).tolist()
        dtype = spans[0].layers[0].values.dtype
        return Span(
            start=spans[0].start, end=spans[-1].end,
            layers=out.written(dtype, lengths, salience=True),
            rotated_at=None, rounds=1 + max(s.rounds for s in spans),
            compactor=self.identity.address,
        )  # fmt: skip

    # -- on disk ------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path, model: ModelIdentity, reader: Reader) -> KVDistillCompactor:
        """The compactor in `folder`, for `reader`, which is `model`.

        Raises CompactorError if the folder holds none or it is damaged, IdentityError if it was
        trained against another model.
        """
        config, trained_for = settings_of(folder, cls.method, KVDistillConfig, model)
        compactor = cls(config, trained_for, reader)
        compactor.fill(folder)
        return compactor
