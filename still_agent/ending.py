"""The way to the end: few tokens after which what has been said is whole.

A walk through the grammar, byte by byte: what is forced is taken; of a choice, what closes comes
first (a bracket, then a quote), then what goes on or is short (a comma, 0, null), and last what
opens. In a pattern, which knows no brackets, bytes that were not taken yet come first, and of these
the smallest kind, for `@` leads on where any letter is as good as another. The bytes are then cut
into the fewest tokens.

The way is short, and need not be the shortest: nothing here searches. It was walked, not guessed,
so whoever has it can take it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from still_agent.models.tokenizers import Tokenizer

FARTHEST = 4096  # bytes of a way; what takes more has none
_FIRST = b",0ntf"  # of what follows a value, or begins one: what ends soonest
_LAST = b"{[-"


class Endings:
    """Ways to the end, in one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens: dict[bytes, int] = {}
        for token in range(tokenizer.size):
            if token not in tokenizer.control and (spelled := tokenizer.token_bytes(token)):
                tokens.setdefault(spelled, token)
        self._tokens = tokens
        self._longest = max(map(len, tokens))
        # A byte that is no token is none of a byte-level tokenizer's.
        self._bytes = [tokens[bytes([byte])] for byte in range(256)]

    def way(self, matcher: Any, most: int | None = None) -> tuple[int, ...] | None:
        """At most `most` tokens to the end, the one that ends a reply left out.

        None if no way is found. The matcher is left as it was.
        """
        farthest = FARTHEST if most is None else min(FARTHEST, most * self._longest)
        way = bytearray()
        used: Counter[int] = Counter()  # since something was closed
        steps = 0
        while not (found := matcher.is_accepting()) and steps == len(way) < farthest:
            taken = matcher.compute_ff_bytes() or self._choice(matcher, used)
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

    def _spelled(self, text: bytes | bytearray) -> tuple[int, ...]:
        return tuple(self._bytes[byte] for byte in text)

    def _choice(self, matcher: Any, used: Counter[int]) -> bytes:
        """One byte of those that may come next; none if none may."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bytes(np.flatnonzero(bits[self._bytes]).astype(np.uint8))
        brackets = [byte for byte in allowed if byte in b"}]"]
        closing = bytes(brackets) if len(brackets) == 1 else b""  # a string may hold both
        closing = closing or (b'"' if 0x22 in allowed else b"")
        if closing:
            used.clear()
            return closing
        kinds = Counter(map(_kind, allowed))

        def order(byte: int) -> tuple[int, bool, int, int, int]:
            rank = _FIRST.find(byte) % (len(_FIRST) + 1)  # last, if it is none of them
            return used[byte], byte in _LAST, rank, kinds[_kind(byte)], byte

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
