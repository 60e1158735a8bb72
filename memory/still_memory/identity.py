"""Who made a span: the base model and, for a compact one, the compactor.

Checked before a tensor is touched. A mismatch names the fields that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from still_memory.errors import IdentityError

if TYPE_CHECKING:
    from torch import Tensor


class Identity(BaseModel):
    """A frozen set of named digests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def address(self) -> str:
        """One digest for the whole identity."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def differences(self, other: Identity) -> list[str]:
        """Names of the fields that differ."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [k for k in ours if ours[k] != theirs.get(k)]


class ModelIdentity(Identity):
    """The base model, as far as it shapes a KV cache."""

    name: str  # for people; not compared, not even by ==
    weights: str
    config: str
    tokenizer: str
    template: str
    dtype: str

    def differences(self, other: Identity) -> list[str]:
        return [f for f in super().differences(other) if f != "name"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelIdentity) and not self.differences(other)

    def __hash__(self) -> int:
        return hash(self.address)

    @property
    def address(self) -> str:
        nameless = self.model_dump_json(exclude={"name"})
        return hashlib.sha256(nameless.encode()).hexdigest()

    @property
    def unnamed(self) -> ModelIdentity:
        """The same model under no name that a stranger has given it."""
        return self.model_copy(update={"name": f"unverified {self.address[:12]}"})

    def require(self, other: ModelIdentity, what: str, remedy: str) -> None:
        """Raise IdentityError unless `other`, which made `what`, is this model."""
        if fields := self.differences(other):
            raise IdentityError(
                f"{what} was made by the model {other.name!r}, and this is {self.name!r}: "
                f"{', '.join(fields)} differ. {remedy}"
            )


class CompactorIdentity(Identity):
    """A compactor: its method, its settings, its weights if it has any."""

    method: str
    config: str
    weights: str = ""


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """One digest of named tensors: names, dtypes, shapes and bytes."""
    import torch  # late: names and errors do not need it

    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
