"""Still: one Perceiver a layer, one forward pass from a long cache to a short one.

`forward` is batched and differentiable, for training; `compact` is the `Compactor` protocol
over spans. A compactor is saved as a folder: `config.json` (settings and the identity of the
model it was trained against) and `model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from still_memory.compactors.still.config import StillConfig
from still_memory.compactors.still.perceiver import Perceiver
from still_memory.compactors.still.scorer import Scorer
from still_memory.errors import CompactorError, InputError
from still_memory.identity import CompactorIdentity, ModelIdentity, weights_digest
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


class StillCompactor(nn.Module):
    """See the module. `model` is the identity of the base model it was trained against."""

    def __init__(self, config: StillConfig, model: ModelIdentity) -> None:
        super().__init__()
        c = self.config = config
        self.model = model
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
        self._identity: CompactorIdentity | None = None

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
            salience[..., new] = self.scorer(keys, values).to(salience.dtype)
        if not self.config.per_head:
            salience = salience.mean((0, 2), keepdim=True).expand_as(salience)
        return salience

    def forward(self, cache: Cache, slots: int) -> Cache:
        """`slots` slots from a longer cache. Where they stand passes no gradient."""
        if self.config.placement == "even":
            return self._even(cache, slots)
        with torch.no_grad():
            salience = self.score(cache)
        worth = salience.masked_fill(cache.bias == -torch.inf, -torch.inf)
        chosen = worth.topk(slots, dim=-1).indices.sort(dim=-1).values  # (L, B, H, t)
        kept = cache.gather(chosen)
        kept.salience = salience.gather(3, chosen)
        index = torch.arange(cache.slots, device=cache.bias.device)
        written = self._perceive(
            cache, index.expand(cache.bias.shape), chosen, torch.zeros_like(cache.bias)
        )
        if self.config.settled:
            for new, old in ((written.keys, kept.keys), (written.values, kept.values)):
                for n, settled in enumerate(kept.settled[..., None]):
                    new[n] = torch.where(settled, old[n], new[n].to(old[n].dtype))
            written.bias = torch.where(kept.settled, kept.bias, written.bias)
        written.bias = written.bias.masked_fill(kept.bias == -torch.inf, -torch.inf)
        written.positions, written.mass, written.salience = kept.positions, kept.mass, kept.salience
        return written

    def _even(self, cache: Cache, slots: int) -> Cache:
        """The paper's placement: latents spread evenly over the tokens that are stood for."""
        mass = cache.mass.masked_fill(cache.bias == -torch.inf, 0.0)
        total = mass.sum(-1, keepdim=True)
        middle = (mass.cumsum(-1) - mass / 2) / total
        cells = (middle * slots).floor().clamp(0, slots - 1)
        at = torch.arange(slots, device=mass.device)
        at = at.expand(*mass.shape[:-1], slots)
        written = self._perceive(cache, cells, at, mass.log())
        first, last = cache.positions[..., :1], cache.positions[..., -1:]
        share = torch.linspace(0, 1, slots, device=mass.device)
        written.positions = first + (last - first) * share
        written.mass = (total / slots).expand(at.shape).clone()
        return written

    def _perceive(self, cache: Cache, cells: Tensor, at: Tensor, log_mass: Tensor) -> Cache:
        slots = at.shape[-1]
        device = at.device
        dtype = self._perceivers()[0].bank.dtype
        where = torch.linspace(0, 1, slots, device=device).expand(at.shape)
        log_mass = log_mass + cache.bias  # a slot weighs here as it does for the base model
        keys, values, betas = [], [], []
        for n, perceiver in enumerate(self._perceivers()):
            tokens = torch.cat([cache.keys[n].to(dtype), cache.values[n].to(dtype)], dim=-1)
            k, v, beta = perceiver(tokens, cells[n], log_mass[n], where[n], at[n])
            keys.append(k)
            values.append(v)
            betas.append(torch.zeros_like(where[n]) if beta is None else beta.float())
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

    @property
    def identity(self) -> CompactorIdentity:
        if self._identity is None:
            self._identity = CompactorIdentity(
                method="still",
                config=self.config.model_dump_json(),
                weights=weights_digest(self.state_dict()),
            )
        return self._identity

    @torch.inference_mode()
    def compact(self, spans: Sequence[Span], slots: int) -> Span:
        """See `Compactor.compact`. Raises InputError for fewer than one slot."""
        if slots < 1 or not spans:
            raise InputError(
                f"cannot compact {len(spans)} spans to {slots} slots: ask for one or more"
            )
        parts = [Cache.of(span) for span in spans]
        for part, span in zip(parts, spans, strict=True):
            if span.compactor != self.identity.address:  # another's logits have another scale
                part.salience.fill_(torch.nan)
        cache = Cache.cat(parts)
        layers, _, heads, _ = cache.bias.shape
        if (layers, heads) != (self.config.layers, self.config.kv_heads):
            raise CompactorError(
                f"these spans have {layers} layers of {heads} KV heads, "
                f"and this compactor takes {self.config.layers} of {self.config.kv_heads}: use it "
                f"with the model it was trained for, {self.model.name!r}"
            )
        dtype = spans[0].layers[0].values.dtype
        if slots < cache.slots:
            out = self(cache, slots)
        else:  # nothing to shorten
            out = cache
            if self.scorer is not None:
                out.salience = self.score(cache)
        plain = not self.config.beta and bool((out.bias == 0).all())
        written = tuple(
            Slots(
                keys=out.keys[n][0].float().contiguous(),
                values=out.values[n][0].to(dtype).contiguous(),
                positions=out.positions[n, 0].contiguous(),
                bias=None if plain else out.bias[n, 0].contiguous(),
                salience=None if self.scorer is None else out.salience[n, 0].contiguous(),
            )
            for n in range(self.config.layers)
        )
        return Span(
            start=spans[0].start, end=spans[-1].end, layers=written, rotated_at=None,
            rounds=1 + max(s.rounds for s in spans), compactor=self.identity.address,
        )  # fmt: skip

    # -- on disk ------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"still": self.config.model_dump(), "model": self.model.model_dump()}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        weights = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path, model: ModelIdentity) -> StillCompactor:
        """The compactor in `folder`, for `model`.

        Raises CompactorError if the folder holds none or it is damaged, IdentityError if it was
        trained against another model.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "config.json").read_text())
            config = StillConfig(**about["still"])
            trained_for = ModelIdentity(**about["model"])
        except FileNotFoundError as e:
            raise CompactorError(
                f"{folder} holds no compactor (config.json is missing). Give the folder that "
                "training wrote."
            ) from e
        except (ValueError, KeyError, TypeError) as e:
            raise CompactorError(
                f"{folder / 'config.json'} is damaged ({e}): copy the folder anew, or train again"
            ) from e
        model.require(
            trained_for,
            f"the compactor in {folder}",
            "Train one for this model, or load that model (with dtype=, if only that differs).",
        )
        compactor = cls(config, trained_for)
        try:
            compactor.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as e:
            raise CompactorError(
                f"{folder / 'model.safetensors'} does not fit its config ({e}): copy the folder "
                "anew, or train again"
            ) from e
        return compactor.eval().requires_grad_(False)
