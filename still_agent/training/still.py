"""Training a Still compactor (arXiv 2606.07878, section 4): the frozen model teaches itself.

The teacher answers with the whole cache, the student with the compact one; the loss is the
forward KL divergence on answer tokens, over the teacher's `top_k` likeliest tokens and the
gold one, renormalised. Ratios, context lengths, numbers of rounds and raw tails are drawn
anew at each step, so that one compactor serves all of them and learns to read its own output.
A scorer, if the compactor has one, is taught beside it: binary cross-entropy against the most
attention that the teacher's exam queries paid each token.

Writes `log.jsonl`, the compactor's folder, and `state.pt` to resume from.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import Exams, Source, all_right
from still_agent.training.student import answer_logits, compact_in_rounds
from still_agent.training.teacher import Lesson, teach
from still_memory.compactors.still import StillCompactor

Row = dict[str, float]  # of the log
AVERAGED = {"kl", "hit", "norm", "teacher", "scorer"}


@dataclass(frozen=True)
class Recipe:
    steps: int = 1000
    rows: int = 8
    lengths: tuple[int, ...] = (512, 1024)
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    rounds: tuple[int, ...] = (1, 1, 2, 4)
    raw_tails: tuple[int, ...] = (0, 0, 64)
    rate: float = 1e-3
    warm_up: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    top_k: int = 200
    scorer_weight: float = 4.0
    seed: int = 0


def divergence(teacher: Tensor, student: Tensor, gold: Tensor, top_k: int) -> Tensor:
    """Mean forward KL over the teacher's `top_k` tokens with the gold one forced in, renormalised.

    Logits (n, V), gold (n,); 0 if the teacher gave no answer of its own to learn from.
    """
    k = min(top_k, teacher.shape[-1])
    index = teacher.topk(k, dim=-1).indices
    missing = (index != gold[:, None]).all(-1)
    index[missing, -1] = gold[missing]
    wanted = teacher.gather(-1, index).log_softmax(-1)
    given = student.gather(-1, index).log_softmax(-1)
    return F.kl_div(given, wanted, log_target=True, reduction="sum") / max(len(gold), 1)


class Trainer:
    """One run: `recipe`, a source of exams, a folder to write to."""

    def __init__(
        self, frozen: FrozenModel, still: StillCompactor, source: Source, recipe: Recipe, out: Path
    ) -> None:
        self.frozen, self.still, self.source, self.recipe, self.out = (
            frozen,
            still,
            source,
            recipe,
            out,
        )
        matrices = [p for p in still.parameters() if p.dim() > 1]
        others = [p for p in still.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.rate,
            betas=(0.9, 0.95),
        )
        self.rng = random.Random(recipe.seed)
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)

    def calibrate(self) -> None:
        lesson = teach(self.frozen, self.source(self.recipe.rows, max(self.recipe.lengths)))
        self.still.calibrate(lesson.cache)

    def learn(self) -> Row:
        """One step."""
        r = self.recipe
        length, ratio = self.rng.choice(r.lengths), self.rng.choice(r.ratios)
        rounds, tail = self.rng.choice(r.rounds), self.rng.choice(r.raw_tails)
        exams = self.source(r.rows, length)
        lesson = teach(self.frozen, exams)
        state, scores = compact_in_rounds(
            self.frozen,
            self.still,
            exams.context,
            lesson.cache,
            rounds=rounds,
            slots=max(length // ratio, 4),
            raw_tail=tail,
        )
        student = answer_logits(self.frozen, state, exams.exam, lesson.where)
        kl = divergence(lesson.logits, student, lesson.gold, r.top_k)
        loss = kl
        if scores:
            scorer = self._scorer_loss(scores, lesson)
            loss = kl + r.scorer_weight * scorer
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.still.parameters(), r.clip)
        rate = r.rate * min(1.0, (self.step + 1) / r.warm_up)
        rate *= max(0.03, 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / r.steps))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        hit = (student.argmax(-1) == lesson.gold).sum().item() / max(len(lesson.gold), 1)
        row = {
            "step": self.step,
            "length": length,
            "ratio": ratio,
            "rounds": rounds,
            "tail": tail,
            "kl": kl.item(),
            "hit": hit,
            "norm": norm.item(),
            "teacher": lesson.right[0] / max(lesson.right[1], 1),
        }
        if scores:
            row["scorer"] = scorer.item()
        return row

    @staticmethod
    def _scorer_loss(scores: list[tuple[Tensor, int]], lesson: Lesson) -> Tensor:
        total = torch.zeros(())
        count = 0
        for salience, first in scores:
            n = salience.shape[-1]
            target = lesson.attention[..., first : first + n].clamp(0, 1)
            total = total + F.binary_cross_entropy_with_logits(salience, target, reduction="sum")
            count += target.numel()
        return total / count

    def run(
        self,
        report: Callable[[Row], None],
        *,
        every: int = 20,
        save_every: int = 100,
        evaluate: Callable[[], Row] | None = None,
        minutes: float = math.inf,
    ) -> None:
        """Train to the end of the recipe (or for `minutes`), logging and saving as it goes."""
        begun = time.time()
        recent: list[Row] = []
        with (self.out / "log.jsonl").open("a") as log:
            while self.step < self.recipe.steps and (time.time() - begun) / 60 < minutes:
                recent.append(self.learn())
                if self.step % every == 0:
                    row = {"step": self.step, "minutes": round((time.time() - begun) / 60, 2)}
                    for key in AVERAGED & recent[0].keys():
                        row[key] = round(sum(x[key] for x in recent) / len(recent), 4)
                    recent.clear()
                    if evaluate is not None and self.step % save_every == 0:
                        row |= evaluate()
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    report(row)
                if self.step % save_every == 0:
                    self.save()
        self.save()

    def save(self) -> None:
        """The compactor's folder, and all that resuming needs; each replaced at once."""
        self.still._identity = None
        self.still.save(self.out)
        state = {
            "still": self.still.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": self.rng.getstate(),
            "recipe": asdict(self.recipe),
        }
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.still.load_state_dict(state["still"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))


@torch.no_grad()
def recall(
    frozen: FrozenModel,
    still: StillCompactor,
    batches: list[Exams],
    *,
    ratio: int,
    rounds: int = 1,
    raw_tail: int = 0,
) -> tuple[float, float]:
    """Exact answers with the compact cache and with the whole one, as shares (teacher forced)."""
    right = full = total = 0
    for exams in batches:
        lesson = teach(frozen, exams)
        state, _ = compact_in_rounds(
            frozen,
            still,
            exams.context,
            lesson.cache,
            rounds=rounds,
            slots=max(exams.context.shape[1] // ratio, 4),
            raw_tail=raw_tail,
        )
        answer = exams.answer[:, 1:]
        logits = answer_logits(frozen, state, exams.exam, answer.nonzero(as_tuple=True))
        hits = torch.zeros_like(exams.answer)
        hits[:, 1:][answer] = logits.argmax(-1) == exams.exam[:, 1:][answer]
        r, n = all_right(hits, exams)
        right, total, full = right + r, total + n, full + lesson.right[0]
    return right / total, full / total
