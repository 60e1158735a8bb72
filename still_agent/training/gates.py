"""Teaching the scorer what to keep: gates on tokens, a price on each one left open.

Every context token gets a gate between 0 and 1, drawn from the scorer's logit by the binary
concrete distribution (arXiv 1611.00712), whose logarithm is added to the token's attention
logits. The student must answer like the teacher (forward KL), and each open gate costs `price`
nats. So the scorer learns which tokens are worth a slot *together*: copies and bystanders that
also draw attention close, and prose closes first. It never sees the questions; they come after.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import Exams
from still_agent.training.student import answer_logits
from still_agent.training.teacher import Lesson, exactly
from still_memory.compactors.still import StillCompactor

TEMPERATURE = 0.5  # below 1 a gate is mostly open or shut, like the choice it stands for


def gated_logits(
    frozen: FrozenModel, still: StillCompactor, exams: Exams, lesson: Lesson, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's answer logits (n, V) behind gates, and the sum of open gates.

    The sum is over rows and tokens; gates of several heads count as their mean.
    """
    with exactly(frozen):
        logits = still.score(lesson.cache)  # (L, B, H, T)
    if not still.config.per_head:
        logits = logits[:1, :, :1]
    noise = torch.rand(logits.shape, generator=g).to(logits.device).clamp(1e-6, 1 - 1e-6).logit()
    gates = F.logsigmoid((logits + noise) / TEMPERATURE)
    state = replace(lesson.cache, bias=gates.expand_as(lesson.cache.bias))
    student = answer_logits(frozen, state, exams.exam, lesson.where)
    return student, gates.exp().mean((0, 2)).sum()
