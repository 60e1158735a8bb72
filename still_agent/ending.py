"""The way to the end: few tokens after which what has been said is whole.

A walk through the grammar, byte by byte: what is forced is taken; of a choice, what closes comes
first (a bracket, then a quote), then what goes on or is short (a comma, 0, null), and last what
opens. In a pattern, which knows no brackets, the end of a text that matches it comes first, if it
may follow; else bytes that were not taken yet, and of these the smallest kind, for `@` leads on
where any letter is as good as another. The bytes are then cut into the fewest tokens.

The way is short, and need not be the shortest: nothing here searches. It was walked, not guessed,
so whoever has it can take it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from still_agent.models.tokenizers import Tokenizer
from still_memory.errors import InputError

Bits = npt.NDArray[np.bool_]  # (vocab,)

Hints = tuple[tuple[bytes, tuple[int, ...]], ...]  # what may end a string, and its tokens

FARTHEST = 4096  # bytes of a way; what takes more has none
HINTS = 1000  # ends of strings that are known,
TRIED = 10_000  # and tried along one way
_FIRST = b",0ntf"  # of what follows a value, or begins one: what ends soonest
_LAST = b"{[-"
_ESCAPE = ord("\\")


class Endings:
    """Ways to the end, in one tokenizer's tokens. InputError if it cannot spell every byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.size)]
        tokens = {text: token for token, text in enumerate(spelled) if text}
        if missing := [byte for byte in range(256) if bytes([byte]) not in tokens]:
            raise InputError(
                f"the tokenizer has no token for the byte {missing[0]:#04x}, so not every text can "
                "be said: tools and structured replies take one with all 256, as Qwen3's"
            )
        self._tokens = tokens
        self._longest = max(map(len, tokens))
        self._bytes = [tokens[bytes([byte])] for byte in range(256)]
        self._numeral = np.array([text[:1].isdigit() for text in spelled])

    def hints(self, texts: Iterable[str]) -> Hints:
        """What may end a string: the shortest ends of these texts (see `witness.py`)."""
        tails: set[str] = set()
        for text in sorted(texts, key=lambda t: (len(t), t)):
            tails.update(text[at:] for at in range(len(text)))
            if len(tails) > HINTS:
                break
        ends = (json.dumps(tail, ensure_ascii=False)[1:].encode() for tail in tails)
        shortest = sorted(ends, key=lambda end: (len(end), end))[:HINTS]
        return tuple((end, self._spelled(end)) for end in shortest)

    def way(
        self, matcher: Any, hints: Hints = (), most: int | None = None
    ) -> tuple[int, ...] | None:
        """At most `most` tokens to the end, the one that ends a reply left out.

        None if no way is found. The matcher is left as it was.
        """
        farthest = FARTHEST if most is None else min(FARTHEST, most * self._longest)
        way = bytearray()
        used: Counter[int] = Counter()  # since something was closed
        steps = 0
        # However many there are, a way takes no longer than the tries that it has.
        left = iter(range(TRIED))
        while not (found := matcher.is_accepting()) and steps == len(way) < farthest:
            taken = matcher.compute_ff_bytes() or self._choice(matcher, hints, used, left)
            way += taken
            steps += matcher.try_consume_tokens(self._spelled(taken)) if taken else 1
        if steps := min(steps, len(way)):
            matcher.rollback(steps)
        if not found:
            return None
        tokens = self._fewest(bytes(way))
        # Bytes, where a token would reach over what must be apart.
        whole = matcher.validate_tokens(tokens) == len(tokens)
        tokens = tokens if whole else self._spelled(way)
        return tokens if most is None or len(tokens) <= most else None

    def past_number(self, allowed: Bits) -> Bits:
        """Of the tokens allowed, those that end a number; all, if this is none or may not end."""
        if allowed[self._bytes[ord("x")]]:  # in a string, digits are as good as letters
            return allowed
        ends = allowed.copy()
        ends[: len(self._numeral)] &= ~self._numeral[: len(allowed)]
        return ends if ends.any() else allowed

    def _spelled(self, text: bytes | bytearray) -> tuple[int, ...]:
        return tuple(self._bytes[byte] for byte in text)

    def _choice(self, matcher: Any, hints: Hints, used: Counter[int], left: Iterator[int]) -> bytes:
        """What to take of all that may come next; nothing if nothing may."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bytes(np.flatnonzero(bits[self._bytes]).astype(np.uint8))
        quote = b'"' if 0x22 in allowed else b""
        # Where a string must go on, a bracket is no more than another letter of it.
        if not quote and (hinted := _hinted(matcher, hints, left)):
            return hinted
        brackets = bytes(byte for byte in allowed if byte in b"}]")
        closing = brackets if len(brackets) == 1 else quote  # a string may hold both
        if closing:
            used.clear()
            return closing
        kinds = Counter(map(_kind, allowed))

        def order(byte: int) -> tuple[bool, int, bool, int, int, int]:
            rank = _FIRST.find(byte) % (len(_FIRST) + 1)  # last, if it is none of them
            escapes = byte == _ESCAPE  # and what comes after it, closes nothing
            return escapes, used[byte], byte in _LAST, rank, kinds[_kind(byte)], byte

        if not allowed:
            return b""
        best = min(allowed, key=order)
        used[best] += 1
        return bytes([best])

    def _fewest(self, way: bytes) -> tuple[int, ...]:
        """The bytes as the fewest tokens."""
        # best[i]: tokens of way[i:], and how many bytes the first of them takes
        best: list[tuple[int, int]] = [(0, 0)] * (len(way) + 1)
        for at in range(len(way) - 1, -1, -1):
            best[at] = min(
                (best[at + n][0] + 1, -n)
                for n in range(1, min(self._longest, len(way) - at) + 1)
                if way[at : at + n] in self._tokens
            )
        tokens: list[int] = []
        at = 0
        while at < len(way):
            n = -best[at][1]
            tokens.append(self._tokens[way[at : at + n]])
            at += n
        return tuple(tokens)


def _hinted(matcher: Any, hints: Hints, left: Iterator[int]) -> bytes:
    """The shortest end of a hint after which a string may be closed; none if there is none."""
    for (end, ids), _ in zip(hints, left, strict=False):
        if matcher.validate_tokens(ids) == len(ids):
            return end
    return b""


def _kind(byte: int) -> str:
    """Letters of a case, digits, bytes past ASCII, and each sign by itself."""
    character = chr(byte)
    if byte >= 128:
        return "high"
    if character.isdigit():
        return "digit"
    if character.isalpha():
        return "upper" if character.isupper() else "lower"
    return character
