"""What a token will be worth, told from its keys and values alone, before any question.

A small network reads `[K ; V]` of all layers with the neighbouring tokens on both sides, and
predicts, per layer and KV head, the largest attention that later answers pay the token. It is
taught by the teacher's own attention (`still_agent.training`), and never sees a question when
it is used. This is the one channel between layers; the paper's Still has none.
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
        nn.init.constant_(self.outward.bias, -3.0)  # most tokens are worth little

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Logits `(L, B, H, S)` from un-rotated keys and values, each `(L, B, H, S, d)`."""
        layers, batch, heads, length, _ = keys.shape
        k_scale, v_scale = self.scale[:, None, ..., :1], self.scale[:, None, ..., 1:]
        x = torch.cat([keys / k_scale, values / v_scale], dim=-1)  # (L, B, H, S, 2d)
        x = self.inward(x.permute(1, 3, 0, 2, 4).reshape(batch, length, -1))  # (B, S, w)
        near = self.around(F.silu(x).mT).mT
        x = F.silu(self.mix(torch.cat([x, near], dim=-1)))
        return self.outward(x).view(batch, length, layers, heads).permute(2, 0, 3, 1)

    @torch.no_grad()
    def calibrate(self, keys: Tensor, values: Tensor) -> None:
        """As `Perceiver.calibrate`, from keys and values `(L, B, H, S, d)`."""
        both = torch.stack([keys, values], dim=-1).float()  # (L, B, H, S, d, 2)
        self.scale.copy_(both.square().mean((1, 3, 4)).sqrt()[:, :, None])
