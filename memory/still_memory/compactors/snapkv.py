"""SnapKV: what the newest tokens look at is what will be looked at (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from still_memory.compactors.looks import Looks, Reader, told
from still_memory.compactors.selection import Selection
from still_memory.identity import CompactorIdentity
from still_memory.span import Slots, Span


@dataclass(frozen=True)
class SnapKVCompactor(Selection):
    """Slots rank by the attention of the last `window` tokens, smoothed over `kernel` neighbours.

    The window itself stays, as far as half of the slots. Sizes as in the paper's code; a KV head's
    votes are the mean over its group of query heads.
    """

    reader: Reader = field(repr=False)
    window: int = 64
    kernel: int = 5

    @property
    def identity(self) -> CompactorIdentity:
        config = f"window={self.window} kernel={self.kernel}"
        return CompactorIdentity(method="snapkv", config=config)

    def scores(self, spans: Sequence[Span], layers: Sequence[Slots]) -> list[Tensor]:
        compact, _, ids = told(spans)
        if not ids:  # nothing new: who was voted for stays, newest first
            return [slots.positions for slots in layers]
        return [self._votes(look) for look in self.reader.look(compact, ids)]

    def newest(self, count: int) -> int:
        return min(self.window, count // 2)

    def _votes(self, look: Looks) -> Tensor:
        n = look.queries.shape[1]
        window = min(self.window, max(n // 2, 1))  # a short chunk has voters and candidates, too
        parts = list(replace(look, queries=look.queries[:, -window:]).weights())
        votes = torch.cat(parts, dim=2).mean(2)[..., :-window]  # (H_kv, G, S - w)
        if not votes.shape[-1]:
            return torch.zeros(len(votes), window, device=votes.device)
        pooled = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(pooled.mean(1), (0, window))
