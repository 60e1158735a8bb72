"""Slots fitted to one context by gradient descent, as Cartridges are (arXiv 2506.06266).

The model with its whole cache teaches, by its distribution at every token that it says in some
conversations about the context; the slots are all that learns. The conversations make it a rival
or a ruler: those that the model held with itself (`self_study.py`), or the very questions that
will be asked, which shows how much so many slots could hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import pack
from still_agent.training.student import answer_states
from still_agent.training.targets import divergence, logits_at, targets
from still_agent.training.teacher import teach
from still_memory.compactors.cache import Cache
from still_memory.errors import InputError
from still_memory.span import Slots, Span

RATE = 0.05  # of a part's own root mean square
LEAST = 0.2  # of such a mean: biases begin at 0
TOP_K = 200
ROWS = 4  # conversations of one step

Conversation = tuple[list[int], list[bool]]  # token ids, and which of them are learnt to be said
Watch = Callable[[int, int], None]  # gets the steps done, and how many there are


@dataclass(frozen=True)
class Fit:
    """How slots are fitted. `fixed`: of them, the first that stay as they are."""

    steps: int = 80
    fixed: int = 0
    biased: bool = True  # whether each slot learns a bias, too


def require_window(model: FrozenModel, context: int, conversation: int) -> None:
    """InputError if the teacher cannot read both, in tokens, one behind the other."""
    if context + conversation > model.window:
        left = model.window - conversation
        shorter = f"ask for contexts of {left} or fewer, or " if left > 0 else ""
        raise InputError(
            f"slots are fitted to what {model.name!r} says on the whole context, and its window of "
            f"{model.window} does not hold {context} tokens and {conversation} of questions and "
            f"replies: {shorter}leave told-optimised and cartridges out"
        )


@torch.inference_mode(False)
def fitted(
    model: FrozenModel, ids: Sequence[int], conversations: Sequence[Conversation], start: Span,
    fit: Fit, watch: Watch = lambda *_: None,
) -> Span:  # fmt: skip
    """`start`, fitted so that on it the model says what it says on all of the context `ids`.

    Takes a span whose keys are not rotated; its empty slots stay empty. `ROWS` conversations a
    step, in turn. InputError, before anything is computed, for what the model's window cannot hold.
    """
    longest = max(len(talk) for talk, _ in conversations)
    require_window(model, len(ids), longest)
    batches = []
    for at in range(0, len(conversations), ROWS):
        exams = pack([(list(ids), *talk) for talk in conversations[at : at + ROWS]])
        exams = replace(exams, context=exams.context[:1]).to(model.device)
        lesson = teach(model, exams, own=False)
        wanted = targets(model, lesson.hidden, lesson.gold, TOP_K)
        batches.append((exams.exam, lesson.where, wanted))
    held = Cache.of(start)
    kept, free = held.cut(0, fit.fixed), held.cut(fit.fixed, held.slots)
    layers = len(free.keys)
    parts = [p.float().clone().requires_grad_() for p in (*free.keys, *free.values, free.bias)]
    learnt = parts if fit.biased else parts[:-1]
    whole = [p.detach()[p.detach().isfinite()] for p in learnt]  # an empty slot's bias is not
    scales = [max(p.square().mean().sqrt().item(), LEAST) for p in whole]
    optimizer = torch.optim.Adam([{"params": [p]} for p in learnt], betas=(0.9, 0.95))

    def now() -> Cache:
        keys, values = parts[:layers], parts[layers : 2 * layers]
        moved = replace(
            free,
            keys=[k.to(model.dtype) for k in keys],
            values=[v.to(model.dtype) for v in values],
            bias=parts[-1],
        )
        return Cache.cat([kept, moved])

    for step in range(fit.steps):
        exam, where, wanted = batches[step % len(batches)]
        states = answer_states(model, now(), exam, where)
        divergence(wanted, logits_at(model, states, wanted.tokens)).backward()
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = RATE * scale * (1 - step / fit.steps)
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1, fit.steps)
    with torch.no_grad():
        best = now()
        return replace(
            start,
            layers=tuple(
                Slots(
                    k[0, :, : len(slots)],
                    v[0, :, : len(slots)],
                    slots.positions,
                    bias[0, :, : len(slots)] if fit.biased else slots.bias,
                )
                for k, v, slots, bias in zip(
                    best.keys, best.values, start.layers, best.bias, strict=True
                )
            ),
        )
