"""Runs a frozen language model and keeps its conversation going, within a budget of slots.

Names are imported when they are first used, so that `import still_agent` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from still_agent.agent import Agent
    from still_agent.answering import Answering
    from still_agent.budget import Budget
    from still_agent.events import Compaction
    from still_agent.forget import Forgotten
    from still_agent.messages import Message, ToolCall
    from still_agent.replay import Restored
    from still_agent.reply import Reply, Usage
    from still_agent.sampling import Sampling
    from still_agent.session import Session, Stats
    from still_agent.tools import Tool
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

__all__ = [
    "Agent",
    "Answering",
    "Budget",
    "BudgetError",
    "Compaction",
    "CompactorError",
    "ConflictError",
    "DamageError",
    "EncryptionError",
    "ErasureError",
    "Forgotten",
    "IdentityError",
    "InputError",
    "Message",
    "Reply",
    "Restored",
    "Sampling",
    "Session",
    "Stats",
    "StillError",
    "StoreError",
    "TaintedError",
    "Tool",
    "ToolCall",
    "UnknownSessionError",
    "Usage",
]

_HOMES = {
    "agent": ("Agent",),
    "answering": ("Answering",),
    "budget": ("Budget",),
    "events": ("Compaction",),
    "forget": ("Forgotten",),
    "messages": ("Message", "ToolCall"),
    "replay": ("Restored",),
    "reply": ("Reply", "Usage"),
    "sampling": ("Sampling",),
    "session": ("Session", "Stats"),
    "tools": ("Tool",),
}
_HOME = {name: f"still_agent.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'still_agent' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "still_memory.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
