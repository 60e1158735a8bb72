"""What a session tells its observers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Compaction:
    """Tokens `[tokens_start, tokens_end)` have just become fewer slots."""

    tokens_start: int
    tokens_end: int
    slots_before: int
    slots_after: int
    rounds: int  # compactions behind the oldest token in it, this one included
    level: int  # tier, in the tiered schedule
    seconds: float


OnReplay = Callable[[int, int], None]
"""Called while a fork, a rewind or a rebuild reads turns again: tokens taken in so far, and in all.

An exception raised by it ends that, and nothing has changed.
"""

OnCompaction = Callable[[Compaction], None]
"""Called in the turn's own thread, while the turn waits: be quick, or hand the event on.

An exception raised by it ends the turn, which is undone, and reaches the caller.
"""

OnToken = Callable[[], None]
"""Called before each token of a reply, in the turn's own thread. An exception raised by it ends the
turn like one of `OnCompaction`.
"""
