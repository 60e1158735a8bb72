"""Compactors: one file a method, one small interface (`base`)."""

from __future__ import annotations

from collections.abc import Callable

from still_memory.compactors.attention_matching import AttentionMatchingCompactor
from still_memory.compactors.base import Compactor
from still_memory.compactors.chance import RandomCompactor
from still_memory.compactors.h2o import H2OCompactor
from still_memory.compactors.knorm import KNormCompactor
from still_memory.compactors.kvzip import KVzipCompactor
from still_memory.compactors.looks import Reader
from still_memory.compactors.snapkv import SnapKVCompactor
from still_memory.compactors.streaming import StreamingCompactor
from still_memory.compactors.stride import StrideCompactor

TRAINING_FREE: dict[str, Callable[[Reader], Compactor]] = {
    "streaming": lambda _: StreamingCompactor(),
    "stride": lambda _: StrideCompactor(),
    "random": lambda _: RandomCompactor(),
    "knorm": lambda _: KNormCompactor(),
    "h2o": H2OCompactor,
    "snapkv": SnapKVCompactor,
    "kvzip": KVzipCompactor,
    "attention-matching": AttentionMatchingCompactor,
}
"""Methods that work with any model at once, by name; some read the text once more."""

__all__ = [
    "TRAINING_FREE",
    "AttentionMatchingCompactor",
    "Compactor",
    "H2OCompactor",
    "KNormCompactor",
    "KVzipCompactor",
    "RandomCompactor",
    "Reader",
    "SnapKVCompactor",
    "StreamingCompactor",
    "StrideCompactor",
]
