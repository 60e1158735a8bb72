"""A frozen group of options whose every mistake is one of our typed errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from still_memory.errors import InputError, StillError


class Settings(BaseModel):
    """pydantic's checks, raised as `error` with a sentence for each field."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    error: ClassVar[type[StillError]] = InputError

    if not TYPE_CHECKING:  # so that type checkers keep the fields as the signature

        def __init__(self, **options: Any) -> None:
            try:
                super().__init__(**options)
            except ValidationError as problem:
                raise self.error(_sentences(type(self), problem)) from None


def _sentences(settings: type[Settings], problem: ValidationError) -> str:
    lines = []
    for error in problem.errors():
        where = ".".join(str(part) for part in error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = f"there is no such option; there are {', '.join(settings.model_fields)}"
        lines.append(f"{where}: {message}" if where else message)
    return f"{settings.__name__}: " + "; ".join(lines)
