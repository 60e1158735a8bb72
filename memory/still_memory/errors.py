"""Every typed error. Each message says what is wrong and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from still_memory.taint import Taint


class StillError(Exception):
    """Base of every error that Still Agent raises on purpose."""


class InputError(StillError, ValueError):
    """An argument or a message cannot be used as it is."""


class BudgetError(StillError, ValueError):
    """The budget cannot hold what it must, or a schedule has outrun its declared horizon."""


class CompactorError(StillError):
    """No compactor, a damaged one, or one that cannot do what was asked."""


class IdentityError(StillError):
    """Something was made by another model, tokenizer, template or compactor."""


class StoreError(StillError):
    """The store cannot be opened, read or written (not SQLite, newer schema, read-only, full)."""


class EncryptionError(StoreError):
    """A key is missing, wrong or no key, or a store is not encrypted where one was given."""


class DamageError(StoreError):
    """Stored bytes do not match their digest, or lack something that they refer to."""


class ConflictError(StoreError):
    """Another writer moved the session's head first."""


class ErasureError(StoreError):
    """No row holds what was erased, and the file or its log still does."""


class TaintedError(StillError):
    """More than what was named has to do with what is to go: `tainted` says what, by session.

    Nothing was changed.
    """

    def __init__(self, message: str, tainted: Sequence[Taint]) -> None:
        super().__init__(message)
        self.tainted = tuple(tainted)


class UnknownSessionError(StillError, KeyError):
    """The store holds no session of that name."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


def deleted(session: str) -> UnknownSessionError:
    """What whoever holds on to a deleted session is told; its name may be in use again."""
    return UnknownSessionError(
        f"session {session!r} was deleted, and this object will not bring it back: begin one "
        "anew with agent.session"
    )
