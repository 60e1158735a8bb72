"""What a compactor is trained on: contexts, and exams about them that come after.

A context is read before the exam is known. Exams hold several questions with answers; the
loss is taken on answers only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exams:
    """A batch of rows; contexts are of one length, exams padded on the right."""

    context: Tensor  # (B, T) int64
    exam: Tensor  # (B, Q) int64
    answer: Tensor  # (B, Q) bool: this token is part of an answer
    runs: Tensor  # (B, Q) int64: which answer of its row a token belongs to, -1 elsewhere

    def to(self, device: torch.device) -> Exams:
        return Exams(*(t.to(device) for t in (self.context, self.exam, self.answer, self.runs)))


Source = Callable[[random.Random, int, int], Exams]  # (rng, rows, context length) -> a batch


def pack(rows: list[tuple[list[int], list[int], list[bool]]]) -> Exams:
    """Rows of (context ids, exam ids, answer mask) as a batch. Contexts must agree in length."""
    longest = max(len(exam) for _, exam, _ in rows)
    exam = torch.zeros(len(rows), longest, dtype=torch.long)
    answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, (_, ids, mask) in enumerate(rows):
        exam[b, : len(ids)] = torch.tensor(ids)
        answer[b, : len(ids)] = torch.tensor(mask)
    before = torch.nn.functional.pad(answer, (1, 0))[:, :-1]
    runs = (answer & ~before).cumsum(1) - 1
    return Exams(
        torch.tensor([context for context, _, _ in rows]), exam, answer, runs.where(answer, -1)
    )


def all_right(hits: Tensor, exams: Exams) -> tuple[int, int]:
    """How many answers have every token right, of how many. `hits` (B, Q) bool."""
    right = total = 0
    for row_hits, row_runs in zip(hits, exams.runs, strict=True):
        for run in range(int(row_runs.max()) + 1):
            right += bool(row_hits[row_runs == run].all())
            total += 1
    return right, total
