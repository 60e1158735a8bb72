"""A short text that a pattern matches.

Where a string must match a pattern, nothing in the grammar tells which letters lead to its end:
of `foo`, that may stand anywhere, any letter may come at any time. A text that the pattern matches
does: it, or its end, appended to what has been said, mostly makes that match too.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

# Of the library's own reading of patterns there is no public name.
_parser: Any = importlib.import_module("re._parser")

LONGEST = 1024  # characters; a pattern that takes more is as good as none
_FORMATS = {
    "email": "a@b.co",
    "hostname": "a.b",
    "uri": "a:b",
    "ipv6": "::",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_TRIED = "0aA -_.,:;/@" + "".join(map(chr, range(33, 127))) + "äя中\t\n"


def witnesses(schema: Any) -> Iterator[str]:
    """For each pattern and format of a JSON schema one text, where one is found."""
    if isinstance(schema, dict):
        pattern, form = schema.get("pattern"), schema.get("format")
        found = witness(pattern) if isinstance(pattern, str) else None
        found = found or (_FORMATS.get(form) if isinstance(form, str) else None)
        if found:
            yield found
    if isinstance(schema, dict | list):
        for one in schema.values() if isinstance(schema, dict) else schema:
            yield from witnesses(one)


def witness(pattern: str) -> str | None:
    """A short text that the pattern matches; None if none is found."""
    try:
        text = _of(_parser.parse(pattern))
        text.encode()
    except Exception:  # another dialect than Python's, or something that this does not know
        return None
    return text if len(text) <= LONGEST else None


def _of(parts: Any) -> str:
    """Cut where it is longer than a witness may be, or `(a{999}){999}` would take what it says."""
    return "".join(_part(str(kind), value) for kind, value in parts)[: LONGEST + 1]


def _part(kind: str, value: Any) -> str:
    match kind:
        case "LITERAL":
            return chr(value)
        case "ANY":
            return _TRIED[0]
        case "NOT_LITERAL":
            return next(c for c in _TRIED if ord(c) != value)
        case "IN":
            starts = [chr(v if str(k) == "LITERAL" else v[0]) for k, v in value if _spells(k)]
            return next(c for c in (*_TRIED, *starts) if _holds(value, c))
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            least, _, repeated = value
            return (text := _of(repeated)) * min(least, LONGEST // max(1, len(text)) + 1)
        case "SUBPATTERN":
            return _of(value[-1])
        case "ATOMIC_GROUP":
            return _of(value)
        case "BRANCH":
            return min(map(_of, value[1]), key=len)
        case "AT":
            return ""
    raise ValueError(kind)


def _spells(kind: Any) -> bool:
    return str(kind) in ("LITERAL", "RANGE")


def _holds(kinds: Sequence[tuple[Any, Any]], character: str) -> bool:
    """Whether a character is of a class, such as [^a-z\\d]."""
    held = any(_is(str(kind), value, character) for kind, value in kinds)
    return held != any(str(kind) == "NEGATE" for kind, _ in kinds)


def _is(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return bool(ord(character) == value)
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    if kind != "CATEGORY":
        return False
    name = str(value).removeprefix("CATEGORY_")
    held = {
        "DIGIT": character.isdigit(),
        "SPACE": character.isspace(),
        "WORD": character.isalnum() or character == "_",
    }[name.removeprefix("NOT_")]
    return held != name.startswith("NOT_")
