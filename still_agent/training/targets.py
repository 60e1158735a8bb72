"""What a student is compared with: at each token, what the teacher finds likeliest to be said.

A row of logits is as long as the vocabulary: 608 KB in fp32 for Qwen3's. So where many are needed,
the teacher's and the student's are computed a few rows at a time (`in_parts`), and of each row no
more stays than the teacher's `top_k` largest, the gold token's among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.training.teacher import in_parts


@dataclass(frozen=True)
class Targets:
    """The teacher's likeliest tokens at n places, and their logits."""

    tokens: Tensor  # (n, k) int64
    logits: Tensor  # (n, k) fp32

    @classmethod
    def of(cls, logits: Tensor, gold: Tensor, top_k: int) -> Targets:
        """The `top_k` largest of logits (n, V), with the gold tokens (n,) forced in."""
        tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
        missing = (tokens != gold[:, None]).all(-1)
        tokens[missing, -1] = gold[missing]
        return cls(tokens, logits.gather(-1, tokens))

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.logits.nbytes


@torch.no_grad()
def targets(frozen: FrozenModel, hidden: Tensor, gold: Tensor, top_k: int) -> Targets:
    """`Targets.of` the logits after the teacher's hidden states (n, D)."""
    parts = [Targets.of(x, gold[some], top_k) for some, x in in_parts(frozen, hidden)]
    return Targets(torch.cat([p.tokens for p in parts]), torch.cat([p.logits for p in parts]))


def logits_at(frozen: FrozenModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits (n, k) after a student's hidden states (n, D), at `tokens` (n, k) alone."""
    return torch.cat([x.gather(-1, tokens[some]) for some, x in in_parts(frozen, hidden)])


def divergence(targets: Targets, student: Tensor) -> Tensor:
    """Mean forward KL over the targets' tokens, renormalised.

    `student`: its logits (n, k) at those tokens. 0 if there is nothing to learn from.
    """
    wanted, given = targets.logits.log_softmax(-1), student.log_softmax(-1)
    total = F.kl_div(given, wanted, log_target=True, reduction="sum")
    return total / max(len(targets.tokens), 1)
