"""What the base model's queries look at: the evidence of methods that go by attention.

Such methods need queries, and a cache keeps none. So the model, a `Reader`, is given the tokens
once more, on top of the spans that a compaction takes. What it does not take (the pinned prefix,
other tiers) is not there: close to what the tokens looked at when they were first read, not equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from still_memory.errors import CompactorError
from still_memory.span import Span

REQUEST = "\n\nRepeat the previous context exactly.\n\n"


BLOCK = 256  # queries whose weights are computed at once


@dataclass(frozen=True)
class Looks:
    """One layer: the queries of n tokens, and the S + n keys they meet, their own at the end."""

    queries: Tensor  # (H, n, d), as rotated
    keys: Tensor  # (H_kv, S + n, d), as rotated
    bias: Tensor | None  # (H_kv, S + n)

    def weights(self) -> Iterator[Tensor]:
        """Attention weights `(H_kv, H / H_kv, BLOCK, S + n)` in fp32, some queries at a time.

        A token sees none after it.
        """
        heads, slots, d = self.keys.shape
        keys = self.keys.float().mT[:, None] * d**-0.5
        at = torch.arange(slots, device=keys.device)
        first = slots - self.queries.shape[1]
        for queries in self.queries.unflatten(0, (heads, -1)).split(BLOCK, dim=2):
            logits = queries.float() @ keys
            if self.bias is not None:
                logits += self.bias[:, None, None]
            unseen = at > at[first : first + queries.shape[2], None]
            yield logits.masked_fill_(unseen, -torch.inf).softmax(-1)
            first += queries.shape[2]


class Reader(Protocol):
    """A base model, as a compactor may use it."""

    window: int  # positions that it was trained for

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `still_memory.rotation.Rope`."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ...

    def look(self, before: Sequence[Span], ids: Sequence[int]) -> Sequence[Looks]:
        """What `ids`, read after the spans `before`, look at, layer by layer.

        The spans' slots stand densely from position 0 on. Changes nothing.
        """
        ...


def told(spans: Sequence[Span]) -> tuple[list[Span], list[Span], list[int]]:
    """Compact spans, which come first, raw spans, and the tokens of these.

    Raises CompactorError where the tokens of a raw span are not known.
    """
    compact = [s for s in spans if not s.raw]
    raw = [s for s in spans if s.raw]
    ids: list[int] = []
    for span in raw:
        if span.ids is None:
            raise CompactorError(
                f"the tokens of {span} are not known: it was saved by an earlier version. Begin a "
                'new session, or use a compactor that reads none, such as compactor="streaming"'
            )
        ids += span.ids
    return compact, raw, ids


def repeated(
    reader: Reader, spans: Sequence[Span], ids: Sequence[int], instead: Sequence[int] = ()
) -> Iterator[Sequence[Looks]]:
    """What the model looks at to repeat `ids` after `spans`: in as many parts as its window takes.

    The method of KVzip (arXiv 2505.23416). `instead`: other tokens that it reads there, such as
    the questions, for a ruler that is told them. Raises CompactorError if nothing fits behind
    the spans.
    """
    request = [] if instead else reader.encode(REQUEST)
    ids = instead or ids
    room = reader.window - sum(len(span) for span in spans) - len(request)
    if room < 1:
        raise CompactorError(
            f"the context fills the model's window of {reader.window}, so it cannot be repeated "
            "after it: use a smaller budget"
        )
    for first in range(0, len(ids), room):
        yield reader.look(spans, [*request, *ids[first : first + room]])
