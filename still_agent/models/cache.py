"""The live cache: the slots a model attends to, allocated once at the budget's size.

A decode step writes one slot a layer in place and attends to views; no cache is copied. Each
layer counts its own slots, for a compactor may leave layers of different lengths: they divide
one piece of memory, anew whenever the cache is emptied. Each slot of each head may carry a bias
(see `attention`). Slots of a batch row that holds fewer
than the others are empty on the left, with a bias of minus infinity.

Layers are objects of their own, as in transformers: Gemma 3's local layers, which keep an
exact window, stand beside `LiveLayer`s in one `Cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from still_memory.errors import BudgetError, InputError


class LiveLayer(CacheLayerMixin):
    """One layer's slots: keys and values `(B, H_kv, capacity, d)`, bias `(B, H_kv, capacity)`.

    They are views: the memory is the cache's.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.batch_size = keys.shape[0]
        self.dtype, self.device = keys.dtype, keys.device
        self.observe: Callable[[Tensor], None] | None = None  # see `attention`
        self.is_initialized = True
        self.move(keys, values, bias)

    def move(self, keys: Tensor, values: Tensor, bias: Tensor) -> None:
        """Stand in these views from now on, empty."""
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.bias, self.capacity = bias, keys.shape[2]
        self.length, self.biased = 0, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is allocated when it is made."""

    def write(self, keys: Tensor, values: Tensor, bias: Tensor | None, at: int) -> None:
        """Put slots that need no gradient at `[at, at + S)`, in place; the layer ends with them."""
        n = keys.shape[-2]
        end = at + n
        if end > self.capacity:
            raise BudgetError(
                f"the live cache holds {self.capacity} slots and {end} would be needed; "
                "compact before adding tokens, or raise the budget"
            )
        self.keys.narrow(2, at, n).copy_(keys)  # at one token, narrow costs half of indexing
        self.values.narrow(2, at, n).copy_(values)
        self.biased = self.biased and at > 0
        if bias is not None and not self.biased:
            self.bias[:, :, :at] = 0
            self.biased = True
        if self.biased:
            self.bias[:, :, at:end] = 0 if bias is None else bias
        self.length = end

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens' slots `(B, H_kv, n, d)`; return views of all, the bias on the keys."""
        if key_states.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "a live cache keeps no gradients; run the model under torch.inference_mode()"
            )
        self.write(key_states, value_states, None, self.length)
        keys = self.keys.narrow(2, 0, self.length)
        if self.biased:
            keys.slot_bias = self.bias.narrow(2, 0, self.length)  # type: ignore[attr-defined]
        if self.observe is not None:
            keys.observe = self.observe  # type: ignore[attr-defined]
        return keys, self.values.narrow(2, 0, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in earlier transformers 5

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` slots (transformers' sign)."""
        self.length = max(self.length + tokens_to_remove, 0)

    def reset(self) -> None:
        self.length, self.biased = 0, False

    @torch.no_grad()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = beam_idx.to(self.device)
        for held in (self.keys, self.values, self.bias):
            held.copy_(held.index_select(0, rows))


class LiveCache(Cache):
    """One `LiveLayer` a layer, as `past_key_values` of a transformers model.

    Args: numbers of layers, KV heads, slots that the mean layer can hold, batch rows; size of a
    head.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1 or batch < 1:
            raise BudgetError(
                f"a cache of {capacity} slots and {batch} rows holds nothing; ask for at least one"
            )
        shape = (batch, kv_heads, layers * capacity, head_dim)
        # Zeros: an empty slot weighs nothing, and nothing times NaN would still be NaN.
        # Ordinary tensors, so that they can be written in and out of inference mode.
        with torch.inference_mode(False):
            self._memory = (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape[:3], dtype=torch.float32, device=device),
            )
        parts = self._divided([capacity] * layers)
        super().__init__(layers=[LiveLayer(*part) for part in parts])

    def _divided(self, capacities: Sequence[int]) -> list[list[Tensor]]:
        ends = list(accumulate(capacities, initial=0))
        if ends[-1] > self._memory[0].shape[2]:
            raise BudgetError(
                f"layers of {list(capacities)} slots do not fit the {self._memory[0].shape[2]} "
                "that this cache has in all; compact more, or raise the budget"
            )
        with torch.inference_mode(False):
            return [[t[:, :, a:b] for t in self._memory] for a, b in pairwise(ends)]

    def empty(self, capacities: Sequence[int]) -> None:
        """Forget every slot, and give each layer room for so many from now on.

        Raises BudgetError, before anything is forgotten, for more than there are in all.
        """
        for layer, part in zip(self.live, self._divided(capacities), strict=True):
            layer.move(*part)

    @property
    def room(self) -> int:
        """Tokens that can still be taken in: each takes a slot in every layer."""
        return min(layer.capacity - layer.length for layer in self.live)

    @property
    def live(self) -> list[LiveLayer]:
        """The layers, as what they are."""
        return cast("list[LiveLayer]", self.layers)

    @property
    def lengths(self) -> list[int]:
        """Slots held, layer by layer."""
        return [layer.length for layer in self.live]

    @property
    def length(self) -> int:
        """Slots held, counted at the largest layer."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(t.nbytes for t in self._memory)

    @torch.no_grad()
    def load(
        self, layer: int, keys: Tensor, values: Tensor, bias: Tensor | None = None, *, at: int = 0
    ) -> None:
        """Overwrite a layer from slot `at` on; what stood after is forgotten.

        Keys and values `(H_kv, S, d)`, for every row, or `(B, H_kv, S, d)`; bias without `d`.
        Spans may so be placed one after another. Raises BudgetError past the capacity.
        """
        target = self.live[layer]
        rows, heads, _, d = target.keys.shape
        slots = keys.shape[-2]
        fitting = {(heads, slots, d), (rows, heads, slots, d)}
        if tuple(keys.shape) not in fitting or keys.shape != values.shape:
            raise InputError(
                f"a layer of this cache takes slots ({rows}, {heads}, n, {d}), not keys "
                f"{tuple(keys.shape)} and values {tuple(values.shape)}; were they made by another "
                "model?"
            )
        if bias is not None and tuple(bias.shape) not in {shape[:-1] for shape in fitting}:
            raise InputError(
                f"slots {tuple(keys.shape)} take a bias of {tuple(keys.shape[:-1])}, "
                f"not {tuple(bias.shape)}; give one number a slot and head"
            )
        if not 0 <= at <= target.length:
            raise InputError(
                f"layer {layer} holds {target.length} slots; load at 0 to {target.length}, not {at}"
            )
        target.write(keys, values, bias, at)

    def raw(self, layer: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots `[low, high)` of row 0: views `(H_kv, n, d)`, as rotated."""
        held = self.live[layer]
        if not 0 <= low <= high <= held.length:
            raise InputError(
                f"layer {layer} holds {held.length} slots; [{low}, {high}) is not among them"
            )
        return held.keys[0, :, low:high], held.values[0, :, low:high]

    def observed(self) -> list[Tensor]:
        """A list to which forward passes add queries `(B, H, n, d)`, layer after layer."""
        queries: list[Tensor] = []
        for layer in self.live:
            layer.observe = queries.append
        return queries

    def row(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Row 0 of a layer: keys `(H_kv, S, d)`, as rotated, and the bias `(H_kv, S)` if any."""
        held = self.live[layer]
        bias = held.bias[0, :, : held.length] if held.biased else None
        return held.keys[0, :, : held.length], bias

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the oldest n slots, counted at the largest layer; or drop the newest, given -n.

        Every layer loses the same number, for each token has one slot in every layer. The
        negative form is transformers' own.
        """
        n = tokens_to_remove
        super().crop(min(n - self.length, 0) if n >= 0 else n)

    def cut(self, lengths: Sequence[int]) -> None:
        """Back to what `lengths` was, after tokens were added: their slots are forgotten."""
        for layer, length in zip(self.live, lengths, strict=True):
            layer.length = min(layer.length, length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots at the largest layer: where the next token stands when no position is given."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the one mask: it fits the largest layer, and `attention` fits it to the rest."""
        return self.length + query_length, 0
