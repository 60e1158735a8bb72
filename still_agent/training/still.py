"""Training a Still compactor (arXiv 2606.07878, section 4): the frozen model teaches itself.

The teacher answers with the whole cache, the student with the compact one; the loss is the
forward KL divergence on answer tokens, over the teacher's `top_k` likeliest tokens and the
gold one, renormalised. Ratios, context lengths, numbers of rounds and raw tails are drawn
anew at each step, so that one compactor serves all of them and learns to read its own output.
A scorer, if the compactor has one, is taught first, through gates (`gates.py`); the Perceivers
then learn to write at the tokens that it chooses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.training import loop
from still_agent.training.exams import Source
from still_agent.training.gates import gated_logits
from still_agent.training.loop import Loop, Row, cosine
from still_agent.training.targets import divergence, targets
from still_agent.training.teacher import Lesson, exactly, prefill, teach
from still_memory.compactors.cache import Cache
from still_memory.compactors.still import StillCompactor

Background = Callable[[random.Random, int, int], Tensor]  # (rng, rows, length) -> token ids


@dataclass(frozen=True)
class Recipe(loop.Recipe):
    top_k: int = 200
    scorer_steps: int = 0  # of `steps`, the first ones
    scorer_rate: float = 2e-3
    scorer_lengths: tuple[int, ...] = (1024, 2048)
    price: float = 0.1  # of a token kept, in nats


class Trainer(Loop):
    """One run: `recipe`, a source of exams, a folder to write to.

    `scorer_source`, if other than `source`, should ask about most that it tells: what is never
    asked is not worth a slot. `background` gives token ids (rows, length) of text that nothing
    will ever be asked about.
    """

    def __init__(
        self, frozen: FrozenModel, still: StillCompactor, source: Source, recipe: Recipe,
        out: Path, scorer_source: Source | None = None, background: Background | None = None,
    ) -> None:  # fmt: skip
        parts = [still.perceivers] if still.scorer is None else [still.perceivers, still.scorer]
        super().__init__(frozen, still, source, recipe, out, parts)
        self.still, self.scorer_source = still, scorer_source or source
        self.recipe: Recipe = recipe
        self.background = background

    def calibrate(self) -> None:
        lesson = teach(self.frozen, self._exams(self.source, self._rng, max(self.recipe.lengths)))
        self.still.calibrate(lesson.cache)

    def teach(self) -> tuple[Tensor, Row, float]:
        """The scorer while `scorer_steps` last, then the Perceivers."""
        r = self.recipe
        if self.step < r.scorer_steps:
            return *self._teach_scorer(), cosine(r.scorer_rate, self.step, r.scorer_steps, r)
        exams, lesson, student, drawn = self._answered()
        kl = self._far(lesson, student)
        row = self._row(exams, lesson, student, kl, **drawn)
        return kl, row, cosine(r.rate, self.step - r.scorer_steps, r.steps - r.scorer_steps, r)

    def _teach_scorer(self) -> tuple[Tensor, Row]:
        r, rng = self.recipe, self._rng
        exams = self._exams(self.scorer_source, rng, rng.choice(r.scorer_lengths))
        lesson = teach(self.frozen, exams)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        student, opened = gated_logits(self.frozen, self.still, exams, lesson, noise)
        kl = self._far(lesson, student)
        # Shut at once, all gates together would teach nothing.
        price = r.price * min(1.0, self.step / (2 * r.warm_up))
        loss = kl + price * opened / max(len(lesson.gold), 1)
        if self.background is not None:
            # A gate that is wrong and sure of it has no gradient of its own; its logit does.
            prose = self.background(rng, r.rows, 1024).to(self.frozen.device)
            loss = loss + F.softplus(self._scores_of(prose)).mean()
        return loss, self._row(
            exams, lesson, student, kl, open=opened.item() / exams.context.numel()
        )

    def _far(self, lesson: Lesson, student: Tensor) -> Tensor:
        """The divergence of the student's logits (n, V) from the teacher's."""
        wanted = targets(self.frozen, lesson.hidden, lesson.gold, self.recipe.top_k)
        return divergence(wanted, student.gather(-1, wanted.tokens))

    def _scores_of(self, ids: Tensor) -> Tensor:
        keys, values = prefill(self.frozen, ids, 0)
        with exactly(self.frozen):
            return self.still.score(Cache.raw(keys, values))
