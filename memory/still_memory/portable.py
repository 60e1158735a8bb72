"""One session as one file, to be taken to another machine.

    16 bytes      "still session 1" and a newline
    frames        each its length (uint64, little-endian) and that many bytes:
                  a JSON header, a JSON object for each turn, and one layer's slots
                  (see codec.py) for each layer of each span, in the header's order
    32 bytes      SHA-256 of everything before

Not a SQLite file, for whoever reads one lets its author's schema speak. Here nothing is run,
unpickled or named as a path, and a length is believed only after it was compared with what is
left of the file. The digest finds damage and not malice, so all that the frames say is checked
whether or not it is right. The store makes digests and addresses of its own.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from still_memory.checkpoint import Checkpoint, Entry, Share
from still_memory.codec import EXACT, check_codec, decode, encode
from still_memory.errors import (
    DamageError,
    EncryptionError,
    InputError,
    StillError,
    StoreError,
    UnknownSessionError,
)
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn, TurnRecord, check_session_name, check_text, to_json
from still_memory.sealed_file import KIND as SEALED
from still_memory.sealed_file import SealedReader, SealedWriter
from still_memory.span import Span
from still_memory.spans_table import MAX_LAYERS, fault
from still_memory.vault import KEY_VARIABLE, Key, user_key

KIND = b"still session "
EXACTLY, CODED = b"1\n", b"2\n"  # versions: the second may hold spans in other codecs
_DIGEST = hashlib.sha256().digest_size
_JSON = 1 << 26  # bytes of one JSON frame, at most
_LAYER = 1 << 31  # and of one layer
_PIECE = 1 << 24  # bytes read at once: a frame's length is not trusted for a size

# Of a state whose model was not there when it was imported: whoever opens it has to look at the
# token ids first. A key of the checkpoint's extra state, so that the next commit takes it away.
UNVERIFIED = "unverified"

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Place = Annotated[int, Field(ge=0, lt=2**31)]
_Token = Annotated[int, Field(ge=0, lt=2**32)]


class Store(Protocol):
    """What is asked of a store here."""

    def head(self, session: str) -> Head | None: ...

    def load(self, head: Head, *, device: torch.device | str = "cpu") -> Checkpoint: ...

    def history(self, session: str | Head) -> list[TurnRecord]: ...

    def create(
        self,
        session: str,
        model: ModelIdentity,
        *,
        checkpoint: Checkpoint,
        turns: Sequence[NewTurn],
        settings: Mapping[str, JsonValue],
    ) -> Head: ...


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Span(_Strict):
    start: _Count
    end: _Count
    rotated_at: _Place | None
    rounds: _Count
    compactor: str | None
    ids: list[_Token] | None
    codec: str = EXACT
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]


class _Header(_Strict):
    name: str
    model: ModelIdentity
    settings: dict[str, JsonValue]
    turns: _Count
    tokens: _Count
    spans: list[_Span]
    entries: list[tuple[_Count, _Count, _Count, _Place, Share, _Place]]  # a span's index first
    extra: dict[str, JsonValue]


class _Turn(_Strict):
    role: str
    text: str
    tokens: list[_Token]
    created: str
    usage: dict[str, JsonValue]


@dataclass(frozen=True, eq=False)
class Portable:
    """A session without a store: its turns, and its state after the last of them."""

    name: str
    model: ModelIdentity
    settings: Mapping[str, JsonValue]
    checkpoint: Checkpoint
    turns: Sequence[NewTurn]

    @classmethod
    def of(cls, store: Store, session: str) -> Self:
        """A session as it stands in a store. UnknownSessionError, DamageError, ConflictError."""
        head = store.head(session)
        if head is None:
            raise UnknownSessionError(f"there is no session {session!r} to take out of the store")
        turns = [NewTurn(t.role, t.text, t.tokens, t.usage, t.created) for t in store.history(head)]
        return cls(head.session, head.model, head.settings, store.load(head), turns)

    def save(
        self, store: Store, name: str | None = None, model: ModelIdentity | None = None
    ) -> Head:
        """Begin it in a store, under its own name or another; ConflictError if that is taken.

        model: the one that this session was found to be of, shape and token ids included. Without
            it nothing of that has been looked at: the state is marked as `UNVERIFIED`, and the
            model goes by its digest, for the name in the file is whatever its author wrote.
        """
        extra = {key: told for key, told in self.checkpoint.extra.items() if key != UNVERIFIED}
        if model is None:
            extra[UNVERIFIED] = True
        return store.create(
            self.name if name is None else name,
            model or self.model.unnamed,
            checkpoint=replace(self.checkpoint, extra=extra),
            turns=self.turns,
            settings=self.settings,
        )

    def write(self, path: str | Path, key: Key | None = None) -> None:
        """Write a new file, for its owner alone. InputError if it is there or cannot be written.

        key: as of `MemoryStore`, to seal it with; None: it is plain.
        """
        secret = None if key is None else user_key(key)
        try:
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise InputError(f"{str(path)!r} is there already: name a new file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {str(path)!r}: {error}; name another file") from None
        try:
            with open(out, "wb") as file:
                seen = hashlib.sha256()
                to = file if secret is None else SealedWriter(file, secret)
                for part in self._parts():
                    seen.update(part)
                    to.write(part)
                to.write(seen.digest())
                if isinstance(to, SealedWriter):
                    to.close()
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            with suppress(OSError):
                os.unlink(path)
            if isinstance(error, OSError):
                raise InputError(
                    f"cannot write {str(path)!r}: {error.strerror}; name a file elsewhere"
                ) from None
            raise

    @classmethod
    def read(cls, path: str | Path, key: Key | None = None) -> Self:
        """Read what `write` wrote.

        key: of a sealed one; None is the environment's STILL_AGENT_KEY.

        InputError if it is no such file, StoreError if a newer version wrote it, EncryptionError if
        it is sealed and the key is missing or another one, DamageError if anything in it is not as
        it should be.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{str(path)!r} is not a file; name one that an export wrote")
            with open(path, "rb") as file:
                return cls._read(_Frames(*_opened(file, str(path), key), str(path)))
        except (OSError, ValueError) as error:
            if isinstance(error, StillError):
                raise
            raise InputError(f"cannot read {str(path)!r}: {error}; check the path") from None

    def _parts(self) -> Iterator[bytes]:
        spans = list(dict.fromkeys(e.span for e in self.checkpoint.entries))
        index = {span: n for n, span in enumerate(spans)}
        header = _Header(
            name=self.name,
            model=self.model,
            settings=dict(self.settings),
            turns=len(self.turns),
            tokens=self.checkpoint.length,
            spans=[
                _Span(
                    start=s.start, end=s.end, rotated_at=s.rotated_at, rounds=s.rounds,
                    compactor=s.compactor, ids=None if s.ids is None else list(s.ids),
                    codec=s.codec or EXACT, layers=len(s.layers),
                )
                for s in spans
            ],
            entries=[
                (index[e.span], e.low, e.high, e.base, e.share, e.level)
                for e in self.checkpoint.entries
            ],
            extra=dict(self.checkpoint.extra),
        )  # fmt: skip
        exact = not any(s.coded for s in spans)
        yield KIND + (EXACTLY if exact else CODED)
        told = header.model_dump_json(exclude_defaults=exact)
        yield from _frame(told.encode(), _JSON)
        for turn in self.turns:
            created = (turn.created or datetime.now(UTC)).isoformat()
            said = _Turn(
                role=turn.role, text=turn.text, tokens=list(turn.tokens), created=created,
                usage=dict(turn.usage),
            )  # fmt: skip
            yield from _frame(said.model_dump_json().encode(), _JSON)
        for span in spans:
            for data in span.coded or map(encode, span.layers):
                yield from _frame(data, _LAYER)

    @classmethod
    def _read(cls, frames: _Frames) -> Self:
        try:
            header = _Header.model_validate_json(frames.next(_JSON))
            check_session_name(header.name)
            to_json([header.settings, header.extra], "settings")  # finite numbers
            turns = [_new_turn(frames.next(_JSON)) for _ in range(header.turns)]
            spans = [_span(told, frames) for told in header.spans]
            frames.end()
            entries = tuple(Entry(spans[row[0]], *row[1:]) for row in header.entries)
            if any(e.span.raw == (e.share == "memory") for e in entries):
                raise ValueError("memory is compact, and nothing else is")
            checkpoint = Checkpoint(entries, header.tokens, header.extra)
        except (ValueError, IndexError, OverflowError, MemoryError) as error:
            raise _damaged(frames.path, error) from None
        return cls(header.name, header.model, header.settings, checkpoint, turns)


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


