"""Training KV-Distill (arXiv 2503.10337): the frozen model teaches itself, both ways round.

The student answers with what is kept; the loss is a weighted sum of the forward and the reverse
KL divergence on answer tokens, over the whole vocabulary. Data, ratios, rounds and raw tails
are drawn as Still's are, and the scorer learns together with LoRA, from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.training import loop
from still_agent.training.exams import Source
from still_agent.training.loop import Loop, Row, cosine
from still_agent.training.teacher import logits_of
from still_memory.compactors.kv_distill import KVDistillCompactor


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    forward: float = 0.5  # weight of the forward KL; the reverse has the rest


def both_ways(teacher: Tensor, student: Tensor, forward: float) -> tuple[Tensor, Tensor]:
    """`forward` KL(teacher ‖ student) + (1 - `forward`) KL(student ‖ teacher), and the first alone.

    Means over logits (n, V); 0 if there are none.
    """
    wanted, given = teacher.log_softmax(-1), student.log_softmax(-1)
    rows = max(len(teacher), 1)
    ahead = F.kl_div(given, wanted, log_target=True, reduction="sum") / rows
    back = F.kl_div(wanted, given, log_target=True, reduction="sum") / rows
    return forward * ahead + (1 - forward) * back, ahead


class Trainer(Loop):
    """One run: see `Loop`."""

    def __init__(
        self, frozen: FrozenModel, distill: KVDistillCompactor, source: Source, recipe: Recipe,
        out: Path,
    ) -> None:  # fmt: skip
        super().__init__(frozen, distill, source, recipe, out, [distill])
        self.recipe: Recipe = recipe

    def teach(self) -> tuple[Tensor, Row, float]:
        exams, lesson, student, drawn = self._answered()
        wanted = logits_of(self.frozen, lesson.hidden)
        loss, kl = both_ways(wanted, student, self.recipe.forward)
        row = self._row(exams, lesson, student, kl, loss=loss.item(), **drawn)
        return loss, row, cosine(self.recipe.rate, self.step, self.recipe.steps, self.recipe)
