"""What trained compactors share: who they are, and how they are kept.

One is saved as a folder, `config.json` and `model.safetensors`, never a pickle. `config.json` holds
two objects: the settings, under the method's name, and the identity of the model that the compactor
was trained against, under "model".
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from still_memory.errors import CompactorError
from still_memory.identity import CompactorIdentity, ModelIdentity, weights_digest
from still_memory.shares import Counts
from still_memory.span import Span

Settings = TypeVar("Settings", bound=BaseModel)


class TrainedCompactor(nn.Module, ABC):
    """`config`: its settings; `model`: the identity of the base model it was trained against."""

    method: ClassVar[str]

    def __init__(self, config: BaseModel, model: ModelIdentity) -> None:
        super().__init__()
        self.config, self.model = config, model
        self._identity: CompactorIdentity | None = None

    @property
    def identity(self) -> CompactorIdentity:
        """Of the weights as they are when it is first asked for, or after `save`."""
        if self._identity is None:
            self._identity = CompactorIdentity(
                method=self.method,
                config=self.config.model_dump_json(),
                weights=weights_digest(self.state_dict()),
            )
        return self._identity

    @abstractmethod
    def compact(
        self, spans: Sequence[Span], slots: int | Counts, longest: int | None = None
    ) -> Span:
        """See `Compactor.compact`."""

    def save(self, folder: str | Path) -> None:
        """Write the folder."""
        self._identity = None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {self.method: self.config.model_dump(), "model": self.model.model_dump()}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        weights = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    def fill(self, folder: str | Path) -> None:
        """Load the folder's weights, frozen. Raises CompactorError for those that do not fit."""
        path = Path(folder) / "model.safetensors"
        try:
            self.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as e:
            raise CompactorError(
                f"{path} does not fit its config ({e}): copy the folder anew, or train again"
            ) from e
        self.eval().requires_grad_(False)


def method_of(folder: str | Path) -> str:
    """The method whose compactor `folder` holds. Raises CompactorError if it is none."""
    names = [name for name in _about(Path(folder)) if name != "model"]
    if len(names) != 1:
        raise _damaged(Path(folder), f"it names {len(names)} methods")
    return names[0]


def settings_of(
    folder: str | Path, method: str, kind: type[Settings], model: ModelIdentity
) -> tuple[Settings, ModelIdentity]:
    """The settings in `folder`, and the identity of the model that it was trained against.

    Raises CompactorError if it holds no compactor of `method` or is damaged, IdentityError if that
    model is not `model`.
    """
    folder = Path(folder)
    if (found := method_of(folder)) != method:
        raise CompactorError(f"{folder} holds a compactor of {found!r}, not of {method!r}")
    about = _about(folder)
    try:
        settings, trained_for = kind(**about[method]), ModelIdentity(**about["model"])
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(folder, e) from e
    model.require(
        trained_for,
        f"the compactor in {folder}",
        "Train one for this model, or load that model (with dtype=, if only that differs).",
    )
    return settings, trained_for


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as e:
        raise CompactorError(
            f"{folder} holds no compactor (config.json is missing). Give the folder that "
            "training wrote."
        ) from e
    except ValueError as e:
        raise _damaged(folder, e) from e
    if not isinstance(about, dict):
        raise _damaged(folder, "it is no object")
    return about


def _damaged(folder: Path, why: object) -> CompactorError:
    return CompactorError(
        f"{folder / 'config.json'} is damaged ({why}): copy the folder anew, or train again"
    )
