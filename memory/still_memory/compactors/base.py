"""What a compactor is: contiguous spans in, one shorter span out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts
from still_memory.span import Span


class Compactor(Protocol):
    """One way of shortening a cache. Every layer at once; blind to later questions."""

    @property
    def identity(self) -> CompactorIdentity: ...

    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        """Contiguous spans, oldest first, as one span of at most `slots` slots in the mean layer.

        A method that knows what each layer needs deals them out, at most `longest` to any one; or
        `slots` names each head's number. The spans' keys carry no rotation
        (`still_memory.rotation.free`). They may be raw or compact, on any device. The result is
        not rotated either; its `rounds` is one more than the largest among `spans`.
        """
        ...
