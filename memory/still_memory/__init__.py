"""What a conversation remembers: spans of KV slots, compactors, and the store that keeps them.

Names are imported when first used, so that `import still_memory` costs nothing and loads no
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from still_memory.check import check_store
    from still_memory.checkpoint import Checkpoint, Entry
    from still_memory.compactors.base import Compactor
    from still_memory.errors import (
        BudgetError,
        CompactorError,
        ConflictError,
        DamageError,
        EncryptionError,
        ErasureError,
        IdentityError,
        InputError,
        StillError,
        StoreError,
        TaintedError,
        UnknownSessionError,
    )
    from still_memory.findings import Finding, Report
    from still_memory.identity import CompactorIdentity, ModelIdentity
    from still_memory.portable import Portable
    from still_memory.prune import Pruned
    from still_memory.records import Head, Match, NewTurn, SessionInfo, StoreStats, TurnRecord
    from still_memory.retention import Retention
    from still_memory.space import Space
    from still_memory.span import Slots, Span
    from still_memory.store import MemoryStore
    from still_memory.taint import Deleted, Taint

__all__ = [
    "BudgetError",
    "Checkpoint",
    "Compactor",
    "CompactorError",
    "CompactorIdentity",
    "ConflictError",
    "DamageError",
    "Deleted",
    "EncryptionError",
    "Entry",
    "ErasureError",
    "Finding",
    "Head",
    "IdentityError",
    "InputError",
    "Match",
    "MemoryStore",
    "ModelIdentity",
    "NewTurn",
    "Portable",
    "Pruned",
    "Report",
    "Retention",
    "SessionInfo",
    "Slots",
    "Space",
    "Span",
    "StillError",
    "StoreError",
    "StoreStats",
    "Taint",
    "TaintedError",
    "TurnRecord",
    "UnknownSessionError",
    "check_store",
]

_HOMES = {
    "check": ("check_store",),
    "checkpoint": ("Checkpoint", "Entry"),
    "compactors.base": ("Compactor",),
    "findings": ("Finding", "Report"),
    "identity": ("CompactorIdentity", "ModelIdentity"),
    "portable": ("Portable",),
    "prune": ("Pruned",),
    "records": ("Head", "Match", "NewTurn", "SessionInfo", "StoreStats", "TurnRecord"),
    "retention": ("Retention",),
    "space": ("Space",),
    "span": ("Slots", "Span"),
    "store": ("MemoryStore",),
    "taint": ("Deleted", "Taint"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'still_memory' has no attribute {name!r}")
    value = getattr(import_module(f"still_memory.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
