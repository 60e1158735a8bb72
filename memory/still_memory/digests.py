"""The keyed digest of which all of a store's addresses and seals are made."""

from __future__ import annotations

import hashlib


def digest(key: bytes, purpose: bytes, *parts: bytes | str | int | None) -> bytes:
    """A keyed BLAKE2b of parts: of no use, without the store's key, for confirming a guess."""
    state = hashlib.blake2b(key=key, person=purpose, digest_size=32)
    for part in parts:
        if isinstance(part, str):
            part = str.__str__(part)  # what is read back is no subclass of it, such as an enum
        data = part if isinstance(part, bytes) else f"{type(part).__name__} {part}".encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()
