"""LangGraph's serialiser, made to refuse: no pickle, and no type that was not named.

What a checkpoint's bytes name is imported only if it is among LangGraph's safe types (messages,
dates, sets, interrupts, ...) or was allowed. LangGraph gives back something else where it refuses
(the fields of an object in place of the object, or None), which a graph may go on with unawares;
here that is an error, which names the types.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from langgraph.checkpoint.serde.event_hooks import SerdeEvent, register_serde_event_listener
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

_KINDS = ("null", "bytes", "bytearray", "msgpack")  # as it writes them; older ones were laxer

_refused: ContextVar[list[tuple[str, str]] | None] = ContextVar("refused", default=None)


class RefusedError(ValueError):
    """Bytes name types that were not allowed: (module, name) of each."""

    def __init__(self, types: list[tuple[str, str]]) -> None:
        super().__init__(f"it holds types that were not allowed: {types}")
        self.types = types


class StrictSerializer(JsonPlusSerializer):
    """Values as msgpack. `with_msgpack_allowlist` names further types, one by one."""

    def __init__(self) -> None:
        super().__init__(pickle_fallback=False, allowed_msgpack_modules=None)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """The value of these bytes. RefusedError if they name a type that was not allowed."""
        if data[0] not in _KINDS:
            raise ValueError(f"it is written as {data[0][:20]!r}, which is not read here")
        refused: list[tuple[str, str]] = []
        token = _refused.set(refused)
        try:
            value = super().loads_typed(data)
        finally:
            _refused.reset(token)
        if refused:
            raise RefusedError(list(dict.fromkeys(refused)))
        return value


def _note(event: SerdeEvent) -> None:
    refused = _refused.get()
    if refused is not None and event["kind"] in ("msgpack_blocked", "msgpack_method_blocked"):
        refused.append((str(event["module"]), str(event["name"])))


register_serde_event_listener(_note)
