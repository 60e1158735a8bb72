"""What a token will be worth, told from its keys and values alone, before any question.

A small network reads `[K ; V]` of all layers with the neighbouring tokens on both sides, and
gives, per layer and KV head, the logit of a gate: open where the token is worth a slot. It is
taught by what answers lose when gates close (`still_agent.training.gates`), and never sees a
question when it is used. This is the one channel between layers; the paper's Still has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scorer(nn.Module):
    def __init__(self, layers: int, heads: int, head_dim: int, width: int, reach: int) -> None:
        super().__init__()
        self.shape = (layers, heads)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(layers, heads, 1, 2))  # RMS of K and of V
        self.inward = nn.Linear(layers * heads * 2 * head_dim, width)
        self.around = nn.Conv1d(width, width, 2 * reach + 1, padding=reach, groups=1)
        self.mix = nn.Linear(2 * width, width)
        self.outward = nn.Linear(width, layers * heads)
        nn.init.constant_(self.outward.bias, 2.0)  # gates begin open: nothing is lost yet

    def forward(self, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Logits `(L, B, H, S)` from un-rotated keys and values, each L of `(B, H, S, d)`."""
        batch, heads, length, _ = keys[0].shape
        weights = self.inward.weight.chunk(len(keys), dim=1)
        x: Tensor = self.inward.bias
        for k, v, scale, weight in zip(keys, values, self.scale, weights, strict=True):
            both = torch.cat([k / scale[..., :1], v / scale[..., 1:]], dim=-1)  # (B, H, S, 2d)
            both = both.transpose(1, 2).reshape(batch, length, -1).to(weight.dtype)
            x = x + F.linear(both, weight)  # (B, S, w)
        near = self.around(F.silu(x).mT).mT
        x = F.silu(self.mix(torch.cat([x, near], dim=-1)))
        return self.outward(x).view(batch, length, len(keys), heads).permute(2, 0, 3, 1)

    @torch.no_grad()
    def calibrate(self, keys: Tensor, values: Tensor) -> None:
        """As `Perceiver.calibrate`, from keys and values `(L, B, H, S, d)`."""
        both = torch.stack([keys, values], dim=-1).float()  # (L, B, H, S, d, 2)
        self.scale.copy_(both.square().mean((1, 3, 4)).sqrt()[:, :, None])
