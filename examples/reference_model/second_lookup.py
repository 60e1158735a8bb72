"""A second lookup, laid down by hand in a trained model: of what matches, the newest.

Layer 1 finds every statement that matches a question and copies all of them alike, the old value
and the new one. Its margin between one subject and the next is a few nats, so that no bias for
recent tokens can be large enough there. What is laid into the last two layers, which such a model
hardly uses, and then trained like the rest, with `lookups.py` as a second teacher:

1. The layer before the last carries news one token on. Just before a value is told anew, the
   model already expects the old one, which a linear probe of the stream sees. Heads that look 1,
   2 and 3 tokens back write what the probe says into `restated`, a direction that the stream
   hardly uses, where it stands on the new value and no later value can take it away.
2. The last layer chooses among the candidates: queries and keys are the leading canonical
   correlations between the stream at an asking token and at the token it should copy, on RoPE's
   slow pairs; one pair more prefers what is restated. So the choice works at any distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lookups import Lookups
from structured_init import FAST_PAIRS

Sample = tuple[Tensor, Lookups]  # token ids (1, T)
SLOW = slice(17, 31)  # pairs that turn less than a radian in 2,000 tokens (base 1e6, 64 dims)
NEWEST = 31  # the pair that prefers what is restated
NATS = 4.0  # what that is worth for a probe's logit of 2
CHOICE = 4.0  # weights of the last layer's q and k norms: a full match is 128 nats
VOICE = 0.2  # of the last layer beside the stream, at first


@torch.no_grad()
def lay_second_lookup(model: Qwen3ForCausalLM, samples: Sequence[Sample], seed: int) -> Tensor:
    """Changes `model` in place; returns `restated` (D,), a direction of the last layer's input.

    `samples` are whole dialogues with their lookups, a few hundred thousand tokens.
    """
    g = torch.Generator().manual_seed(seed)
    carrier, chooser = model.model.layers[-2:]
    embedding = model.model.embed_tokens.weight
    early, late = stream(model, samples, -3), stream(model, samples, -2)
    probe = logistic(
        unit(picked(early, [[place - 1 for _, place, _ in x.told] for _, x in samples])),
        torch.tensor([float(again) for _, x in samples for _, _, again in x.told]),
    )
    used = unit(torch.cat(late))
    used = used.T @ used / len(used)
    spoken = embedding.T @ embedding / embedding.square().sum()
    restated = torch.linalg.eigh(used + 4 * len(used) * spoken).eigenvectors[:, 0]
    carrier.input_layernorm.weight.fill_(1.0)
    base = model.config.rope_parameters["rope_theta"]
    _carry(carrier.self_attn, torch.cat(early), probe, restated, base, g)

    late = stream(model, samples, -2)
    asking = unit(picked(late, [[ask for _, ask, _ in x.looked_up] for _, x in samples]))
    told = unit(picked(late, [[told[0] for _, _, told in x.looked_up] for _, x in samples]))
    chooser.input_layernorm.weight.fill_(1.0)
    _choose(chooser.self_attn, unit(torch.cat(late)), restated, asking, told, g)
    copying(chooser.self_attn, embedding, VOICE * length_of(late) / 16, g)
    return restated


def stream(model: Qwen3ForCausalLM, samples: Sequence[Sample], layer: int) -> list[Tensor]:
    """What the last layer reads (-2), what the one before it reads (-3), ...: (T, D) a sample."""
    return [
        model.model(ids, output_hidden_states=True).hidden_states[layer][0] for ids, _ in samples
    ]


def picked(streams: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([x[list(at)] for x, at in zip(streams, places, strict=True)])


def unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def length_of(streams: Sequence[Tensor]) -> float:
    """Of the stream, in units of a normed one's."""
    return float(torch.cat(list(streams)).norm(dim=-1).mean()) / streams[0].shape[-1] ** 0.5


def constant_reading(x: Tensor) -> Tensor:
    """A reading (D,) that is 1 on every row of x (n, D), as nearly as can be."""
    spread = x.T @ x / len(x)
    spread.diagonal().add_(1e-3 * spread.diagonal().mean())
    reading = torch.linalg.solve(spread, x.mean(0))
    return reading / (x @ reading).mean()


def logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D,) and bias of a logistic regression."""
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit = x @ weight[:-1] + weight[-1]
        loss = F.binary_cross_entropy_with_logits(logit, y) + 1e-3 * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()[:-1], weight.detach()[-1]


def canonical(x: Tensor, asking: Tensor, told: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` leading canonical correlations of `asking` with `told` (m, D): two maps (D, n).

    `x` (T, D), the whole stream, says what is ordinary.
    """
    centred = x - x.mean(0)
    spread = centred.T @ centred / len(x)
    spread.diagonal().add_(2e-2 * spread.diagonal().mean())
    values, vectors = torch.linalg.eigh(spread)
    white = vectors @ values.rsqrt().diag() @ vectors.T
    shared = (asking - asking.mean(0)).T @ (told - told.mean(0)) / len(told)
    left, strength, right = torch.linalg.svd(white @ shared @ white)
    ask, tell = (white @ side[:, :n] * strength[:n].sqrt() for side in (left, right.T))
    return ask, tell


def heads(attention: Qwen3Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of q (H, d, D), k (G, d, D), v (G, d, D) and o (D, H, d)."""
    d = attention.head_dim
    q, k, v = (
        p.weight.unflatten(0, (-1, d))
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, k, v, attention.o_proj.weight.unflatten(1, (-1, d))


def back(attention: Qwen3Attention, head: int, tokens: int, constant: Tensor, base: float) -> None:
    """Lets `head` look so many tokens back. `base`: of RoPE."""
    q, k, _, _ = heads(attention)
    d = q.shape[1]
    phase = -tokens * base ** (-torch.arange(0, d, 2).float() / d)[:FAST_PAIRS]
    k[head // (len(q) // len(k)), :FAST_PAIRS] = constant
    q[head, :FAST_PAIRS] = phase.cos()[:, None] * constant
    q[head, d // 2 : d // 2 + FAST_PAIRS] = phase.sin()[:, None] * constant


def _carry(
    attention: Qwen3Attention, read: Tensor, probe: tuple[Tensor, Tensor], restated: Tensor,
    base: float, g: torch.Generator,
) -> None:  # fmt: skip
    q, k, v, o = heads(attention)
    d, width = q.shape[1:]
    constant = constant_reading(unit(read))
    for part in (q, k):
        part.normal_(std=0.02 * width**-0.5, generator=g)
    for h in range(len(q)):
        back(attention, h, h % (len(q) // len(k)) + 1, constant, base)
    attention.q_norm.weight.fill_(2.0)
    attention.k_norm.weight.fill_(2.0)
    size = length_of([read])
    v.normal_(std=width**-0.5, generator=g)
    o.normal_(std=0.02 * d**-0.5 * size, generator=g)
    v[:, 0] = probe[0] + probe[1] * constant
    o[:, 0, 0] = restated * size  # a logit of the probe is as much in the normed stream


def _choose(
    attention: Qwen3Attention, x: Tensor, restated: Tensor, asking: Tensor, told: Tensor,
    g: torch.Generator,
) -> None:  # fmt: skip
    q, k, _, _ = heads(attention)
    d, width = q.shape[1:]
    pairs = torch.arange(SLOW.start, SLOW.stop)
    rows = torch.cat([pairs, pairs + d // 2])
    ask, tell = canonical(x, asking, told, len(rows))
    for part, reading in ((q, ask), (k, tell)):
        part.normal_(std=0.01 * width**-0.5, generator=g)
        part[:, rows] = reading.T
    worth = (NATS / 2 * d**0.5) ** 0.5 / CHOICE
    q[:, NEWEST] = worth * (asking @ ask).norm(dim=-1).mean() / d**0.5 * constant_reading(x)
    k[:, NEWEST] = worth * (told @ tell).norm(dim=-1).mean() / d**0.5 * restated
    attention.q_norm.weight.fill_(CHOICE)
    attention.k_norm.weight.fill_(CHOICE)


def copying(attention: Qwen3Attention, embedding: Tensor, voice: float, g: torch.Generator) -> None:
    """Values read directions in which embeddings differ, outputs say them again."""
    _, _, v, o = heads(attention)
    d, width = v.shape[1:]
    centred = embedding - embedding.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -(3 * width // 8) :]
    for n in range(len(v)):
        mix = torch.linalg.qr(torch.randn(axes.shape[1], d, generator=g))[0]
        v[n] = mix.T @ axes.T
        for h in range(n * (o.shape[1] // len(v)), (n + 1) * (o.shape[1] // len(v))):
            o[:, h] = voice * v[n].T
