"""Many live caches as the rows of one forward pass, each with slots of its own.

The linear layers compute on the batch; attention goes row by row, over the views of each
session's own cache. So no slot is copied, none is padded, and rows may differ in everything: how
many slots they hold, layer by layer, and whether these carry a bias. A row's attention is the
very call that it makes when it is alone (see `attention`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from still_agent.models.cache import LiveCache, LiveLayer


class RowsLayer(CacheLayerMixin):
    """One layer of B live caches, each of one row."""

    is_sliding = False

    def __init__(self, rows: Sequence[LiveLayer]) -> None:
        super().__init__()
        self.is_initialized = True
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: each row is allocated."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a new slot to each row, from keys and values `(B, H_kv, 1, d)`.

        The keys come back with the attribute `rows`: for each row, views of all its slots.
        """
        new = zip(self._rows, key_states.split(1), value_states.split(1), strict=True)
        key_states.rows = [row.update(k, v) for row, k, v in new]  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(row.length for row in self._rows) + query_length, 0

    def get_seq_length(self) -> int:
        return max(row.length for row in self._rows)

    def get_max_length(self) -> int:
        return max(row.capacity for row in self._rows)

    get_max_cache_shape = get_max_length  # its name in earlier transformers 5


class Rows(Cache):
    """B live caches as `past_key_values` of a transformers model that is fed one token a row."""

    def __init__(self, caches: Sequence[LiveCache]) -> None:
        layers = zip(*(cache.live for cache in caches), strict=True)
        super().__init__(layers=[RowsLayer(rows) for rows in layers])


@contextmanager
def unchanged(caches: Sequence[LiveCache]) -> Iterator[None]:
    """Whatever is raised in here, the caches hold afterwards what they held before."""
    before = [cache.lengths for cache in caches]
    try:
        yield
    except BaseException:
        for cache, lengths in zip(caches, before, strict=True):
            cache.cut(lengths)
        raise
