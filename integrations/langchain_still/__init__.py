"""LangChain and LangGraph speak to an agent.

Names are imported when first used, so that each costs no more than the libraries that it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langchain_still.chat_model import ChatStill
    from langchain_still.checkpointer import StillCheckpointer
    from langchain_still.history import StillChatMessageHistory
    from langchain_still.middleware import KVMemoryMiddleware
    from langchain_still.strict_serializer import StrictSerializer

__all__ = [
    "ChatStill",
    "KVMemoryMiddleware",
    "StillChatMessageHistory",
    "StillCheckpointer",
    "StrictSerializer",
]

_HOMES = {
    "ChatStill": "chat_model",
    "KVMemoryMiddleware": "middleware",
    "StillChatMessageHistory": "history",
    "StillCheckpointer": "checkpointer",
    "StrictSerializer": "strict_serializer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'langchain_still' has no attribute {name!r}")
    value = getattr(import_module(f"langchain_still.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
