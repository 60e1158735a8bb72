r"""A file under a user's key: pieces that open in their order alone, from the first to the last.

    "still sealed 1\n"   24 random bytes   pieces

Each piece is 2 ** 20 bytes, the last one as many as are left, sealed by AES-256-GCM with a tag of
16 bytes behind it. The key is the user's, derived with the file's random bytes; the nonce is the
piece's number in 11 bytes and a byte that is 1 in the last piece (STREAM, Hoang and others 2015).
So a piece that is altered, moved, left out, or that the file was cut off after, does not open.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from still_memory.errors import EncryptionError
from still_memory.vault import derived

KIND = b"still sealed 1\n"
PIECE = 1 << 20
_SALT, _TAG = 24, 16


class SealedWriter:
    """Writes into an open file; `close` seals the last piece, and leaves the file open."""

    def __init__(self, file: BinaryIO, key: bytes) -> None:
        salt = os.urandom(_SALT)
        file.write(KIND + salt)
        self._file, self._pieces, self._held = file, _Pieces(key, salt), bytearray()

    def write(self, data: bytes) -> None:
        self._held += data
        while len(self._held) > PIECE:  # the last one is known as such when it is closed
            self._file.write(self._pieces.seal(bytes(self._held[:PIECE]), last=False))
            del self._held[:PIECE]

    def close(self) -> None:
        self._file.write(self._pieces.seal(bytes(self._held), last=True))


class SealedReader:
    """Reads what a SealedWriter wrote, one piece in memory at once.

    size: of what was written. Raises EncryptionError for another key, ValueError for what was
    altered; the first piece is opened here.
    """

    def __init__(self, file: BinaryIO, key: bytes, path: str) -> None:
        left = os.fstat(file.fileno()).st_size - len(KIND) - _SALT
        if left < _TAG:
            raise ValueError("it is cut off")
        self._file, self._left = file, left
        self.size = left - _TAG * -(-left // (PIECE + _TAG))
        self._pieces, self._held, self._at = _Pieces(key, file.read(_SALT)), b"", 0
        try:
            self._next()
        except ValueError:
            raise EncryptionError(
                f"{path!r} does not open with this key: give the one that it was exported with, if "
                "it is whole"
            ) from None

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end."""
        if self._at == len(self._held) and self._left:
            self._next()
        data = self._held[self._at : self._at + count]
        self._at += len(data)
        return data

    def _next(self) -> None:
        sealed = self._file.read(min(self._left, PIECE + _TAG))
        self._left -= len(sealed)
        self._held, self._at = self._pieces.open(sealed, last=not self._left), 0


class _Pieces:
    def __init__(self, key: bytes, salt: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher, self._number = AESGCM(derived(key, b"still export", data=salt)), 0

    def seal(self, data: bytes, last: bool) -> bytes:
        return self._cipher.encrypt(self._nonce(last), data, None)

    def open(self, data: bytes, last: bool) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._nonce(last), data, None)
        except InvalidTag:
            raise ValueError("a part of it was altered, or is missing") from None

    def _nonce(self, last: bool) -> bytes:
        number, self._number = self._number, self._number + 1
        return number.to_bytes(11, "big") + bytes([last])
