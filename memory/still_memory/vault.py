"""What stands between a store's rows and their bytes: nothing, or a cipher.

A store has a random key of its own, from which everything is derived: digests and addresses, of
each tenant apart, and in an encrypted store the keys that seal. There that key is in the file only
under the user's key, which can so be changed without a row being written again.

Fields are sealed by AES-256-GCM with what they are as associated data: the purpose, and the place
that no other row has. The tenant is in the key. Each message has a key of its own, derived from the
tenant's and 96 random bits, beside a nonce of 96 random bits (XAES-256-GCM's idea): at 2**80
messages under one store key, copies of the file that were written apart counted together, the odds
that two share both are still below 2**-32. Names are looked up, so equal ones must be sealed
equally: they are by AES-SIV, which tells of two names in a namespace only that they differ.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import sqlite3
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from still_memory.digests import digest
from still_memory.errors import DamageError, EncryptionError
from still_memory.tenants import key_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_VARIABLE = "STILL_AGENT_KEY"
Key = bytes | str | Callable[[], bytes | str]

TENANTS = ("tenant",)  # the namespace of their names

_SALT = _NONCE = 12  # bytes
_WRAPPED = b"\x01"  # version of the store key's seal
_PLACE = b"still store key"
_MAKE = "make one with `openssl rand -hex 32`"


class Secret(bytes):
    """A user's key, which no log or traceback shows."""

    def __repr__(self) -> str:
        return "<a key>"


class Vault:
    """Of a tenant, in a store that is not encrypted: every field is as it is.

    key: of the tenant's digests and addresses.
    """

    encrypted = False

    def __init__(self, store_key: bytes, tenant: str = "") -> None:
        self._store_key = store_key
        self.key = key_of(store_key, tenant)

    def of(self, tenant: str) -> Vault:
        """The vault of a tenant of the same store."""
        return type(self)(self._store_key, tenant)

    def seal(self, data: bytes, *about: str | int | bytes) -> bytes:
        """Data as it is stored in the place that `about` tells."""
        return data

    def open(self, data: bytes, *about: str | int | bytes) -> bytes:
        """What was sealed. ValueError if it was not, or not for this place."""
        return data

    def seal_text(self, text: str, *about: str | int | bytes) -> str:
        return text

    def open_text(self, text: str, *about: str | int | bytes) -> str:
        return text

    def name(self, name: str, *namespace: str) -> str:
        """A name as it is stored, the same each time. The empty one, of nobody, stays."""
        return name

    def open_name(self, name: str, *namespace: str) -> str:
        return name

    def names(self, tenant: str, session: str) -> tuple[str, str]:
        """A tenant's name and that of a session of its, as people know them, from their rows.

        Where one of them is damaged, as they are stored: whoever lists many goes on.
        """
        try:
            return self.open_names(tenant, session)
        except DamageError:
            return tenant, session

    def open_names(self, tenant: str, session: str) -> tuple[str, str]:
        """As `names`, and DamageError where one is damaged."""
        try:
            return self.open_name(tenant, *TENANTS), self.open_name(session, *sessions_of(tenant))
        except ValueError as error:
            raise DamageError(
                f"a session's name is damaged ({error}): `still-agent store check` tells which"
            ) from None


