"""A LangGraph checkpoint as a state of the store, and back.

A channel's value is named by its version. A list is stored element by element, so that one which
grows writes what it gains. What a checkpoint holds is its own list, begun from its parent's: so
versions may be plain numbers, and two runs that go on from one checkpoint do not write over each
other's values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langchain_still.strict_serializer import RefusedError
from still_memory.errors import DamageError, InputError, StoreError
from still_memory.graphs_table import GraphState, Otherwise, Place

_LIST = b""  # the first piece of a list; no other piece is empty


class CheckpointCodec:
    """Checkpoints as bytes, by a serialiser.

    InputError for what cannot be written, or would not be read; DamageError for bytes that are no
    checkpoint, and StoreError for those that name a type which was not allowed.
    """

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def state(
        self,
        place: Place,
        parent: str | None,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[GraphState, Otherwise]:
        """A state whose new values are its own, and the others its parent's.

        With what these are if the parent does not have them.
        """
        values, versions = checkpoint["channel_values"], checkpoint["channel_versions"]
        names = {_name(channel, version): channel for channel, version in versions.items()}

        def pieces(name: str) -> Sequence[bytes] | None:
            channel = names[name]
            return self._pieces(values[channel], channel, place) if channel in values else None

        state = GraphState(
            place,
            parent,
            str(metadata.get("run_id") or ""),
            self.dump(metadata),
            self.dump({k: v for k, v in checkpoint.items() if k != "channel_values"}),
            {
                name: pieces(name) if channel in new_versions else None
                for name, channel in names.items()
                if channel not in new_versions or channel in values
            },
        )
        return state, pieces

    def checkpoint(self, state: GraphState) -> CheckpointTuple:
        """The inverse of `state`, with its pending writes."""
        place, parent = state.place, state.parent
        checkpoint, metadata = self._load(state.body, place), self.metadata(state.about, place)
        try:
            values = {
                channel: self._value(pieces, place)
                for channel, version in checkpoint["channel_versions"].items()
                if (pieces := state.values.get(_name(channel, version))) is not None
            }
            writes = sorted(
                (self._write(data, place) for data in state.writes.values()),
                key=lambda write: write[0],
            )
        except (TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
            raise _damaged(place, error) from None
        return CheckpointTuple(
            config_of(place),
            cast(Checkpoint, {**checkpoint, "channel_values": values}),
            cast(CheckpointMetadata, metadata),
            None if parent is None else config_of(Place(place.thread, place.space, parent)),
            [write for _, write in writes],
        )

    def metadata(self, about: bytes, place: Place) -> dict[str, Any]:
        """A checkpoint's metadata."""
        metadata = self._load(about, place)
        if not isinstance(metadata, dict):
            raise _damaged(place, ValueError("it has no metadata"))
        return metadata

    def write(
        self, place: Place, task: str, path: str, position: int, channel: str, value: Any
    ) -> tuple[str, bytes, bool]:
        """What a task has written to a channel: its name, its bytes, and whether it comes again.

        An error or an interrupt does, in place of the one before.
        """
        index = WRITES_IDX_MAP.get(channel, position)
        head = json.dumps([path, task, index, channel]).encode()
        return f"{task} {index}", head + b"\n" + self._kept(value, channel, place), index < 0

    def dump(self, value: Any, channel: str = "") -> bytes:
        """A value as one piece; of a channel, if it is named."""
        try:
            kind, data = self._serde.dumps_typed(value)
        except Exception as error:  # whatever a serialiser raises
            raise InputError(
                f"what channel {channel!r} holds cannot be written ({error}): keep messages, plain "
                "values, dataclasses and models in a graph's state"
            ) from None
        return kind.encode() + b"\0" + data

    def _load(self, piece: bytes, place: Place) -> Any:
        kind, _, data = piece.partition(b"\0")
        try:
            return self._serde.loads_typed((kind.decode(), data))
        except RefusedError as error:
            raise StoreError(
                f"{_told(place)} holds objects of types that are not loaded unless they are named: "
                f"if they are yours, use checkpointer.with_allowlist({error.types})"
            ) from None
        except Exception as error:  # whatever a serialiser makes of bytes that are not its own
            raise _damaged(place, error) from None

    def _kept(self, value: Any, channel: str, place: Place) -> bytes:
        """A value as one piece. InputError if it could not be loaded again."""
        piece = self.dump(value, channel)
        try:
            self._load(piece, place)
        except StoreError as error:
            raise InputError(f"what channel {channel!r} holds would not be read: {error}") from None
        return piece

    def _pieces(self, value: Any, channel: str, place: Place) -> Sequence[bytes]:
        """A channel's value. A cipher's bytes are never the same twice, so a list is one piece.

        A list's elements came as a graph's input or were written by a task, and were looked at
        then.
        """
        if type(value) is list and isinstance(self._serde, JsonPlusSerializer):
            return [_LIST, *(self.dump(element, channel) for element in value)]
        return [self._kept(value, channel, place)]

    def _value(self, pieces: Sequence[bytes], place: Place) -> Any:
        if pieces[0] == _LIST:
            return [self._load(piece, place) for piece in pieces[1:]]
        return self._load(pieces[0], place)

    def _write(self, data: bytes, place: Place) -> tuple[tuple[str, str, int], PendingWrite]:
        """A pending write, after what LangGraph wants writes sorted by."""
        head, _, piece = data.partition(b"\n")
        path, task, index, channel = json.loads(head)
        return (path, task, index), (task, channel, self._load(piece, place))


def config_of(place: Place) -> RunnableConfig:
    """The config that names a checkpoint."""
    return {
        "configurable": {
            "thread_id": place.thread,
            "checkpoint_ns": place.space,
            "checkpoint_id": place.id,
        }
    }


def _name(channel: str, version: str | int | float) -> str:
    """What a channel's value is called in a state."""
    return f"{version!r} {channel}"


def _told(place: Place) -> str:
    return f"checkpoint {place.id[:40]!r} of thread {place.thread[:80]!r}"


def _damaged(place: Place, error: Exception) -> DamageError:
    return DamageError(
        f"{_told(place)} is damaged ({type(error).__name__}: {error}); restore the store from a "
        "copy, or delete the thread"
    )
