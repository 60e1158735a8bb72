"""A spare layer put to use by hand, then trained: look again, and do not say a thing twice.

After `second_lookup.py` and its training, ablation shows that attention of the layer before the
last does little: what is wrong there was wrong in layer 1, whose keys have to tell dozens of alike
subjects apart in a few dimensions. So that layer is laid down anew.

1. Its first key-value group looks for the statement a second time, with keys of its own: canonical
   correlations, as in `second_lookup.py`, of what is left of the stream when the token itself is
   taken out of it, for what layer 1 has already said must not decide again.
2. One head of its second group carries "told before" one token on, as all heads did.
3. That group's other heads look at the values that the answer under way has already given, and
   take them back out of the stream, so that the next of several values can come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from second_lookup import (
    Sample,
    back,
    canonical,
    constant_reading,
    copying,
    heads,
    length_of,
    logistic,
    picked,
    stream,
    unit,
)

SLOW = slice(16, 32)  # RoPE pairs on which content is matched
RECENT = (7, 8)  # pairs that fall from 1 to 0 in 30 to 50 tokens (base 1e6, 64 dims)
SAID = 31  # the slow pair that finds what was said
SHARPNESS = 3.0  # weights of the q and k norms: a full match is 72 nats
VOICE = 0.3  # beside the stream, at first


@torch.no_grad()
def lay_look_again(
    model: Qwen3ForCausalLM, samples: Sequence[Sample], restated: Tensor, seed: int
) -> None:
    """Changes the layer before the last of `model` in place.

    `samples` are whole dialogues, `restated` (D,) is what `lay_second_lookup` returned.
    """
    g = torch.Generator().manual_seed(seed)
    layer = model.model.layers[-2]
    streams = stream(model, samples, -3)
    size = length_of(streams)
    read = [unit(x) for x in streams]
    every = torch.cat(read)
    embedding = model.model.embed_tokens.weight
    layer.input_layernorm.weight.fill_(1.0)
    attention = layer.self_attn
    q, k, v, o = heads(attention)
    d, width = q.shape[1:]
    group = len(q) // len(k)
    for part in (q, k):
        part.normal_(std=0.01 * width**-0.5, generator=g)
    attention.q_norm.weight.fill_(SHARPNESS)
    attention.k_norm.weight.fill_(SHARPNESS)

    tokens = unit(embedding[torch.cat([ids[0] for ids, _ in samples])])
    itself = torch.linalg.solve(tokens.T @ tokens, tokens.T @ every)  # its part in the stream
    rest = torch.eye(width) - _projection(itself)
    asking = picked(read, [[ask for _, ask, _ in x.looked_up] for _, x in samples])
    told = picked(read, [[told[0] for _, _, told in x.looked_up] for _, x in samples])
    pairs = torch.arange(SLOW.start, SLOW.stop)
    rows = torch.cat([pairs, pairs + d // 2])
    ask, tell = canonical(every @ rest, asking @ rest, told @ rest, len(rows))
    q[:group, rows] = (rest @ ask).T
    k[0, rows] = (rest @ tell).T

    here = constant_reading(every)
    before = logistic(
        picked(read, [[place - 1 for _, place, _ in x.told] for _, x in samples]),
        torch.tensor([float(again) for _, x in samples for _, _, again in x.told]),
    )
    answered = [{t for _, _, said in x.said for t in said} for _, x in samples]
    given = logistic(
        every,
        torch.tensor([float(t in a) for a, x in zip(answered, read, strict=True)
                      for t in range(len(x))]),
    )  # fmt: skip
    back(attention, group, 1, here, model.config.rope_parameters["rope_theta"])
    for pair in RECENT:
        q[group + 1 :, pair] = k[1, pair] = here
    q[group + 1 :, SAID] = 2 * here
    k[1, SAID] = (given[0] + given[1] * here) / 4

    copying(attention, embedding, VOICE * size / 16, g)
    o[:, group + 1 :] *= -1
    v[1, 0] = before[0] + before[1] * here
    o[:, group:, 0] = 0
    o[:, group] = 0
    o[:, group, 0] = restated * size


def _projection(reading: Tensor) -> Tensor:
    """Onto the directions (D, D) in which the rows of `reading` mostly lie: half of them."""
    _, vectors = torch.linalg.eigh(reading.T @ reading)
    most = vectors[:, reading.shape[1] // 2 :]
    return most @ most.T
