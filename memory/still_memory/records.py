"""What goes into the store and what comes out of it, as plain records."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import JsonValue

from still_memory.errors import InputError
from still_memory.identity import ModelIdentity

MAX_SESSION_NAME = 512


@dataclass(frozen=True)
class NewTurn:
    """A turn about to be saved: a message of any role, and the ids that were fed for it."""

    role: str
    text: str
    tokens: Sequence[int]
    usage: Mapping[str, JsonValue] = field(default_factory=dict)
    created: datetime | None = None  # None: the time of the commit; else with a time zone


@dataclass(frozen=True)
class TurnRecord:
    """A turn of the ledger. `parent` is the id of the turn it answers to, None for a root."""

    role: str
    text: str
    tokens: list[int]
    created: datetime  # UTC
    number: int  # 1 for a conversation's first turn; the same in every fork that shares it
    id: int
    parent: int | None
    usage: dict[str, JsonValue]


@dataclass(frozen=True)
class Match:
    """A turn in which a search has found its words."""

    number: int  # of the turn, as `history` counts
    role: str
    created: datetime  # UTC
    excerpt: str  # the words, and some of those around them; runs of blanks are one


@dataclass(frozen=True)
class Head:
    """Where a session stands: what a commit must name, and what a resume starts from.

    With an earlier `turn` of the session (and `turns`) it is where a rewind commits and a fork
    begins.
    """

    session: str
    session_id: int  # never used twice, so a session made anew is another one
    generation: int  # grows by one with each commit
    checkpoint: int
    turn: int | None
    turns: int
    tokens: int  # logical
    model: ModelIdentity
    settings: dict[str, JsonValue]


@dataclass(frozen=True)
class SessionInfo:
    """A line of the session list; read without touching a tensor."""

    name: str
    turns: int
    tokens: int  # logical
    slots: int
    bytes: int  # of the spans its newest checkpoint holds; shared spans count in each session
    created: datetime  # UTC
    updated: datetime  # UTC
    model: str


@dataclass(frozen=True)
class StoreStats:
    """How large the store is, and of what."""

    sessions: int
    turns: int
    checkpoints: int
    spans: int
    span_bytes: int
    graph_states: int
    file_bytes: int
    wal_bytes: int
    free_bytes: int  # inside the file, to be used again or given back


def check_text(text: str, what: str) -> str:
    """The text, if it can be written as UTF-8."""
    if not isinstance(text, str):
        raise InputError(f"{what} must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds a lone surrogate at character {error.start}; decode the source as "
            "UTF-8 with errors='replace'"
        ) from None
    return str.__str__(text)  # of a subclass, such as an enum, the text alone


def check_session_name(name: str) -> str:
    """Any Unicode text of 1 to 512 characters names a session."""
    check_text(name, "a session name")
    if not 0 < len(name) <= MAX_SESSION_NAME:
        raise InputError(
            f"a session name has 1 to {MAX_SESSION_NAME} characters, and this one has {len(name)}"
        )
    return name


def check_limit(limit: int) -> int:
    """A number of results."""
    if type(limit) is not int or limit < 0:
        raise InputError(f"a limit is a number of results from 0 on, not {limit!r}")
    return min(limit, sys.maxsize)


def to_json(value: object, what: str) -> str:
    """Compact JSON; floats come back exactly."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} cannot be written as JSON ({error}); use plain values") from None


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as uint32, little-endian."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        raise InputError("token ids must be integers from 0 to 2**32 - 1") from None


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`; four bytes an id."""
    return list(struct.unpack(f"<{len(data) // 4}I", data))
