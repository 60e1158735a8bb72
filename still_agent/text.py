"""Text on its way in: checked, and cut into parts where it is long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from still_memory.errors import InputError
from still_memory.records import check_text

LONGEST = 1_000_000  # characters of one message, unless an agent says otherwise
PART = 4096  # tokens of one part of a long text

# Where a text may be cut, best first: paragraphs, lines, sentences, words. Each piece keeps
# what follows it, so that the pieces joined are the text.
_CUTS = (r"(?<=\n\n)(?!\n)", r"(?<=\n)", r"(?<=[.!?…。！？])(?=\s)", r"(?<=\s)(?=\S)")


def check_message(text: str, longest: int | None = None) -> str:
    """The text, if it can be a message. InputError for an empty, broken or oversized one."""
    check_text(text, "a message")
    if not text.strip():
        raise InputError("the message is empty; say something, or do not send it")
    if longest is not None and len(text) > longest:
        raise InputError(
            f"the message has {len(text):,} characters and {longest:,} are allowed: give it to "
            "read(), which takes it in by parts, or load the agent with a larger longest_message"
        )
    return text


def file_text(path: str | Path) -> str:
    """A file's text. InputError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}): convert it first, for instance "
            "with iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from None
    except ValueError as error:  # a null byte, or what no file name can hold
        raise InputError(f"cannot read {str(path)!r}: {error}; check the path") from None


def parts(text: str, encode: Callable[[str], Sequence[int]], limit: int = PART) -> Iterator[str]:
    """The text in parts of at most `limit` tokens, cut at the ends of paragraphs or sentences.

    A part may pass `limit` by the few tokens that joining pieces can add. Joined, the parts
    are the text, without the blanks around each.
    """
    part, size = "", 0
    for piece, tokens in _pieces(text, encode, limit):
        if size + tokens > limit and part.strip():
            yield part.strip()
            part, size = "", 0
        part, size = part + piece, size + tokens
    if part.strip():
        yield part.strip()


def _pieces(
    text: str, encode: Callable[[str], Sequence[int]], limit: int, cut: int = 0
) -> Iterator[tuple[str, int]]:
    """Pieces of at most `limit` tokens with their sizes, as large as the cuts allow."""
    for piece in re.split(_CUTS[cut], text):
        if not piece:
            continue
        if (tokens := len(encode(piece))) <= limit:
            yield piece, tokens
        elif cut + 1 < len(_CUTS):
            yield from _pieces(piece, encode, limit, cut + 1)
        else:  # one endless word: a character is at most four tokens
            width = max(1, limit // 4)
            for at in range(0, len(piece), width):
                yield piece[at : at + width], len(encode(piece[at : at + width]))
