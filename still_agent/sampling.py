"""From logits to the next token: greedy, or a seeded draw from the nucleus.

Nucleus sampling: arXiv 1904.09751. The draw is made on the CPU from float32 logits, so that a
seed means the same on every device.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from still_agent.settings import Settings
from still_memory.errors import DamageError

_LARGEST_SEED = 2**63 - 1


Text = Annotated[str, Field(min_length=1)]


def _as_tuple(stop: object) -> object:
    return (stop,) if isinstance(stop, str) else stop


class Sampling(Settings):
    """How a reply is drawn. Raises InputError for values out of range.

    temperature: 0 is greedy.
    top_p: the smallest set of tokens with this probability is drawn from; 1 is all.
    seed: the same seed, state and message give the same reply; None draws anew each time.
    max_tokens: the most tokens of one reply.
    stop: a reply ends before the first of these strings; one string or several.
    """

    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, le=_LARGEST_SEED)
    max_tokens: int = Field(default=256, ge=1)
    stop: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = ()

    def but(self, **changes: Any) -> Sampling:
        """These options with some changed, checked like new ones."""
        return Sampling(**{**self.model_dump(), **changes}) if changes else self


class Sampler:
    """Draws the tokens of one reply."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, given its logits `(vocab,)`. DamageError where they are no numbers."""
        likeliest, token = logits.max(0)  # of which one that is no number counts as the largest
        if not likeliest < torch.inf:  # an answer from nothing
            raise DamageError(
                "the model computes no numbers from this state: rewind the session to an earlier "
                "turn, or begin a new one; if that does not help, load the model in float32"
            )
        if self._sampling.temperature == 0.0:
            return int(token)
        chances = (logits.float().cpu() / self._sampling.temperature).softmax(-1)
        chances, tokens = chances.sort(descending=True, stable=True)
        before = chances.cumsum(-1) - chances  # probability of all likelier tokens
        chances[before >= self._sampling.top_p] = 0.0
        return int(tokens[torch.multinomial(chances, 1, generator=self._random)])
