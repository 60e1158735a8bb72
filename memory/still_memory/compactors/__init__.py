"""Compactors: one file a method, one small interface (`base`)."""

from __future__ import annotations

from collections.abc import Callable

from still_memory.compactors.base import Compactor
from still_memory.compactors.knorm import KNormCompactor
from still_memory.compactors.streaming import StreamingCompactor

TRAINING_FREE: dict[str, Callable[[], Compactor]] = {
    "streaming": StreamingCompactor,
    "knorm": KNormCompactor,
}
"""Methods that work with any model at once, by name."""

__all__ = ["TRAINING_FREE", "Compactor", "KNormCompactor", "StreamingCompactor"]
