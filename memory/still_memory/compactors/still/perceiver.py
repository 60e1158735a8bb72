"""One layer's Perceiver: a long cache in, a short one out (arXiv 2606.07878, section 3).

Reads, per KV head, tokens `[K with RoPE undone ; V]` of width 2d. Latents attend to them, then
to each other, twice; two linear maps turn latents into compact keys and values. RMSNorm has no
weights and stands before each attention, never after the last block, since the frozen model
expects keys and values of natural length.

**Identity start.** Value, output and head maps start as identities; the first block's query and
key weights start at zero with a constant key bias and a matching query bias, so that routing
depends on position alone; everything else that writes starts at zero. Positions are *cells*:
a token's coordinate is that of the latent whose cell it lies in. So an untrained Perceiver
writes for each latent exactly the mean of its cell, and copies the cache when there is a latent
for each token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-3  # of RMSNorm: the bank starts at zero, where a smaller one makes gradients explode
LEAK = 1e-8  # most weight that an untrained latent may give to all tokens outside its cell
LONGEST = 1 << 17  # tokens over which that holds
IN_CACHE = 1 << 21  # numbers that a CPU passes through a chain of maps at once: they stay on chip
ON_DEVICE = 1 << 26  # the same elsewhere, where fewer and larger steps are better


def turns(cells: int, width: int, stride: float, base: float, device: torch.device) -> Tensor:
    """RoPE's angles at 0, stride, 2 stride, ..., as unit complex numbers (cells, width / 2)."""
    frequency = base ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(cells, device=device)[:, None] * stride * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate_(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring pairs of `x` (..., w), fp32, in place: memory is the bound, so one pass."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
    return x


def routing_scale(width: int, base: float, stride: float) -> float:
    """The logit scale at which position alone routes within LEAK.

    Two unit vectors that differ by `n` cells meet at `mean(cos(n * stride * frequency))`; the
    nearest miss over many cells sets the scale.
    """
    cells = torch.arange(1, 4096, dtype=torch.float32) * stride
    frequency = base ** -(torch.arange(0, width, 2) / width)
    nearest = (cells[:, None] * frequency).cos().mean(-1).max().item()
    return math.log(LONGEST / LEAK) / (1 - nearest)


class CrossAttention(nn.Module):
    """Latents read tokens: unit-length q and k, a fixed or learned logit scale, own RoPE."""

    def __init__(self, width: int, base: float, stride: float, *, routes: bool) -> None:
        super().__init__()
        self.base, self.stride = base, stride
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = (
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        scale = routing_scale(width, base, stride) if routes else 2.0 * width**0.5
        self.scale = nn.Parameter(torch.tensor(scale))
        with torch.no_grad():
            unit = torch.full((width,), width**-0.5)
            for part in (self.query, self.key):  # a zero query bias would break the routing
                part.bias.copy_(unit)
            nn.init.eye_(self.value.weight)
            if routes:
                nn.init.zeros_(self.query.weight)
                nn.init.zeros_(self.key.weight)
                nn.init.eye_(self.out.weight)
            else:
                nn.init.normal_(self.query.weight, std=0.5 * width**-0.5)
                nn.init.normal_(self.key.weight, std=0.5 * width**-0.5)
                nn.init.zeros_(self.out.weight)

    def forward(
        self, latents: Tensor, tokens: Tensor, unit: Tensor, at_latent: Tensor, at_token: Tensor,
        mass: Tensor,
    ) -> Tensor:  # fmt: skip
        """latents (B,H,t,w), tokens (B,H,S,w) in units of `unit` (H,1,w), cells (B,H or 1,t) and
        (B,H or 1,S), log mass (B,H,S).

        What is linear is moved to where it is cheap: the unit of the tokens into the key map, and
        to the t that are mixed; the value map likewise; the length of a key to its logits. Keys
        are made and read part by part, so that none is ever written to memory; on the CPUs tried,
        fused attention is half as fast as plain products for heads this wide.
        """
        q = F.normalize(self.query(latents), dim=-1) * self.scale
        to_key = (self.key.weight / unit).mT
        size = IN_CACHE if tokens.device.type == "cpu" else ON_DEVICE
        width = tokens.shape[-1]
        rows = max(1, size // (tokens[:, :, 0].numel() * max(1, q.shape[2] // width)))
        cells = int(max(at_token.max(), at_latent.max())) + 1
        table = turns(cells, width, self.stride, self.base, tokens.device)
        q = rotate_(q.float(), table[at_latent.long()]).to(tokens.dtype)
        weighs = bool(mass.any())
        total = mixed = torch.zeros((), device=tokens.device)
        most = torch.full((*q.shape[:-1], 1), torch.finfo(torch.float32).min, device=q.device)
        for first in range(0, tokens.shape[2], rows):  # softmax as it goes (arXiv 1805.02867)
            part = tokens[:, :, first : first + rows]
            keys = (part @ to_key).float()
            keys += self.key.bias
            rotate_(keys, table[at_token[:, :, first : first + rows].long()])
            length = keys.norm(dim=-1).clamp(min=1e-12)
            logits = (q @ keys.to(q.dtype).mT).float()
            logits /= length[:, :, None]
            if weighs:
                logits += mass[:, :, None, first : first + rows]
            with torch.no_grad():
                before, most = most, torch.maximum(most, logits.amax(-1, keepdim=True))
                fade = (before - most).exp_()
            logits -= most
            weights = logits.exp_()
            total = total * fade + weights.sum(-1, keepdim=True)
            mixed = mixed * fade + weights.to(part.dtype) @ part
        mixed = mixed / total.clamp(min=torch.finfo(total.dtype).tiny)  # a head may be empty
        return self.out(self.value(mixed.to(tokens.dtype) / unit))


class SelfAttention(nn.Module):
    """Latents read each other; writes nothing at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(self, latents: Tensor) -> Tensor:
        q, k, v = self.qkv(latents).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Module):
    """Writes nothing at the start."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, factor * width)
        self.down = nn.Linear(factor * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, latents: Tensor) -> Tensor:
        return self.down(F.silu(self.up(latents)))


class Perceiver(nn.Module):
    """One layer. Weights are shared by its KV heads; each head has a latent bank of its own."""

    def __init__(
        self, heads: int, head_dim: int, *, blocks: int, bank: int, base: float, beta: bool,
        feed_forward: int, neighbourhood: float,
    ) -> None:  # fmt: skip
        super().__init__()
        width = 2 * head_dim
        self.head_dim = head_dim
        self.scale: Tensor
        self.bank = nn.Parameter(torch.zeros(heads, bank, width))
        self.register_buffer("scale", torch.ones(heads, 1, width))  # see calibrate
        strides = [math.pi, *[math.pi * neighbourhood] * (blocks - 1)]
        self.cross = nn.ModuleList(
            CrossAttention(width, base, stride, routes=i == 0) for i, stride in enumerate(strides)
        )
        self.selves = nn.ModuleList(SelfAttention(width) for _ in range(blocks))
        self.feed = nn.ModuleList(
            FeedForward(width, feed_forward) for _ in range(blocks if feed_forward else 0)
        )
        self.to_key, self.to_value = (nn.Linear(width, head_dim, bias=False) for _ in range(2))
        self.to_beta = nn.Linear(width, 1) if beta else None
        with torch.no_grad():
            nn.init.eye_(self.to_key.weight)  # [I 0]
            self.to_value.weight.zero_()[:, head_dim:].fill_diagonal_(1.0)  # [0 I]
            if self.to_beta is not None:
                self.to_beta.weight.zero_()
                self.to_beta.bias.zero_()

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Measure the length of real keys and values `(B,H,S,2d)`, per head, once before training.

        Inputs are divided by it and outputs multiplied, so that one learning rate fits all.
        """
        rms = tokens.float().square().mean((0, 2)).unflatten(-1, (2, -1)).mean(-1).sqrt()  # (H, 2)
        self.scale.copy_(rms.repeat_interleave(self.head_dim, dim=-1)[:, None])

    def latents(self, where: Tensor) -> Tensor:
        """The bank read at `where` in [0, 1], `(B, H, t)`, linearly interpolated: (B,H,t,w)."""
        last = self.bank.shape[1] - 1
        at = where.clamp(0, 1) * last
        low = at.floor().long().clamp(max=last - 1)
        fraction = (at - low)[..., None].to(self.bank.dtype)
        head = torch.arange(self.bank.shape[0], device=where.device)[:, None]
        return torch.lerp(self.bank[head, low], self.bank[head, low + 1], fraction)

    def forward(
        self, tokens: Tensor, at_token: Tensor, mass: Tensor, where: Tensor, at_latent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compact keys (B,H,t,d), values (B,H,t,d) and β (B,H,t) or None.

        `tokens` (B,H,S,2d); `at_token` (B,H,S) and `at_latent` (B,H,t) are cells; `mass`
        (B,H,S) the log of how many tokens each stands for; `where` (B,H,t) in [0, 1] picks
        latents from the bank.
        """
        width = tokens.shape[-1]
        z = self.latents(where)
        if at_token.shape[1] > 1 and bool((at_token == at_token[:, :1]).all()):
            at_token = at_token[:, :1]  # one rotation for all heads
        for i, (cross, among) in enumerate(zip(self.cross, self.selves, strict=True)):
            z = z + cross(
                F.rms_norm(z, (width,), eps=EPSILON), tokens, self.scale, at_latent, at_token, mass
            )
            z = z + among(F.rms_norm(z, (width,), eps=EPSILON))
            if self.feed:
                z = z + self.feed[i](F.rms_norm(z, (width,), eps=EPSILON))
        beta = None if self.to_beta is None else self.to_beta(z).squeeze(-1)
        key_scale, value_scale = self.scale.chunk(2, dim=-1)
        return self.to_key(z) * key_scale, self.to_value(z) * value_scale, beta
