"""What clients are told of a failure: a status, and OpenAI's error object. Never a stack trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from still_memory.errors import (
    BudgetError,
    ConflictError,
    DamageError,
    EncryptionError,
    IdentityError,
    InputError,
    StillError,
    StoreError,
    TaintedError,
    UnknownSessionError,
)

STAY = {"x-should-retry": "false"}  # OpenAI's clients repeat 408, 409, 429 and 5xx without it


class ApiError(Exception):
    """A failure as a client is told of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


def unknown_session() -> ApiError:
    """Also for another tenant's session, which is told by nothing."""
    return ApiError(
        404, "There is no such session; GET /v1/sessions lists them.", code="session_not_found"
    )


# The first that an error is an instance of counts.
_TOLD: tuple[tuple[type[StillError], int, str | None, Mapping[str, str]], ...] = (
    (InputError, 400, None, {}),
    (BudgetError, 400, "context_length_exceeded", {}),
    (IdentityError, 409, "other_model", STAY),
    (TaintedError, 409, "turns_are_shared", STAY),
    (ConflictError, 409, "conflict", {}),
    (EncryptionError, 500, "store_key", STAY),
    (DamageError, 500, "store_damaged", STAY),
    (StoreError, 500, "store_failed", STAY),
    (StillError, 500, None, STAY),
)


def kind_of(error: Exception) -> str:
    """What a log says of an error: nothing that was said, and no name."""
    return (isinstance(error, ApiError) and error.code) or type(error).__name__


def told(error: Exception, hidden: Sequence[str] = ()) -> ApiError:
    """An error as a client may hear of it. hidden: the store's paths, which it may not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownSessionError):
        return unknown_session()
    for kind, status, code, headers in _TOLD:
        if isinstance(error, kind):
            message = str(error)
            for path in hidden:
                message = message.replace(path, "the store")
            return ApiError(status, message, code=code, headers=headers)
    return ApiError(
        500, "The server failed; its log has the request's id.", code="internal", headers=STAY
    )
