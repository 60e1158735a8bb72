"""Where the words of an answer were told: what attention in the last layer should find.

A model of this size takes hours to learn that the newest of two matching statements wins, if
the loss on its answers is the only teacher. The generated dialogues know which token of which
statement each answer copies, so training can also ask the last layer's heads to look there
(`lookup_loss`), and the layer before it to know a restated value when it reads one. Likewise of
the layers before: what `look_again.py` lays is to find the statement, and what was said.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from still_agent.evaluation.dialogues import Dialogue
from still_agent.evaluation.facts import Fact
from still_agent.evaluation.phrasings import RELATIVE

Look = tuple[int, int, list[int]]
NOTHING = -1e30  # a logit; an infinite one has no gradient where all heads hold it
NEAR = 150  # characters between a value and the subject that it belongs to, at most


@dataclass
class Lookups:
    """Of a batch, (row, asking token, their tokens): where a value to be said was told, where any
    value of that fact was (outdated ones too), its next token where its first was, what this answer
    has said, and where the question has the subject that the answer says again. And what was told,
    (row, token, is it restated); the tokens that an answer cannot do without (row, first, end);
    and at which token of a row questions begin.
    """

    copies: list[Look] = field(default_factory=list)
    onward: list[Look] = field(default_factory=list)
    mentions: list[Look] = field(default_factory=list)
    said: list[Look] = field(default_factory=list)
    subjects: list[Look] = field(default_factory=list)
    told: list[tuple[int, int, bool]] = field(default_factory=list)
    needed: list[tuple[int, int, int]] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)

    @property
    def looked_up(self) -> list[Look]:
        return self.copies + self.onward

    def add(self, row: int, words: Sequence[str], talk: Dialogue) -> None:
        """Those of `talk`, whose tokens read as `words` and were cut off at the row's end."""
        starts = [0]
        for word in words:
            starts.append(starts[-1] + len(word))
        text = "".join(words)

        def token(at: int) -> int:
            return bisect_right(starts, at) - 1

        asked = text.find(talk.exam[0].text) if talk.exam else len(text)
        self.asked[row] = token(asked)
        places: dict[tuple[int, int], int] = {}
        for fact in talk.facts:
            at = 0
            for i, value in enumerate(fact.values):
                at = told_at(text[:asked], fact, value, at)
                if at < 0:
                    break
                places[id(fact), i] = token(at)
                self.told.append((row, token(at), i > 0))
                self.needed.append((row, token(at), token(at + len(value) - 1) + 1))
                if fact.family is RELATIVE:  # whose name is in the answer alone
                    name = text.find(fact.attribute, max(0, at - NEAR))
                    end = name + len(fact.attribute)
                    self.needed.append((row, token(name), token(end - 1) + 1))
                at += 1
        at = asked
        for question in talk.exam:
            wanted = max(text.find(question.text, at), at)
            at = text.find(question.answer, wanted)
            fact = question.fact
            if at < 0:
                return
            if fact is None:
                continue
            there = text.find(fact.subject, wanted)
            for found in re.finditer(re.escape(fact.subject), question.answer):
                for n in range(len(fact.subject)):
                    here = token(at + found.start() + n)
                    if n == 0 or starts[here] == at + found.start() + n:
                        self.subjects.append((row, here - 1, [token(there + n)]))
            first = len(fact.values) - 1 if fact.corrected else 0
            left = {
                v: places[id(fact), i]
                for i, v in enumerate(fact.values) if i >= first and (id(fact), i) in places
            }  # fmt: skip
            if len(left) < len(fact.current):
                continue
            mentioned = [places[id(fact), i] for i in range(len(fact.values))]
            said: list[int] = []
            for value in sorted(left, key=lambda v: text.find(v, at)):
                here = token(text.find(value, at))
                if said:
                    self.said.append((row, here - 1, list(said)))
                said.append(here)
                self.copies.append((row, here - 1, list(left.values())))
                self.mentions.append((row, here - 1, mentioned))
                there, more = left.pop(value), 1
                while (
                    starts[here + more] < text.find(value, at) + len(value)
                    and words[here + more] == words[there + more]
                ):
                    self.onward.append((row, here + more - 1, [there + more]))
                    more += 1


