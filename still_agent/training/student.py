"""The frozen model with a compact cache, as the runtime would build it; differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from still_agent.models.frozen import FrozenModel
from still_agent.models.placed import placed
from still_agent.training.teacher import exactly, logits_of
from still_memory.compactors.cache import Cache

Shorten = Callable[[Cache, int, Tensor], Cache]
"""A trained compactor's forward pass: a cache, how many slots to write, and the tokens (B, n) of
its raw slots, which are its last ones."""


def answer_states(
    frozen: FrozenModel, cache: Cache, exam: Tensor, where: tuple[Tensor, ...]
) -> Tensor:
    """Hidden states (n, D) after exam tokens `where` (rows, columns), read on top of `cache`."""
    at = torch.arange(cache.slots, cache.slots + exam.shape[1] - 1, device=exam.device)[None]
    hidden: Tensor = frozen.model.model(
        input_ids=exam[:, :-1],
        position_ids=at,
        past_key_values=placed(cache, frozen.rope, frozen.dtype),
        use_cache=True,
    ).last_hidden_state
    return hidden[where]


def answer_logits(
    frozen: FrozenModel, cache: Cache, exam: Tensor, where: tuple[Tensor, ...]
) -> Tensor:
    """Logits (n, V) after exam tokens `where` (rows, columns), read on top of `cache`."""
    return logits_of(frozen, answer_states(frozen, cache, exam, where))


def compact_in_rounds(
    frozen: FrozenModel, shorten: Shorten, context: Tensor, whole: Cache, *,
    rounds: int, slots: int, raw_tail: int,
) -> Cache:  # fmt: skip
    """Read `context` (B, T) as the rolling schedule does, in `rounds` equal chunks.

    Each chunk is read on top of the memory so far and the newest `raw_tail` raw tokens; then
    memory and all but the newest tokens are compacted to `slots`. With one round the teacher's
    own `whole` cache is used. Returns the state at the end.

    The reading itself passes no gradient: a slot is taught through answers, and through the
    later rounds that keep it.
    """
    length = context.shape[1]
    memory = tail = whole.cut(0, 0)
    chunk = -(-length // rounds)
    for read in range(0, length, chunk):
        ids = context[:, read : read + chunk]
        fresh = whole if rounds == 1 else _read(frozen, ids, Cache.cat([memory, tail]), read)
        tail = Cache.cat([tail, fresh])
        last = max(tail.slots - raw_tail, 1)
        first = read + ids.shape[1] - tail.slots  # the oldest raw token
        old, tail = tail.cut(0, last), tail.cut(last, tail.slots)
        source = Cache.cat([memory, old])
        with exactly(frozen):
            taken = context[:, first : first + last]
            memory = shorten(source, min(slots, source.slots), taken)
    return Cache.cat([memory, tail])


@torch.no_grad()
def _read(frozen: FrozenModel, ids: Tensor, state: Cache, start: int) -> Cache:
    """Fresh raw slots of ids (B, n), read on top of `state`."""
    return Cache.raw(*frozen.read(state, ids), start)
