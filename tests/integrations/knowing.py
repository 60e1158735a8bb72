"""The reference model as if it knew when to call what: some replies are chosen by the test.

Everything else (grammar, cache, positions, tokenizer, store) is the model's own, and what the test
chooses still has to pass the grammar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from still_agent import Agent
from still_agent.compactor import choose_compactor
from still_agent.ephemeral import EphemeralStore, Store
from still_agent.models import FrozenModel, LiveCache, load_model


class Knowing(FrozenModel):
    """After a message that holds a key of `replies`, it says the value."""

    def __init__(self, model: FrozenModel, replies: Mapping[str, str]) -> None:
        super().__init__(model.model, model.tokenizer, model.name)
        self._replies = replies
        self._next: list[int] = []

    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor:
        logits = super().forward(ids, cache, position)
        opening = self.tokenizer.reply_opening()
        if list(ids[-len(opening) :]) == opening:
            said = self.tokenizer.decode(ids)
            found = [reply for key, reply in self._replies.items() if key in said]
            self._next = self.tokenizer.encode(found[0]) if found else []
            self._next += sorted(self.tokenizer.eos_ids)[:1] if found else []
        elif len(ids) > 1:  # a message, or the end of a reply
            self._next = []
        if self._next:
            token = torch.tensor(self._next.pop(0))
            logits = torch.nn.functional.one_hot(token, self.vocab_size).float()
        return logits


def agent(replies: Mapping[str, str], store: Store | None = None, **options: object) -> Agent:
    """An agent of it, without a file unless one is given."""
    model = load_model("reference")
    compactor = choose_compactor(None, "reference", model)
    return Agent(Knowing(model, replies), compactor, store or EphemeralStore(), **options)  # type: ignore[arg-type]
