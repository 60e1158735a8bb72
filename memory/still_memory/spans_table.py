"""Spans in the store: immutable rows, found by their content, one blob a layer.

An address is a keyed digest of what a span is: its model, its place, who wrote it, and the
digest of each layer's bytes. A span that has been written or read keeps its address for as
long as it lives in this process, so an unchanged span is never encoded, hashed or written
again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from still_memory.codec import CODECS, EXACT, decode, encode, settled
from still_memory.digests import digest
from still_memory.errors import DamageError, InputError, StoreError
from still_memory.records import pack_ids, unpack_ids
from still_memory.span import Slots, Span
from still_memory.vault import Vault

MAX_LAYERS = 1024

# start, end, rotated_at, rounds, compactor, ids
_Meta = tuple[int, int, int | None, int, str | None, bytes | None]
_Stored = tuple[int, int, bytes, int]  # of a layer: row, number, digest, bytes


@dataclass(frozen=True)
class Packed:
    """A span as it is written. Without layers it is one the store should hold already."""

    address: str
    codec: str
    layers: tuple[bytes, ...] | None
    digests: tuple[bytes, ...]


class SpansTable:
    """The spans of one tenant, whose key makes their addresses.

    codec: what spans are written in that were not settled when they were made.
    """

    def __init__(self, vault: Vault, codec: str = EXACT) -> None:
        self._vault, self._codec = vault, codec
        self._known: WeakKeyDictionary[Span, tuple[str, str]] = WeakKeyDictionary()

    def pack(self, span: Span, model: str) -> Packed:
        """The span as bytes, unless this process knows its address. Touches no file."""
        known = self._known.get(span)
        if known is not None and known[0] == model:
            return Packed(known[1], "", None, ())
        return self._encode(span, model)

    def put(
        self, conn: sqlite3.Connection, span: Span, packed: Packed, model: str, model_id: int
    ) -> tuple[int, int, int]:
        """The span's row id, its bytes, and how many of them this call wrote.

        A span that was made anew, and has the address of one that is there, is held against its
        rows, and they are mended if they are damaged: also for the other sessions that share it.
        """
        query = "select id, bytes from spans where address = ?"
        row = conn.execute(query, (packed.address,)).fetchone()
        if row is not None and packed.layers is None:
            return row[0], row[1], 0
        if packed.layers is None:  # known here, and collected since
            packed = self._encode(span, model)
        assert packed.layers is not None
        if row is not None and self._as_written(conn, row[0], packed, model, model_id):
            return row[0], row[1], 0
        address, codec = packed.address, packed.codec
        *known, ids = _meta(span)
        stored_ids = None if ids is None else self._vault.seal(ids, address, "ids")
        layers = [
            self._vault.seal(data, address, layer, codec)
            for layer, data in enumerate(packed.layers)
        ]
        # equal layers of two spans must not be seen to be equal
        marks = [
            self._vault.seal(mark, address, layer, "digest")
            for layer, mark in enumerate(packed.digests)
        ]
        size = sum(map(len, layers)) + len(stored_ids or b"")
        content = (model_id, *known, stored_ids, codec, len(layers), size)
        if row is None:
            (identity,) = conn.execute(
                'insert into spans (address, model, start, "end", rotated_at, rounds, compactor,'
                " ids, codec, layers, bytes) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) returning id",
                (packed.address, *content),
            ).fetchone()
        else:
            identity = row[0]
            conn.execute(
                'update spans set model = ?, start = ?, "end" = ?, rotated_at = ?, rounds = ?,'
                " compactor = ?, ids = ?, codec = ?, layers = ?, bytes = ? where id = ?",
                (*content, identity),
            )
            conn.execute("delete from span_layers where span = ?", (identity,))
        conn.executemany(
            "insert into span_layers (span, layer, digest, data) values (?, ?, ?, ?)",
            (
                (identity, layer, mark, data)
                for layer, (mark, data) in enumerate(zip(marks, layers, strict=True))
            ),
        )
        return identity, size, size

    def learn(self, span: Span, address: str, model: str) -> None:
        """Remember that the store holds this span."""
        self._known[span] = model, address

    def get(
        self,
        conn: sqlite3.Connection,
        address: str,
        model: str,
        device: torch.device | str,
    ) -> Span:
        """The span at `address`, every byte of it checked before it is used."""
        try:
            meta, codec, stored = self._described(conn, address, model)
            slots, coded = [], []
            for row in stored:
                data = self._data(conn, address, codec, row)
                slots.append(_slots(data, address, row, codec, device))
                coded += [] if codec == EXACT else [data]
            span = replace(_span(meta, tuple(slots)), codec=codec, coded=tuple(coded))
        except ValueError as error:
            raise _damaged(address, str(error)) from None
        self._known[span] = model, address
        return span

    def faults(
        self, conn: sqlite3.Connection, address: str, model: str
    ) -> Iterator[tuple[int | None, str]]:
        """What is wrong with the span at `address`, and in which layer; one in memory at once."""
        try:
            meta, codec, stored = self._described(conn, address, model)
        except ValueError as error:
            yield None, str(error)
            return
        for row in stored:
            try:
                data = self._data(conn, address, codec, row)
                _span(meta, (_slots(data, address, row, codec, "cpu"),))
            except (ValueError, DamageError) as error:
                yield row[1], str(error)

    def _described(
        self, conn: sqlite3.Connection, address: str, model: str
    ) -> tuple[_Meta, str, list[_Stored]]:
        """A span without its tensors, its codec, where these are. ValueError if it is damaged."""
        row = conn.execute(
            'select id, codec, layers, bytes, start, "end", rotated_at, rounds, compactor, ids'
            " from spans where address = ?",
            (address,),
        ).fetchone()
        if row is None:
            raise ValueError("it is missing")
        identity, codec, layers, size, *rest, ids = row
        if codec not in CODECS:
            raise StoreError(f"span {address[:12]} has codec {codec!r}; upgrade still-agent")
        meta: _Meta = (
            *rest, None if ids is None else self._vault.open(ids, address, "ids")
        )  # fmt: skip
        rows = conn.execute(
            "select id, layer, digest, length(data) from span_layers where span = ?"
            " order by layer limit ?",
            (identity, MAX_LAYERS + 1),
        ).fetchall()
        numbers = [r[1] for r in rows]
        whole = numbers == list(range(len(numbers))) and layers == len(numbers)
        if not whole or not 0 < len(numbers) <= MAX_LAYERS:
            raise ValueError("its layers are not all there")
        stored = [
            (row, layer, self._vault.open(mark, address, layer, "digest"), length)
            for row, layer, mark, length in rows
        ]
        # a damaged row may hold values of any type: what is no digest is none of these
        if self._address(model, meta, codec, [r[2] for r in stored]) != address:
            raise ValueError("its description is not what was written")
        if sum(r[3] or 0 for r in stored) + len(ids or b"") != size:
            raise ValueError("its size is not what was written")
        return meta, codec, stored

    def _as_written(
        self, conn: sqlite3.Connection, row: int, packed: Packed, model: str, model_id: int
    ) -> bool:
        """Whether a span's rows are what they would be if it were written now.

        Its address is, and so what it is; but for the model's row, which another damage may name.
        """
        assert packed.layers is not None
        try:
            (named,) = conn.execute("select model from spans where id = ?", (row,)).fetchone()
            _, codec, stored = self._described(conn, packed.address, model)
            return named == model_id and all(
                self._data(conn, packed.address, codec, there) == data
                for there, data in zip(stored, packed.layers, strict=True)
            )
        except (ValueError, StoreError):
            return False

    def _data(self, conn: sqlite3.Connection, address: str, codec: str, row: _Stored) -> bytes:
        """One layer's bytes. ValueError if they are not those that were written."""
        identity, layer, mark, _ = row
        query = "select data from span_layers where id = ?"
        found = conn.execute(query, (identity,)).fetchone()
        if found is None:  # an index may name a lost row
            raise ValueError(f"layer {layer} does not match its digest")
        data = self._vault.open(found[0], address, layer, codec)
        if self._layer_digest(data) != mark:
            raise ValueError(f"layer {layer} does not match its digest")
        return data

    def _encode(self, span: Span, model: str) -> Packed:
        if why := fault(span):
            raise InputError(f"{span} cannot be stored: {why}")
        if span.codec is None:
            span = settled(span, self._codec)
        assert span.codec is not None
        layers = span.coded or tuple(encode(slots) for slots in span.layers)
        digests = tuple(map(self._layer_digest, layers))
        address = self._address(model, _meta(span), span.codec, digests)
        return Packed(address, span.codec, layers, digests)

    def _layer_digest(self, data: bytes) -> bytes:
        return digest(self._vault.key, b"still layer", data)

    def _address(self, model: str, meta: _Meta, codec: str, digests: Iterable[bytes]) -> str:
        *known, ids = meta
        told = [] if ids is None else [ids]  # spans of before m002 have none
        return digest(self._vault.key, b"still span", model, *known, *told, codec, *digests).hex()


