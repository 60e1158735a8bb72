"""The frozen model with its whole cache, and what it would say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import DynamicCache

from still_agent.models.frozen import FrozenModel
from still_agent.training.exams import Exams, all_right
from still_memory.compactors.cache import Cache
from still_memory.rotation import unrotate

AT_ONCE = 2**24  # logits; 64 MiB in fp32


@dataclass(frozen=True)
class Lesson:
    """One batch, seen by the teacher."""

    cache: Cache  # the whole context, raw, keys without rotation
    hidden: Tensor  # (n, D) the last layer's states, before every answer token that is taught
    where: tuple[Tensor, Tensor]  # row and column of the exam token *before* each of them
    gold: Tensor  # (n,) the answer tokens
    right: tuple[int, int]  # the teacher's own exact answers, of all


@torch.no_grad()
def prefill(
    frozen: FrozenModel, ids: Tensor, position: int, past: TransformersCache | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Run ids (B, n) from `position` on, on top of `past`, which they join.

    Returns their keys, with the rotation undone, and values, each L of (B, H_kv, n, d).
    """
    cache: Any = DynamicCache(config=frozen.model.config) if past is None else past
    before = cache.get_seq_length()
    at = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
    frozen.model.model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    keys = [unrotate(x.keys[:, :, before:], at[0].float(), frozen.rope) for x in cache.layers]
    return keys, [x.values[:, :, before:].to(frozen.dtype) for x in cache.layers]


def exactly(frozen: FrozenModel) -> torch.autocast:
    """No autocast in here: training may run the frozen model in bf16, and nothing else."""
    return torch.autocast(frozen.device.type, enabled=False)


def logits_of(frozen: FrozenModel, hidden: Tensor) -> Tensor:
    """Logits (n, V) in fp32 after hidden states (n, D)."""
    with exactly(frozen):
        return F.linear(hidden.to(frozen.dtype), frozen.model.lm_head.weight).float()


def in_parts(frozen: FrozenModel, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of hidden states (n, D) after others, with their logits: `AT_ONCE` or fewer.

    At least one part, be it of no row.
    """
    rows = max(1, AT_ONCE // frozen.vocab_size)
    for at in range(0, max(len(hidden), 1), rows):
        some = slice(at, at + rows)
        yield some, logits_of(frozen, hidden[some])


@torch.no_grad()
def teach(frozen: FrozenModel, exams: Exams, *, own: bool = True) -> Lesson:
    """The teacher's lesson on a batch. A context of one row serves every row of the exam.

    Only answers that the model itself gives are taught: an answer whose reference text departs
    from the teacher's own greedy choice is dropped from that token on (answers by another model
    ruin training: METHOD notes of the paper's reproductions). With `own=False` every answer
    token is taught, whoever chose it.
    """
    model = frozen.model
    rows, length = exams.context.shape
    past = DynamicCache(config=model.config)
    keys, values = prefill(frozen, exams.context, 0, past)
    if len(exams.exam) > rows:
        past.batch_repeat_interleave(len(exams.exam) // rows)
    at = torch.arange(length, length + exams.exam.shape[1] - 1, device=frozen.device)[None]
    hidden = model.model(
        input_ids=exams.exam[:, :-1], position_ids=at, past_key_values=past, use_cache=True
    ).last_hidden_state
    speaking = exams.answer[:, 1:]  # from these tokens an answer's tokens are said
    hidden = hidden[speaking]
    choice = torch.cat([x.argmax(-1) for _, x in in_parts(frozen, hidden)])
    gold = exams.exam[:, 1:][speaking]
    hits = torch.zeros_like(exams.answer)
    hits[:, 1:][speaking] = choice == gold
    taught = (_up_to_first_miss(hits, exams) if own else exams.answer)[:, 1:][speaking]
    row, column = speaking.nonzero(as_tuple=True)
    return Lesson(
        cache=Cache.raw(keys, values),
        hidden=hidden[taught],
        where=(row[taught], column[taught]),
        gold=gold[taught],
        right=all_right(hits, exams),
    )


def _up_to_first_miss(hits: Tensor, exams: Exams) -> Tensor:
    """Answer tokens before which, in their own answer, the teacher made no other choice."""
    kept = torch.zeros_like(hits)
    for b in range(hits.shape[0]):
        for run in range(int(exams.runs[b].max()) + 1):
            at = (exams.runs[b] == run).nonzero()[:, 0]
            kept[b, at] = hits[b, at].int().cumprod(0).bool()
    return kept
