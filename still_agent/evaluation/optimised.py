"""What so many slots could hold at best: slots fitted to one context's own questions.

Gradient descent on keys, values and biases (as in Cartridges, arXiv 2506.06266, but told the
questions that will be asked), from the slots that a told selection keeps. A ruler, not a rival:
it shows how much room is left above a compactor that needs one forward pass and sees no question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from still_agent.evaluation.dialogues import Line, render
from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import pack
from still_agent.training.still import divergence
from still_agent.training.student import answer_logits
from still_agent.training.teacher import teach
from still_memory.compactors.still import Cache
from still_memory.span import Slots, Span

STEPS = 80
RATE = 0.05  # of a part's own root mean square
LEAST = 0.2  # of such a mean: biases begin at 0
TOP_K = 200


@torch.inference_mode(False)
def optimised(
    model: FrozenModel, ids: Sequence[int], told: Sequence[tuple[str, str]], start: Span
) -> Span:
    """`start`, fitted so that questions on the context `ids` get the replies that `told` pairs
    them with; those should be the model's own, with its whole cache.
    """
    lines = [
        line for text, reply in told
        for line in (Line("user", text), Line("assistant", reply, answer=True))
    ]  # fmt: skip
    exams = pack([(list(ids), *render(model.tokenizer, lines))]).to(model.device)
    lesson = teach(model, exams)
    held = Cache.of(start)
    parts = [
        part.float().clone().requires_grad_() for part in (*held.keys, *held.values, held.bias)
    ]
    scales = [max(part.detach().square().mean().sqrt().item(), LEAST) for part in parts]
    optimizer = torch.optim.Adam([{"params": [part]} for part in parts], betas=(0.9, 0.95))
    layers = len(held.keys)

    def fitted() -> Cache:
        keys, values = parts[:layers], parts[layers : 2 * layers]
        return replace(
            held,
            keys=[k.to(model.dtype) for k in keys],
            values=[v.to(model.dtype) for v in values],
            bias=parts[-1],
        )

    for step in range(STEPS):
        logits = answer_logits(model, fitted(), exams.exam, lesson.where)
        loss = divergence(lesson.logits, logits, lesson.gold, TOP_K)
        loss.backward()
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = RATE * scale * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        best = fitted()
        return replace(
            start,
            layers=tuple(
                Slots(k[0], v[0], slots.positions, bias[0])
                for k, v, slots, bias in zip(
                    best.keys, best.values, start.layers, best.bias, strict=True
                )
            ),
        )
