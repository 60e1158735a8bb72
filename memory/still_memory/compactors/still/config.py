"""Settings of a Still compactor. The defaults are the paper's structure (arXiv 2606.07878).

Each departure is an option, named here with its reason; docs/still.md has the measurements.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from still_memory.shares import Shares, dealt


class StillConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(gt=0, le=1024)
    kv_heads: int = Field(gt=0, le=1024)
    head_dim: int = Field(gt=0, le=4096, multiple_of=2)

    blocks: int = Field(2, ge=1, le=8)
    """Perceiver blocks, each a cross-attention and a self-attention."""

    bank: int = Field(256, ge=2, le=65536)
    """Latents stored per KV head. `t` of them are read off by position, so that one compactor
    serves every ratio (the paper trains one per ratio)."""

    rope_base: float = Field(10.0, gt=1)
    """Base of the compactor's own RoPE."""

    beta: bool = False
    """Give each slot an additive attention logit (the paper turns it on at 200x)."""

    placement: Literal["even", "salient"] = "even"
    """Where latents stand. `even`: spread evenly over the tokens, as in the paper. `salient`:
    at the tokens that a small scorer, taught by gates, thinks worth most."""

    per_head: bool = False
    """`salient` only: each layer and KV head places its own latents. By default all share one
    choice, by the mean of the scorer's logits: over hundreds of rounds a head's own score lets
    prose crowd out what other heads still need (docs/results.md)."""

    shares: Shares | dict[Annotated[float, Field(ge=1)], Shares] = ()
    """What each `[layer][kv_head]` should get of the slots, in any unit, as measured for its model:
    once, or for several ratios (between them see `still_memory.shares.at_ratio`); () is the same
    for all, as in the paper."""

    worth: float = -3.0
    """`salient` with `shares`: tokens with a lower logit give a layer no claim to more slots than
    the mean layer's."""

    settled: bool = True
    """`salient` only: a latent that stands at an already compact slot copies it. A slot is then
    written once however many rounds follow, and cannot drift."""

    scorer_width: int = Field(64, gt=0, le=4096)
    scorer_reach: int = Field(8, ge=0, le=256)
    """Tokens to each side that the scorer sees: what a token is worth shows after it, too."""

    feed_forward: int = Field(0, ge=0, le=16)
    """Width of a feed-forward after each block, in multiples of 2d. The paper has none."""

    neighbourhood: float = Field(1.0, gt=0)
    """How fast later blocks' cross-attention falls with distance: 1 is one latent's cell."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        some = self.shares.values() if isinstance(self.shares, dict) else [self.shares]
        for shares in some if self.shares else ():
            shape = [len(layer) for layer in shares]
            if shape != [self.kv_heads] * self.layers:
                raise ValueError(
                    f"shares of {shape} heads do not fit {self.layers} layers of {self.kv_heads}"
                )
            dealt(1, shares, [1] * self.layers)
        return self
