"""KVzip: what the model looks at to repeat the context is what the context holds (2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from still_memory.compactors.looks import Reader, repeated, told
from still_memory.compactors.selection import Selection, ranked_in_the_middle, remembered
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class KVzipCompactor(Selection):
    """A token's score is the most attention that any query pays it while the text is repeated.

    A chunk is scored once, alone, when it is raw; its slots carry their scores from then on, for
    slots without their text cannot be repeated. `questions`: token ids to read in place of a
    repetition; no rival then, but a ruler.
    """

    remembers: ClassVar[bool] = True
    reader: Reader = field(repr=False)
    questions: tuple[int, ...] = ()

    @property
    def identity(self) -> CompactorIdentity:
        return CompactorIdentity(
            method="kvzip", config=f"questions={self.questions}" if self.questions else ""
        )

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        _, raw, ids = told(spans)
        mine = self.identity.address
        found = [remembered(spans, n, mine) for n in range(len(layers))]
        for part in repeated(self.reader, raw, ids, self.questions):
            for score, look in zip(found, part, strict=True):
                fresh = score[:, -len(ids) :]
                for weights in look.weights():
                    most = weights[..., : len(ids)].amax((1, 2))
                    fresh.copy_(most.fmax(fresh))
        return [ranked_in_the_middle(score) for score in found]
