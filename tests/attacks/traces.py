"""What a store's files still hold of something: their raw bytes, searched."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from still_memory.records import pack_ids

WINDOW = 64  # bytes of a tensor


def of_text(word: str) -> bytes:
    """A word as UTF-8, without its first letters: the index leaves out what neighbours share."""
    return word.encode()[4:]


def of_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as the ledger and raw spans hold them: uint32, little-endian."""
    return pack_ids(tokens)


def of_layers(path: Path) -> dict[str, set[bytes]]:
    """By each span's address, the first bytes of each slot's keys and values in every layer."""
    found: dict[str, set[bytes]] = {}
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("select address, data from spans s join span_layers l on l.span = s.id")
        for address, data in rows:
            told = found.setdefault(address, set())
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            for name in ("keys", "values"):
                low, high = (8 + size + offset for offset in header[name]["data_offsets"])
                slot = (high - low) // math.prod(header[name]["shape"][:2])
                slots = (data[at : at + min(slot, WINDOW)] for at in range(low, high, slot))
                told.update(w for w in slots if len(set(w)) > 8)  # not an empty slot's zeros
    return found


def files(path: Path) -> dict[str, bytes]:
    """The store's file and whatever SQLite has put beside it, by name."""
    return {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}


def hits(path: Path, patterns: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Which of the patterns, of 8 bytes at least, stand in which of the files."""
    wanted: dict[int, list[bytes]] = {}
    for pattern in set(patterns):
        wanted.setdefault(int.from_bytes(pattern[:8], "little"), []).append(pattern)
    first = np.array(sorted(wanted), np.uint64)
    found = set()
    for name, data in files(path).items():
        for shift in range(8):  # every place is a multiple of eight from one of these
            words = np.frombuffer(data[shift : len(data) - (len(data) - shift) % 8], np.uint64)
            for at in np.flatnonzero(np.isin(words, first)):
                place = shift + 8 * int(at)
                for pattern in wanted[int(words[at])]:
                    if data.startswith(pattern, place):
                        found.add((name, pattern))
    return sorted(found)