def _slots(
    data: bytes, address: str, row: _Stored, codec: str, device: torch.device | str
) -> Slots:
    return decode(data, f"layer {row[1]} of span {address[:12]}", device, codec)


def _meta(span: Span) -> _Meta:
    ids = None if span.ids is None else pack_ids(span.ids)
    return span.start, span.end, span.rotated_at, span.rounds, span.compactor, ids


def _span(meta: _Meta, slots: tuple[Slots, ...]) -> Span:
    """The span of these rows. ValueError if they do not make one."""
    start, end, rotated_at, rounds, compactor, packed = meta
    if packed is not None and len(packed) != 4 * (end - start):
        raise ValueError(f"{len(packed)} bytes of ids of {end - start} tokens")
    ids = None if packed is None else tuple(unpack_ids(packed))
    span = Span(start, end, slots, rotated_at, rounds, compactor, ids)
    if why := fault(span):
        raise ValueError(why)
    return span


def fault(span: Span) -> str | None:
    """Why this cannot be a span, or None."""
    if not 0 < len(span.layers) <= MAX_LAYERS:
        return f"it has {len(span.layers)} layers, and 1 to {MAX_LAYERS} are allowed"
    if not 0 <= span.start < span.end or span.rounds < 0:
        return f"it stands for tokens [{span.start}, {span.end}), round {span.rounds}"
    if span.raw and any(len(slots) != span.tokens for slots in span.layers):
        return "a raw span has one slot a token in every layer"
    if span.ids is not None and not (span.raw and len(span.ids) == span.tokens):
        return f"{len(span.ids)} token ids of {span.tokens} tokens"
    return None


def _damaged(address: str, how: str) -> DamageError:
    return DamageError(
        f"span {address[:12]} is damaged: {how}. Restore the store from a copy, or have its "
        "session computed anew, by Agent.rebuild or `still-agent sessions rebuild`"
    )
