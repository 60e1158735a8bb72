"""Any compactor, with keys and values rounded to few bits (see `grids`).

What is kept in memory is the rounded numbers in the model's dtype, so this shows what rounding
costs; it saves no bytes by itself. A store's codec does, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from still_memory.compactors.base import Compactor
from still_memory.errors import CompactorError
from still_memory.grids import rounded
from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts
from still_memory.span import Span


@dataclass(frozen=True)
class QuantisedCompactor:
    """`inner`'s slots, each number one of 2 ** `bits` in its group."""

    inner: Compactor
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CompactorError(f"numbers of {self.bits} bits are no INT8 or INT4: give 4 or 8")

    @property
    def identity(self) -> CompactorIdentity:
        inner = self.inner.identity
        return inner.model_copy(update={"method": f"{inner.method}+int{self.bits}"})

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        mine, inner = self.identity.address, self.inner.identity.address
        # A compactor knows slots of its own by their address, rounded or not.
        own = [replace(s, compactor=inner) if s.compactor == mine else s for s in spans]
        span = self.inner.compact(own, slots, longest)
        layers = tuple(
            replace(layer, keys=rounded(layer.keys, self.bits, 1),
                    values=rounded(layer.values, self.bits, 2))
            for layer in span.layers
        )  # fmt: skip
        return replace(span, layers=layers, compactor=mine)