def told_at(text: str, fact: Fact, value: str, start: int) -> int:
    """Where `text` tells `value` of `fact`, from `start` on, or -1."""
    at = text.find(value, start)
    while at >= 0 and fact.subject not in text[max(0, at - NEAR) : at + NEAR]:
        at = text.find(value, at + 1)
    return at


def lookup_loss(
    model: Qwen3ForCausalLM, n: int, x: Tensor, looks: Sequence[Look], *,
    heads: slice = slice(None), every_head: bool = False, every_token: bool = False,
    seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean negative log of the attention that `heads` of layer `n` pay to the tokens of `looks`.

    Of every head, or of the heads' mean, which lets them divide the work; to all of a look's
    tokens together, or to each of them alike. `x` (B, T, D): what the layer reads. `seen`
    (B, 1, T, T) bool: which tokens see which, if not all those before them.
    """
    if not looks:
        return x.new_zeros(())
    layer = model.model.layers[n]
    attention, d = layer.self_attn, model.config.head_dim
    h = layer.input_layernorm(x)
    rows = torch.tensor([look[0] for look in looks], device=x.device)
    asks = torch.tensor([look[1] for look in looks], device=x.device)
    places = torch.arange(x.shape[1], device=x.device)
    q = attention.q_norm(attention.q_proj(h[rows, asks]).unflatten(-1, (-1, d)))  # (n, H, d)
    k = attention.k_norm(attention.k_proj(h).unflatten(-1, (-1, d)))  # (B, T, G, d)
    cos, sin = model.model.rotary_emb(h, places[None])
    k = apply_rotary_pos_emb(k, k, cos, sin, unsqueeze_dim=2)[1]
    q = apply_rotary_pos_emb(q, q, cos[0, asks], sin[0, asks], unsqueeze_dim=1)[0]
    logits = torch.empty(len(rows), q.shape[1], x.shape[1], device=x.device)
    for b in range(len(x)):
        mine = rows == b
        per_group = q[mine].unflatten(1, (k.shape[2], -1))
        found = torch.einsum("nghd,tgd->nght", per_group, k[b]).flatten(1, 2)
        logits[mine] = found.float() * d**-0.5
    unseen = places > asks[:, None] if seen is None else ~seen[rows, 0, asks]
    right = torch.zeros(len(rows), x.shape[1], dtype=torch.bool, device=x.device)
    for row, (_, _, told) in enumerate(looks):
        right[row, told] = True
    logits = logits.masked_fill((unseen & ~right)[:, None], NOTHING).log_softmax(-1)
    logits = logits[:, heads]
    if not every_head:  # of the heads' mean
        logits = logits.logsumexp(1, keepdim=True) - math.log(logits.shape[1])
    if every_token:
        shares = logits.masked_fill(~right[:, None], 0.0).sum(-1) / right.sum(-1, keepdim=True)
        return -(shares + right.sum(-1, keepdim=True).log()).mean()
    return -logits.masked_fill(~right[:, None], NOTHING).logsumexp(-1).mean()


def restated_loss(x: Tensor, restated: Tensor, lookups: Lookups) -> Tensor:
    """Cross-entropy of "this value was told before" with what `x` (B, T, D) says of it.

    `restated` (D,) is the direction in which the normed stream should hold that logit.
    """
    rows, places, told = zip(*lookups.told, strict=True)
    target = torch.tensor(told, dtype=torch.float32, device=x.device)
    logit = F.rms_norm(x[list(rows), list(places)].float(), x.shape[-1:], eps=1e-6) @ restated
    return F.binary_cross_entropy_with_logits(logit, target)