class SealedVault(Vault):
    """Of a tenant, in a store that is encrypted."""

    encrypted = True

    def __init__(self, store_key: bytes, tenant: str = "") -> None:
        super().__init__(store_key, tenant)
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        self._key = derived(self.key, b"still seal")
        self._names = AESSIV(derived(store_key, b"still names", 64))

    def seal(self, data: bytes, *about: str | int | bytes) -> bytes:
        salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
        return salt + nonce + self._cipher(salt).encrypt(nonce, data, self._place(about))

    def open(self, data: bytes, *about: str | int | bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        if type(data) is not bytes or len(data) < _SALT + _NONCE:
            raise ValueError("it is not encrypted, in a store that is")
        salt, nonce = data[:_SALT], data[_SALT : _SALT + _NONCE]
        try:
            sealed = memoryview(data)[_SALT + _NONCE :]
            return self._cipher(salt).decrypt(nonce, sealed, self._place(about))
        except InvalidTag:
            raise ValueError("it was altered, or sealed for another place") from None

    def seal_text(self, text: str, *about: str | int | bytes) -> str:
        return base64.b64encode(self.seal(text.encode(), *about)).decode()

    def open_text(self, text: str, *about: str | int | bytes) -> str:
        return self.open(_from_base64(text), *about).decode()

    def name(self, name: str, *namespace: str) -> str:
        if not name:
            return name
        parts = [part.encode() for part in namespace]
        return base64.urlsafe_b64encode(self._names.encrypt(name.encode(), parts)).decode()

    def open_name(self, name: str, *namespace: str) -> str:
        from cryptography.exceptions import InvalidTag

        if name == "":
            return name
        try:
            parts = [f"{part}".encode() for part in namespace]  # of damaged rows, of any type
            return self._names.decrypt(_from_base64(name, b"-_"), parts).decode()
        except InvalidTag:
            raise ValueError("its name was altered, or is of another tenant") from None

    def _cipher(self, salt: bytes) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(derived(self._key, b"still message", data=salt))

    def _place(self, about: tuple[str | int | bytes, ...]) -> bytes:
        return digest(self._key, b"still place", *about)


def sessions_of(tenant: str) -> tuple[str, str]:
    """The namespace of the names of a tenant's sessions; the tenant's own name as it is stored."""
    return "session", tenant


def found(conn: sqlite3.Connection, key: bytes) -> None:
    """Make a store that was just founded, and holds nothing yet, an encrypted one."""
    conn.execute("delete from meta where name = 'key'")
    wrapped = _wrapped(secrets.token_bytes(32), key)
    conn.execute("insert into meta values ('sealed key', ?)", [wrapped])


def unlocked(conn: sqlite3.Connection, key: bytes | None, path: Path) -> Vault:
    """The vault of the store's default tenant.

    EncryptionError if the store is encrypted and the key is missing or another one, or if a key is
    given and the store is not encrypted; DamageError if it has lost its own key.
    """
    kept = dict(conn.execute("select name, value from meta where name in ('key', 'sealed key')"))
    if (sealed := kept.pop("sealed key", None)) is not None:
        if kept:
            raise DamageError(
                f"the store {path} is encrypted, and somebody has put a plain key into it; restore "
                "it from a copy"
            )
        if key is None:
            raise EncryptionError(
                f"the store {path} is encrypted: put its key into {KEY_VARIABLE}, or give it as "
                "key="
            )
        return SealedVault(_unwrapped(sealed, key, path))
    plain = kept.get("key")
    if type(plain) is not bytes or len(plain) != 32:
        raise _keyless(path)
    if key is not None:
        raise EncryptionError(
            f"the store {path} is not encrypted, and a key was given: take the key away (unset "
            f"{KEY_VARIABLE}), or export its sessions and import them into a new store"
        )
    return Vault(plain)


def rewrap(conn: sqlite3.Connection, old: bytes, new: bytes, path: Path) -> None:
    """Put the store's own key under another user's key. Raises what `unlocked` raises."""
    unlocked(conn, old, path)
    (sealed,) = conn.execute("select value from meta where name = 'sealed key'").fetchone()
    told = [_wrapped(_unwrapped(sealed, old, path), new)]
    conn.execute("update meta set value = ? where name = 'sealed key'", told)


def user_key(given: Key | None) -> Secret | None:
    """The 32 bytes of a user's key: those given, as hex or base64 too, or the environment's.

    None if there is none. EncryptionError for what is no key, and without the cipher's library.
    """
    if callable(given):
        given = given()
    if given is None and not (given := os.environ.get(KEY_VARIABLE)):
        return None
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise EncryptionError(
            "encryption needs a library that is not installed: pip install "
            "'still-agent[encryption]'"
        ) from None
    if isinstance(given, str):
        given = _read_key(given.strip())
    if not isinstance(given, bytes) or len(given) != 32:
        raise EncryptionError(f"a key is 32 bytes, or these as hex or base64: {_MAKE}")
    return Secret(given)


def _read_key(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _wrapped(store_key: bytes, key: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE)
    sealed = AESGCM(derived(key, b"still wrap")).encrypt(nonce, store_key, _WRAPPED + _PLACE)
    return _WRAPPED + nonce + sealed


def _unwrapped(sealed: bytes, key: bytes, path: Path) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if type(sealed) is not bytes or sealed[:1] != _WRAPPED or len(sealed) != 1 + _NONCE + 32 + 16:
        raise _keyless(path)
    version, nonce, rest = sealed[:1], sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :]
    try:
        return AESGCM(derived(key, b"still wrap")).decrypt(nonce, rest, version + _PLACE)
    except InvalidTag:
        raise EncryptionError(
            f"the store {path} does not open with this key: give the one that it was made with. "
            "Nothing was read"
        ) from None


def _keyless(path: Path) -> DamageError:
    return DamageError(f"the store {path} has lost its key; restore it from a copy")


def derived(key: bytes, purpose: bytes, size: int = 32, data: bytes = b"") -> bytes:
    """A key of its own for a purpose."""
    return blake2b(data, key=key, person=purpose, digest_size=size).digest()


def _from_base64(text: str, altchars: bytes | None = None) -> bytes:
    try:
        return base64.b64decode(text, altchars, validate=True)
    except (TypeError, binascii.Error):
        raise ValueError("it is not encrypted, in a store that is") from None
