"""Still: one Perceiver a layer, one forward pass from a long cache to a short one.

`forward` is batched and differentiable, for training; `compact` is the `Compactor` protocol
over spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from still_memory.compactors.cache import Cache
from still_memory.compactors.still.config import StillConfig
from still_memory.compactors.still.perceiver import Perceiver
from still_memory.compactors.still.scorer import Scorer
from still_memory.compactors.trained import TrainedCompactor, settings_of
from still_memory.errors import CompactorError
from still_memory.identity import ModelIdentity
from still_memory.shares import Counts, Shares, at_ratio, best, counted, dealt, even, most
from still_memory.span import Span


class StillCompactor(TrainedCompactor):
    """See the module."""

    method = "still"
    config: StillConfig

    def __init__(self, config: StillConfig, model: ModelIdentity) -> None:
        super().__init__(config, model)
        c = config
        self.perceivers = nn.ModuleList(
            Perceiver(c.kv_heads, c.head_dim, blocks=c.blocks, bank=c.bank, base=c.rope_base,
                      beta=c.beta, feed_forward=c.feed_forward, neighbourhood=c.neighbourhood)
            for _ in range(c.layers)
        )  # fmt: skip
        self.scorer = (
            Scorer(c.layers, c.kv_heads, c.head_dim, c.scorer_width, c.scorer_reach)
            if c.placement == "salient"
            else None
        )

    def _perceivers(self) -> list[Perceiver]:
        return cast("list[Perceiver]", list(self.perceivers))

    # -- one forward pass ---------------------------------------------------------------------

    def calibrate(self, cache: Cache) -> None:
        """Fit input scales to a sample of real caches. Once, before training."""
        for layer, perceiver in enumerate(self._perceivers()):
            perceiver.calibrate(torch.cat([cache.keys[layer], cache.values[layer]], dim=-1))
        if self.scorer is not None:
            self.scorer.calibrate(torch.stack(cache.keys), torch.stack(cache.values))

    def score(self, cache: Cache) -> Tensor:
        """Salience `(L, B, H, S)`: the stored one, or the scorer's where there is none."""
        assert self.scorer is not None
        new = cache.salience[0, 0, 0].isnan()  # equal over a batch and its heads
        salience = cache.salience.clone()
        if new.any():
            keys, values = ([x[..., new, :] for x in side] for side in (cache.keys, cache.values))
            fresh = self.scorer(keys, values).to(salience.dtype)
            if not self.config.per_head:
                fresh = fresh.mean((0, 2), keepdim=True).expand_as(fresh)
            salience[..., new] = fresh
        return salience

    def forward(self, cache: Cache, slots: int | Counts, ids: Tensor | None = None) -> Cache:
        """`slots` slots from a longer cache. Where they stand passes no gradient.

        Heads that get fewer than the largest end with empty slots. `ids`, the tokens of its raw
        slots, are for rivals that read them: Still reads none.
        """
        layers, _, heads, _ = cache.bias.shape
        counts = counted(slots, layers, heads).clamp(max=cache.slots).to(cache.bias.device)
        if self.config.placement == "even":
            return self._even(cache, counts)
        with torch.no_grad():
            salience = self.score(cache)
        worth = salience.masked_fill(cache.bias == -torch.inf, -torch.inf)
        chosen, beyond = best(worth, counts[:, None])  # (L, B, H, t)
        kept = cache.gather(chosen)
        kept.bias = kept.bias.masked_fill(beyond, -torch.inf)
        kept.salience = salience.gather(3, chosen)
        index = torch.arange(cache.slots, device=cache.bias.device)
        written = self._perceive(
            cache, index.expand(cache.bias.shape), chosen, torch.zeros_like(cache.bias), counts
        )
        if self.config.settled:
            for new, old in ((written.keys, kept.keys), (written.values, kept.values)):
                for n, settled in enumerate(kept.settled[..., None]):
                    new[n] = torch.where(settled, old[n], new[n].to(old[n].dtype))
            written.bias = torch.where(kept.settled, kept.bias, written.bias)
        written.bias = written.bias.masked_fill(kept.bias == -torch.inf, -torch.inf)
        written.positions, written.mass, written.salience = kept.positions, kept.mass, kept.salience
        return written

    def _even(self, cache: Cache, counts: Tensor) -> Cache:
        """The paper's placement: latents spread evenly over the tokens that are stood for."""
        mass = cache.mass.masked_fill(cache.bias == -torch.inf, 0.0)
        total = mass.sum(-1, keepdim=True)
        middle = (mass.cumsum(-1) - mass / 2) / total
        each = counts[:, None, :, None]
        cells = (middle * each).floor().clamp(min=0).minimum(each - 1)
        at = torch.arange(int(counts.max()), device=mass.device)
        at = at.expand(*mass.shape[:-1], len(at))
        written = self._perceive(cache, cells, at, mass.log(), counts)
        first, last = cache.positions[..., :1], cache.positions[..., -1:]
        share = at / (each - 1).clamp(min=1)
        written.positions = first + (last - first) * share
        written.mass = (total / each).expand(at.shape).clone()
        written.bias = written.bias.masked_fill(at >= each, -torch.inf)
        return written

    def _perceive(
        self, cache: Cache, cells: Tensor, at: Tensor, log_mass: Tensor, counts: Tensor
    ) -> Cache:
        """Latents at cells `at` (L, B, H, t), of which a head's first `counts` (L, H) matter."""
        slots = at.shape[-1]
        dtype = self._perceivers()[0].bank.dtype
        where = torch.arange(slots, device=at.device) / (counts - 1).clamp(min=1)[..., None]
        where = where.clamp(max=1)[:, None].expand(at.shape)
        log_mass = log_mass + cache.bias  # a slot weighs here as it does for the base model
        keys, values, betas = [], [], []
        for n, (perceiver, own) in enumerate(
            zip(self._perceivers(), counts.amax(1).tolist(), strict=True)
        ):
            tokens = torch.cat([cache.keys[n].to(dtype), cache.values[n].to(dtype)], dim=-1)
            k, v, beta = perceiver(
                tokens, cells[n], log_mass[n], where[n, ..., :own], at[n, ..., :own]
            )
            keys.append(F.pad(k, (0, 0, 0, slots - own)))
            values.append(F.pad(v, (0, 0, 0, slots - own)))
            beta = k.new_zeros(k.shape[:-1]) if beta is None else beta
            betas.append(F.pad(beta.float(), (0, slots - own)))
        zero = torch.zeros_like(where)
        return Cache(
            keys,
            values,
            zero,
            torch.stack(betas),
            zero,
            zero,
            torch.ones_like(at, dtype=torch.bool),
        )

    # -- over spans ---------------------------------------------------------------------------

    @torch.inference_mode()
    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        """See `Compactor.compact`. Raises CompactorError for fewer than one slot."""
        if not spans:
            raise CompactorError("there is no span to compact: give one or more")
        shape = self.config.layers, self.config.kv_heads
        cache = Cache.joined(spans, self.identity, shape)
        if self.scorer is not None:
            cache.salience = self.score(cache)
        if isinstance(slots, int):
            held = most(spans, longest)
            slots = (
                dealt(slots, self._shares(spans, slots), self._useful(cache, slots, held))
                if self.config.shares
                else even(slots, held, self.config.kv_heads)
            )
        counts = counted(slots, *shape)
        # Where every head gets all that there is, nothing is to be shortened.
        out = self(cache, slots) if int(counts.min()) < cache.slots else cache
        lengths = counts.amax(1).clamp(max=cache.slots).tolist()
        dtype = spans[0].layers[0].values.dtype
        written = out.written(dtype, lengths, salience=self.scorer is not None)
        return Span(
            start=spans[0].start, end=spans[-1].end, layers=written, rotated_at=None,
            rounds=1 + max(s.rounds for s in spans), compactor=self.identity.address,
        )  # fmt: skip

    def _shares(self, spans: Sequence[Span], slots: int) -> Shares:
        """Those for the ratio to which all tokens that `spans` stand for are shortened."""
        return at_ratio(self.config.shares, (spans[-1].end - spans[0].start) / slots)

    def _useful(self, cache: Cache, slots: int, most: Sequence[int]) -> list[int]:
        """The most of `most` that a layer can use beyond the mean layer's `slots`."""
        if self.scorer is None:
            return list(most)
        worth = (cache.salience >= self.config.worth) & (cache.bias > -torch.inf)
        useful = max(slots, int(worth.sum(-1).max()))
        return [min(n, useful) for n in most]

    # -- on disk ------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path, model: ModelIdentity) -> StillCompactor:
        """The compactor in `folder`, for `model`.

        Raises CompactorError if the folder holds none or it is damaged, IdentityError if it was
        trained against another model.
        """
        compactor = cls(*settings_of(folder, cls.method, StillConfig, model))
        compactor.fill(folder)
        return compactor