def _opened(file: BinaryIO, path: str, key: Key | None) -> tuple[_Readable, int]:
    """What an export says and how long that is, sealed or not."""
    if file.read(len(SEALED)) != SEALED:
        file.seek(0)
        return file, os.fstat(file.fileno()).st_size
    if (secret := user_key(key)) is None:
        raise EncryptionError(
            f"{path!r} is sealed: put its key into {KEY_VARIABLE}, or give it as key="
        )
    try:
        reader = SealedReader(file, secret, path)
    except ValueError as error:
        raise _damaged(path, error) from None
    return reader, reader.size


def _damaged(path: str, error: Exception) -> DamageError:
    return DamageError(
        f"{path!r} is damaged: {_first_line(error)}. Nothing was taken from it; export the session "
        "again"
    )


class _Frames:
    """The frames of a file, none larger than what is left of it."""

    def __init__(self, file: _Readable, size: int, path: str) -> None:
        self.path = path
        self._file, self._seen = file, hashlib.sha256()
        self._left = size
        kind, version = file.read(len(KIND)), file.read(len(EXACTLY))
        if kind != KIND:
            raise InputError(f"{path!r} is not an exported session; name a file of an export")
        if version not in (EXACTLY, CODED):
            raise StoreError(
                f"{path!r} was written by another version of still-agent; upgrade still-agent, or "
                "export the session again"
            )
        self._seen.update(kind + version)
        self._left -= len(kind + version) + _DIGEST

    def next(self, limit: int) -> bytes:
        (length,) = struct.unpack("<Q", self._take(8))
        if length > limit:
            raise ValueError(f"a frame of {length} bytes, where {limit} are allowed")
        return self._take(length)

    def end(self) -> None:
        if self._left:
            raise ValueError(f"{self._left} bytes too many")
        if self._rest(_DIGEST + 1) != self._seen.digest():
            raise ValueError("its bytes do not match their digest")

    def _rest(self, limit: int) -> bytes:
        """What is left, of at most so many bytes; a sealed file gives a piece at once."""
        data = bytearray()
        while len(data) < limit and (piece := self._file.read(limit - len(data))):
            data += piece
        return bytes(data)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"it ends {count - self._left} bytes too early")
        data = bytearray()
        while len(data) < count:
            piece = self._file.read(min(count - len(data), _PIECE))
            if not piece:
                raise ValueError("it became shorter while it was read")
            data += piece
        self._left -= count
        self._seen.update(data)
        return bytes(data)


