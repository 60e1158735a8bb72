"""Training a Still compactor (arXiv 2606.07878, section 4): the frozen model teaches itself.

The teacher answers with the whole cache, the student with the compact one; the loss is the
forward KL divergence on answer tokens, over the teacher's `top_k` likeliest tokens and the
gold one, renormalised. Ratios, context lengths, numbers of rounds and raw tails are drawn
anew at each step, so that one compactor serves all of them and learns to read its own output.
A scorer, if the compactor has one, is taught first, through gates (`gates.py`); the Perceivers
then learn to write at the tokens that it chooses.

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
from torch import Tensor, nn

from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import Exams, Source, all_right
from still_agent.training.gates import gated_logits
from still_agent.training.student import answer_logits, compact_in_rounds
from still_agent.training.teacher import Lesson, exactly, prefill, teach
from still_memory.compactors.still import Cache, StillCompactor

Row = dict[str, float]  # of the log
Background = Callable[[random.Random, int, int], Tensor]  # (rng, rows, length) -> token ids
AVERAGED = {"kl", "hit", "norm", "teacher", "open"}


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
    scorer_steps: int = 0  # of `steps`, the first ones
    scorer_rate: float = 2e-3
    scorer_lengths: tuple[int, ...] = (1024, 2048)
    price: float = 0.1  # of a token kept, in nats
    half: bool = False  # the frozen model computes in bf16 while it teaches
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


def _adamw(part: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; biases, scales and the like do not decay."""
    matrices = [p for p in part.parameters() if p.dim() > 1]
    others = [p for p in part.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _cosine(rate: float, done: int, steps: int, recipe: Recipe) -> float:
    """Warm-up, then a half cosine to 3 % of `rate`."""
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, done / max(steps, 1))))
    return rate * min(1.0, (done + 1) / recipe.warm_up) * max(0.03, fall)


class Trainer:
    """One run: `recipe`, a source of exams, a folder to write to.

    `scorer_source`, if other than `source`, should ask about most that it tells: what is never
    asked is not worth a slot. `background` gives token ids (rows, length) of text that nothing
    will ever be asked about.
    """

    def __init__(
        self, frozen: FrozenModel, still: StillCompactor, source: Source, recipe: Recipe,
        out: Path, scorer_source: Source | None = None, background: Background | None = None,
    ) -> None:  # fmt: skip
        self.frozen, self.still, self.recipe, self.out = frozen, still, recipe, out
        self.source, self.scorer_source = source, scorer_source or source
        self.background = background
        parts = [still.perceivers] if still.scorer is None else [still.perceivers, still.scorer]
        self.optimizers = [_adamw(part, recipe) for part in parts]
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)

    @property
    def _rng(self) -> random.Random:
        """What is random in a step follows from its number, so that a run goes on exactly."""
        return random.Random(f"{self.recipe.seed} {self.step}")

    def _exams(self, source: Source, rng: random.Random, length: int) -> Exams:
        return source(rng, self.recipe.rows, length).to(self.frozen.device)

    def calibrate(self) -> None:
        lesson = teach(self.frozen, self._exams(self.source, self._rng, max(self.recipe.lengths)))
        self.still.calibrate(lesson.cache)

    def learn(self) -> Row:
        """One step: of the scorer while `scorer_steps` last, then of the Perceivers."""
        r = self.recipe
        with torch.autocast(self.frozen.device.type, torch.bfloat16, enabled=r.half):
            if self.step < r.scorer_steps:
                loss, row = self._teach_scorer()
                rate = _cosine(r.scorer_rate, self.step, r.scorer_steps, r)
            else:
                loss, row = self._teach_perceivers()
                rate = _cosine(r.rate, self.step - r.scorer_steps, r.steps - r.scorer_steps, r)
        loss.backward()
        row["norm"] = torch.nn.utils.clip_grad_norm_(self.still.parameters(), r.clip).item()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, **row}

    def _teach_scorer(self) -> tuple[Tensor, Row]:
        r, rng = self.recipe, self._rng
        exams = self._exams(self.scorer_source, rng, rng.choice(r.scorer_lengths))
        lesson = teach(self.frozen, exams)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        student, opened = gated_logits(self.frozen, self.still, exams, lesson, noise)
        kl = divergence(lesson.logits, student, lesson.gold, r.top_k)
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

    def _scores_of(self, ids: Tensor) -> Tensor:
        keys, values = prefill(self.frozen, ids, 0)
        with exactly(self.frozen):
            return self.still.score(Cache.raw(keys, values))

    def _teach_perceivers(self) -> tuple[Tensor, Row]:
        r, rng = self.recipe, self._rng
        length, ratio = rng.choice(r.lengths), rng.choice(r.ratios)
        rounds, tail = rng.choice(r.rounds), rng.choice(r.raw_tails)
        exams = self._exams(self.source, rng, length)
        lesson = teach(self.frozen, exams)
        state = compact_in_rounds(
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
        return kl, self._row(exams, lesson, student, kl, ratio=ratio, rounds=rounds, tail=tail)

    @staticmethod
    def _row(exams: Exams, lesson: Lesson, student: Tensor, kl: Tensor, **more: float) -> Row:
        hits = int((student.argmax(-1) == lesson.gold).sum())
        return {
            "length": exams.context.shape[1],
            "kl": kl.item(),
            "hit": hits / max(len(lesson.gold), 1),
            "teacher": lesson.right[0] / max(lesson.right[1], 1),
            **more,
        }

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
                saving = self.step % save_every == 0
                if self.step % every == 0 or saving:
                    row = {"step": self.step, "minutes": round((time.time() - begun) / 60, 2)}
                    for key in AVERAGED:
                        if known := [x[key] for x in recent if key in x]:
                            row[key] = round(sum(known) / len(known), 4)
                    recent.clear()
                    if evaluate is not None and saving:
                        row |= evaluate()
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    report(row)
                if saving:
                    self.save()
        self.save()

    def save(self) -> None:
        """The compactor's folder, and all that resuming needs, replaced at once and last."""
        self.still._identity = None
        self.still.save(self.out)
        state = {
            "still": self.still.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "recipe": asdict(self.recipe),
        }
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.still.load_state_dict(state["still"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


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
        exams = exams.to(frozen.device)
        lesson = teach(frozen, exams)
        state = compact_in_rounds(
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
