"""What a compactor is: contiguous spans in, one shorter span out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from still_memory.identity import CompactorIdentity
from still_memory.shares import Counts, Shares
from still_memory.span import Span


class Compactor(Protocol):
    """One way of shortening a cache. Every layer at once; blind to later questions."""

    @property
    def identity(self) -> CompactorIdentity: ...

    @property
    def shares(self) -> Shares:
        """What each layer and head should get of the slots; () where all get the same."""
        ...

    def compact(self, spans: Sequence[Span], slots: int | Counts) -> Span:
        """Contiguous spans, oldest first, as one span of at most `slots` slots a layer.

        `slots` may name each head's number: who asks deals them out, by `shares`. The spans' keys
        carry no rotation (`still_memory.rotation.free`). They may be raw or compact, on any
        device. The result is not rotated either; its `rounds` is one more than the largest among
        `spans`.
        """
        ...