def _frame(data: bytes, limit: int) -> Iterator[bytes]:
    if len(data) > limit:
        raise InputError(
            f"a part of the session takes {len(data)} bytes, and {limit} can be exported"
        )
    yield struct.pack("<Q", len(data))
    yield data


def _new_turn(data: bytes) -> NewTurn:
    told = _Turn.model_validate_json(data)
    for text in (told.role, told.text):
        check_text(text, "a turn")
    to_json(told.usage, "a turn's usage")
    created = datetime.fromisoformat(told.created)
    if created.tzinfo is None:
        raise ValueError("a turn's time has no time zone")
    return NewTurn(told.role, told.text, told.tokens, told.usage, created.astimezone(UTC))


def _span(told: _Span, frames: _Frames) -> Span:
    what = f"a layer in {frames.path!r}"
    codec = check_codec(told.codec)
    coded = tuple(frames.next(_LAYER) for _ in range(told.layers))
    layers = tuple(decode(data, what, codec=codec) for data in coded)
    ids = None if told.ids is None else tuple(told.ids)
    span = Span(
        told.start, told.end, layers, told.rotated_at, told.rounds, told.compactor, ids, codec,
        () if codec == EXACT else coded,
    )  # fmt: skip
    if why := fault(span):
        raise ValueError(why)
    for slots in layers:
        # what is no number would spread; of a bias, minus infinity marks an empty slot
        finite = all(t.isfinite().all() for t in (slots.keys, slots.values, slots.positions))
        if not finite or (slots.bias is not None and not (slots.bias < torch.inf).all()):
            raise ValueError("slots that are no numbers")
    return span


def _first_line(error: Exception) -> str:
    """pydantic's messages quote what they refuse, which may be long and is not ours to print."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error)
    first = problems(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"][:4])
    return f"{where}: {first['msg'][:200]}"
