"""API keys, each bound to a tenant.

The file is TOML, a tenant's name with the SHA-256 of each of its keys in hex, so that the file
opens nothing for whoever reads it:

    "alice" = ["9f86d081884c7d65...", "..."]

A key has 256 random bits, so that a plain digest of it is as good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path

from still_memory.errors import InputError
from still_memory.tenants import check_tenant

_DIGEST = re.compile(r"[0-9a-f]{64}")


def new_key(tenant: str) -> tuple[str, str]:
    """A fresh key, and the line of the file that lets it in."""
    key = f"still-{secrets.token_urlsafe(32)}"
    return (
        key,
        f"{json.dumps(check_tenant(tenant), ensure_ascii=False)} = {[_digest(key)]}".replace(
            "'", '"'
        ),
    )


class Keys:
    """Whose key it is. Raises InputError for a digest that is none, or that two tenants have."""

    def __init__(self, tenants: Mapping[str, object]) -> None:
        self._tenants: dict[str, str] = {}  # by digest
        for tenant, digests in tenants.items():
            check_tenant(tenant)
            for digest in digests if isinstance(digests, list) else [digests]:
                if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
                    raise InputError(
                        f"tenant {tenant!r} has a key that is no SHA-256 in small hex; "
                        "`still-agent serve --new-key TENANT` prints a key and its line"
                    )
                if self._tenants.setdefault(digest, tenant) != tenant:
                    raise InputError(f"tenant {tenant!r} has a key of another tenant")
        if not self._tenants:
            raise InputError("there is no key: `still-agent serve --new-key TENANT` prints one")

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file. InputError if it cannot be read."""
        try:
            return cls(tomllib.loads(path.read_text("utf-8")))
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{str(path)!r} is no TOML: {error}") from None

    def tenant(self, key: str) -> str | None:
        """The key's tenant. Takes the same time for every key of a length, known or not."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
