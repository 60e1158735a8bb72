"""A model whose replies are chosen by the test, in the ids that a real one would produce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from still_agent.models import FrozenModel, LiveCache


class Scripted(FrozenModel):
    """The tiny model, its next tokens overruled: after each reply opening, `replies` in turn.

    Everything else (cache, positions, tokenizer) is the model's own.
    """

    def __init__(self, model: FrozenModel, replies: Sequence[Sequence[int]]) -> None:
        super().__init__(model.model, model.tokenizer, model.name)
        self.replies = [list(reply) for reply in replies]
        self._next: list[int] = []

    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor:
        logits = super().forward(ids, cache, position)
        opening = self.tokenizer.reply_opening()
        if list(ids[-len(opening) :]) == opening and self.replies:
            self._next = self.replies.pop(0)
        elif len(ids) > 1:  # a message, or the end of a reply
            self._next = []
        if self._next:
            logits = torch.nn.functional.one_hot(
                torch.tensor(self._next.pop(0)), self.vocab_size
            ).float()
        return logits
