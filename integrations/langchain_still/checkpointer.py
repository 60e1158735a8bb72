"""StillCheckpointer: a LangGraph checkpointer in the file that holds the KV sessions.

A thread's graph and its sessions are deleted, copied and erased together. Bytes are read by a
serialiser that imports nothing it was not told of. The asynchronous methods are the synchronous
ones in a thread: the store is safe with those, and SQLite waits for the disk either way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langchain_still.checkpoint_codec import CheckpointCodec, config_of
from langchain_still.strict_serializer import StrictSerializer
from still_memory.errors import InputError
from still_memory.graphs_table import Place
from still_memory.store import MemoryStore
from still_memory.vault import Key


class StillCheckpointer(BaseCheckpointSaver[int]):
    """Keeps the checkpoints of LangGraph's threads in a store of Still Agent.

    path: the store, made if it is not there: the same file as `ChatStill`'s or an `Agent`'s. The
        thread `x` is that of the conversation `x` and of its branches.
    tenant, key: as of `MemoryStore`.
    serde: what turns values into bytes; by default a `StrictSerializer`. `with_allowlist` gives a
        checkpointer that loads further types.

    Safe with threads and processes; what `put` and `put_writes` were given is on disk when they
    return. Every method may raise StoreError, among them DamageError for bytes that are not what
    was written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tenant: str = "",
        key: Key | None = None,
        serde: SerializerProtocol | None = None,
    ) -> None:
        super().__init__(serde=serde or StrictSerializer())
        self.store = MemoryStore(path, tenant=tenant, key=key)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Save a checkpoint after the one that `config` names.

        InputError for a value that cannot be written, or could not be loaded again.
        """
        place = Place(*_thread(config), checkpoint["id"])
        told = get_checkpoint_metadata(config, metadata)
        parent = get_checkpoint_id(config)
        state, otherwise = self._codec.state(place, parent, checkpoint, told, new_versions)
        self.store.graphs.put(state, otherwise)
        return config_of(place)

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Save what a task has written, for the checkpoint that `config` names.

        InputError for a value that cannot be written, or could not be loaded again.
        """
        place = Place(*_thread(config), get_checkpoint_id(config) or "")
        made = [
            self._codec.write(place, task_id, task_path, position, *write)
            for position, write in enumerate(writes)
        ]
        told = {name: data for name, data, _ in made}
        self.store.graphs.put_writes(place, told, {name for name, _, again in made if again})

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names; without an id, the latest of its namespace."""
        thread, space = _thread(config)
        state = self.store.graphs.get(thread, space, get_checkpoint_id(config))
        return None if state is None else self._codec.checkpoint(state)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, latest first: of a thread or of all, with this in their metadata."""
        told = (config or {}).get("configurable", {})
        thread, only = told.get("thread_id"), told.get("checkpoint_id")
        bound = None if before is None else get_checkpoint_id(before)
        graphs, found = self.store.graphs, 0
        for place in graphs.places(thread and str(thread), told.get("checkpoint_ns")):
            if limit is not None and found >= limit:
                return
            if (only and place.id != only) or (bound and place.id >= bound):
                continue
            if filter:
                about = graphs.about(place)
                known = {} if about is None else self._codec.metadata(about, place)
                if not all(known.get(key) == value for key, value in filter.items()):
                    continue
            state = graphs.get(place.thread, place.space, place.id)
            if state is not None:  # else it was deleted meanwhile
                found += 1
                yield self._codec.checkpoint(state)

    def delete_thread(self, thread_id: str, *, erase: bool = False) -> None:
        """Delete a thread: its checkpoints, and its KV sessions with their text.

        erase: also what the file's bytes still hold of it; see `MemoryStore.scrub`.
        """
        self.store.graphs.delete_thread(str(thread_id), erase=erase)
        if erase:
            self.store.scrub()

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """A thread once more: every checkpoint, and its KV sessions forked where they stand.

        No value, turn or span is copied. ConflictError if there is a target already,
        UnknownSessionError if there is no source.
        """
        self.store.graphs.copy_thread(str(source_thread_id), str(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Of each thread keep the latest checkpoint of every namespace, or ("delete") nothing.

        With it stay the older ones from which its delta channels are made. The thread's KV sessions
        keep their newest state.
        """
        if strategy not in ("keep_latest", "delete"):
            raise InputError(f"strategy is 'keep_latest' or 'delete', and not {strategy!r}")
        for thread in map(str, thread_ids):
            if strategy == "delete":
                self.delete_thread(thread)
                continue
            places = self.store.graphs.places(thread)
            latest = {place.space: place for place in reversed(places)}.values()
            kept = {needed for place in latest for needed in self._needed(place)}
            self.store.graphs.trim_thread(thread, [p for p in places if p not in kept])

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints that these runs have made, in every thread, with their writes.

        A thread that is left without a checkpoint goes, with its KV sessions; those of other
        threads keep what they have read, and fork at the next turn.
        """
        self.store.graphs.delete_runs([str(run) for run in run_ids])

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await asyncio.to_thread(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        await asyncio.to_thread(self.put_writes, config, writes, task_id, task_path)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        found = self.list(config, filter=filter, before=before, limit=limit)
        while (one := await asyncio.to_thread(next, found, None)) is not None:
            yield one

    async def adelete_thread(self, thread_id: str, *, erase: bool = False) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id, erase=erase)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await asyncio.to_thread(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await asyncio.to_thread(self.prune, thread_ids, strategy=strategy)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await asyncio.to_thread(self.delete_for_runs, run_ids)

    def close(self) -> None:
        """Close the file; what was saved is on disk already."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _codec(self) -> CheckpointCodec:
        return CheckpointCodec(self.serde)  # a clone by `with_allowlist` has another

    def _needed(self, latest: Place) -> Iterator[Place]:
        """A checkpoint, and those before it from which its delta channels are made."""
        yield latest
        found = self.get_tuple(config_of(latest))
        lacking: set[str] = set()
        if found is not None:
            lacking = set(found.metadata.get("counters_since_delta_snapshot") or ())
            lacking -= found.checkpoint["channel_values"].keys()
        while lacking and found is not None and found.parent_config is not None:
            found = self.get_tuple(found.parent_config)
            if found is not None:
                yield Place(*_thread(found.config), found.checkpoint["id"])
                lacking -= found.checkpoint["channel_values"].keys()


def _thread(config: RunnableConfig) -> tuple[str, str]:
    """The thread and the namespace that a config names."""
    told = config.get("configurable", {})
    if not told.get("thread_id"):
        raise InputError("a checkpoint needs config={'configurable': {'thread_id': ...}}")
    return str(told["thread_id"]), told.get("checkpoint_ns") or ""
