"""Draws the tokens of one reply that keeps to a grammar, and that is whole when it ends.

A weak model would never close a string, and a reply that is cut is no JSON. So a way to the end is
always known that fits into what is left of `max_tokens`: a token is taken only if there is such a
way after it, else the first token of the known way is. The way is mostly the old one, which costs
a look; where a token has changed it (a new key, a bracket), it is found anew. So every reply is
whole whose first way fits; one whose does not, goes that way as far as it may.

For the same reason a number ends after sixteen digits, wherever the grammar lets it. With what a
token of several adds, that is what 64 bits hold: a graph's checkpoint could not hold more.

Text in which a call may begin needs no end, so that a reply cut by its limit says so. A call begins
there only where it has room.

Reasoning comes first and is free, where the model opens it or its template has; but not so long
that what must be said has no room.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from still_agent.ending import Endings, Hints
from still_agent.models.tokenizers import Tokenizer
from still_agent.sampling import Sampler, Sampling

END = 1  # the token that ends a reply
DIGITS = 16  # of a number, or of its fraction
Stage = Enum("Stage", "BEFORE REASONING AFTER SAYING")


class Constraint:
    """Takes logits `(vocab,)` to the next token, as `Sampler` does; for one reply.

    way: tokens that end the reply from its beginning. hints: see `Endings.hints`.
    opening: where a call begins in text that may end anywhere; None if this is none.
    reasoning: as `decode.answer` has it.
    """

    def __init__(
        self,
        matcher: Any,
        way: Sequence[int],
        endings: Endings,
        hints: Hints,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        opening: bytes | None,
        reasoning: int | None,
    ) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._endings, self._hints = endings, hints
        self._sampler = Sampler(sampling)
        self._left = sampling.max_tokens
        self._eos = min(tokenizer.eos_ids)
        self._opening, self._said = opening, b""
        self._text = opening is not None
        self._way = None if opening is not None else tuple(way)
        self._digits = 0  # at the end of what was said
        self._lost = False  # the grammar tells no more what may come
        self._reasoning, self._thought = reasoning, 0
        self._stage = Stage.SAYING if tokenizer.think is None else Stage.BEFORE
        for token in tokenizer.reply_opening(thinking=reasoning != 0):
            if tokenizer.think is not None and token in tokenizer.think:
                opens = token == tokenizer.think[0]
                self._stage = Stage.REASONING if opens else Stage.SAYING

    @property
    def least(self) -> int:
        """Tokens that are left to be said at least, the one that ends the reply included."""
        return len(self._way or ()) + END

    def __call__(self, logits: Tensor) -> int:
        """The next token. DamageError where the logits are no numbers."""
        if self._stage is not Stage.SAYING:
            if (token := self._reasons(logits)) is not None:
                return token
            self._stage = Stage.SAYING
        token = self._says(logits)
        self._left -= 1
        said = self._tokenizer.token_bytes(token)
        self._digits = self._digits + len(said) if said.isdigit() else 0
        return token

    # -- what is said -------------------------------------------------------------------------

    def _says(self, logits: Tensor) -> int:
        allowed = self._allowed(logits)
        if self._lost:
            return self._goes()
        logits = logits.masked_fill(~allowed, -torch.inf)
        while (token := self._sampler(logits)) not in self._tokenizer.eos_ids:
            if not self._matcher.consume_token(token):
                self._lost = True
                return self._goes()
            if self._fits(token):
                return token
            self._matcher.rollback(1)
            if self._way is not None:
                return self._goes()
            logits[token] = -torch.inf  # it would begin a call that has no room
        return token

    def _allowed(self, logits: Tensor) -> Tensor:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: len(logits)].astype(bool)
        self._lost = self._lost or self._matcher.is_error() or not bits.any()
        if self._digits >= DIGITS:
            bits = self._endings.past_number(bits)
        return torch.from_numpy(bits).to(logits.device)

    def _goes(self) -> int:
        """A step of the known way."""
        if not self._way:
            return self._eos
        token, *rest = self._way
        self._way = tuple(rest)
        if not self._lost:
            self._matcher.consume_token(token)
        return token

    def _fits(self, token: int) -> bool:
        """Whether the end can be reached after this token, which the grammar has taken."""
        if self._opening is not None:
            within = self._said + self._tokenizer.token_bytes(token)
            if self._opening not in within:
                self._said = within[-len(self._opening) :]
                return True
        room = self._left - 1 - END
        way = self._shortened(token)
        if way is None or len(way) > room:
            way = self._endings.way(self._matcher, self._hints, room)
        if way is not None:
            self._way, self._opening = way, None
        return way is not None

    def _shortened(self, token: int) -> tuple[int, ...] | None:
        """The known way, if it still ends the reply after this token."""
        if self._way is None:
            return None
        way = self._way[1:] if self._way[:1] == (token,) else self._way
        if not way:
            return way if self._matcher.is_accepting() else None
        ends = (*way, self._eos)
        return way if self._matcher.validate_tokens(ends) == len(ends) else None

    # -- reasoning ----------------------------------------------------------------------------

    def _reasons(self, logits: Tensor) -> int | None:
        """A token of reasoning, or of the blank lines after it; None where the reply begins."""
        assert self._tokenizer.think is not None
        opens, closes = self._tokenizer.think
        token = self._sampler(logits)
        if self._stage is Stage.BEFORE:
            if token != opens or self._reasoning == 0 or not self._spare(2):
                return None
            self._stage = Stage.REASONING
        elif self._stage is Stage.REASONING:
            full = self._reasoning is not None and self._thought >= self._reasoning
            ends = token in self._tokenizer.eos_ids and not self._text
            if full or ends or not self._spare(2):
                token = closes
            if token == closes:
                self._stage = Stage.AFTER
            self._thought += 1
        else:
            self._stage = Stage.SAYING
            said = self._tokenizer.token_bytes(token)
            if not said or said.strip(b"\n") or not self._spare(1):
                return None
            self._left -= 1
            return token
        self._left -= self._reasoning is None
        return token

    def _spare(self, tokens: int) -> bool:
        """Whether what must be said has room after so many tokens."""
        if self._text or (self._reasoning is not None and self._stage is not Stage.AFTER):
            return True  # nothing must be said, or reasoning is not of `max_tokens`
        return self._left - tokens >= self.least
