"""Which compactor serves a model."""

from __future__ import annotations

import re
from pathlib import Path

from still_agent.models.frozen import FrozenModel
from still_memory.compactors import TRAINING_FREE
from still_memory.compactors.base import Compactor
from still_memory.compactors.quantised import QuantisedCompactor
from still_memory.compactors.still import StillCompactor
from still_memory.errors import CompactorError

PACKAGED = Path(__file__).parent / "reference" / "still"
OWN = "still"  # the name of a model's own compactor
_METHODS = "compactor= one of " + ", ".join(map(repr, TRAINING_FREE))


def choose_compactor(
    choice: str | Path | Compactor | None, name: str | Path, model: FrozenModel
) -> Compactor:
    """A training-free method by name, a Still from a folder, or the model's own ("still").

    "+int8" or "+int4" after any of them rounds what it writes (`QuantisedCompactor`). Raises
    CompactorError if there is none, IdentityError if it is for another model.
    """
    if isinstance(choice, str) and (parts := re.fullmatch(r"(.+)\+int([48])", choice)):
        return QuantisedCompactor(choose_compactor(parts[1], name, model), int(parts[2]))
    if choice is None or choice == OWN:
        if name != "reference":
            raise CompactorError(
                f"there is no compactor for {model.name!r}. Train one with "
                "examples/reference_model/train_still.py and give its folder as compactor=, or "
                f"use one that needs no training: {_METHODS}"
            )
        choice = PACKAGED
    if isinstance(choice, StillCompactor):
        what = "the compactor given"
        model.identity.require(choice.model, what, "Give one for this model, or load that model.")
        return choice.to(model.device)
    if not isinstance(choice, str | Path):
        return choice
    if isinstance(choice, str) and choice in TRAINING_FREE:
        return TRAINING_FREE[choice](model)
    if not Path(choice).is_dir():
        raise CompactorError(
            f"there is no compactor {str(choice)!r}: give a folder that training wrote, "
            f"or {_METHODS}"
        )
    still = StillCompactor.load(choice, model.identity).to(model.device)
    still.identity.address  # noqa: B018  (of the weights as stored; kept)
    still.perceivers.to(model.dtype)  # not the scorer: its logits must stay apart
    return still
