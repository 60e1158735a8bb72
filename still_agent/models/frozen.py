"""A frozen Qwen3: a stock transformers model that is run, never trained.

Positions are given explicitly at every forward pass, for a slot's position is chosen when it
is placed and need not be its token's number. The rotary embedding that placement uses is the
model's own, evaluated in fp32. That is exact only if its frequencies are: a model cast with
`.to(bfloat16)` has rounded them (an error of 0.6 in the cosine at position 3000), so they are
checked here. Frequencies that change with the length of the input (dynamic, longrope) would
put one and the same position in two places, so they are refused.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from still_agent.models import attention
from still_agent.models.cache import LiveCache
from still_agent.models.digests import kept
from still_agent.models.placed import placed
from still_agent.models.rows import Rows, unchanged
from still_agent.models.tokenizers import Tokenizer
from still_memory.compactors.cache import Cache
from still_memory.compactors.kv_distill import Adapt
from still_memory.compactors.looks import Looks
from still_memory.errors import BudgetError, InputError
from still_memory.identity import ModelIdentity, weights_digest
from still_memory.rotation import place, unrotate
from still_memory.span import Span

# What of a config shapes a KV cache. Named one by one, because the whole of it also holds
# versions, paths and defaults that come and go between releases of transformers.
CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "attention_bias", "layer_types", "sliding_window", "max_position_embeddings",
    "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
LOOK = 512  # tokens of one forward pass of `look`, so that activations stay bounded


class FrozenModel:
    """A base model, its tokenizer and who they are.

    files: what the model was loaded from and is unchanged since, so that the digest of its weights
        need not be computed at each load (see `digests`). Without them it is hashed as it is.

    Raises InputError for a model whose cache cannot be kept exactly.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: Tokenizer,
        name: str,
        *,
        files: Sequence[Path] = (),
    ) -> None:
        config = model.config
        _require_whole_attention(config.layer_types or ())
        _require_fixed_frequencies(model)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._files, self._changes = files, self._changed()
        self.layers: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        self.head_dim: int = config.head_dim
        self.window: int = config.max_position_embeddings
        self.vocab_size: int = config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot's keys and values over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def identity(self) -> ModelIdentity:
        """Digests of all that shapes a cache. Reads every weight, once for given files."""
        files = self._files if self._changed() == self._changes else ()
        about = f"{self.dtype} {self.model.config.tie_word_embeddings}"
        return ModelIdentity(
            name=self.name,
            weights=kept(files, about, lambda: weights_digest(self.model.state_dict())),
            config=_config_digest(self.model),
            tokenizer=self.tokenizer.digest,
            template=self.tokenizer.template_digest,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def _changed(self) -> list[tuple[int, int]]:
        """Differs from what it was once a weight has been written to, or replaced."""
        return [(id(p), p._version) for p in self.model.parameters()]

    @torch.no_grad()
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at `positions`, `(*positions.shape, d)` in fp32, scaling included."""
        probe = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self.model.model.rotary_emb(probe, positions.reshape(1, -1))
        shape = (*positions.shape, self.head_dim)
        return cos.reshape(shape), sin.reshape(shape)

    def new_cache(self, capacity: int, batch: int = 1) -> LiveCache:
        """An empty live cache of `capacity` slots in the mean layer, allocated now."""
        return LiveCache(
            self.layers, self.kv_heads, self.head_dim, capacity,
            batch=batch, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor:
        """Feed tokens at `position`, `position + 1`, ...; they join the cache.

        Returns the logits `(vocab,)` after the last one, in fp32. The cache is unchanged when
        anything is raised: BudgetError (no room, or past the trained window) or InputError.
        """
        n = len(ids)
        if n == 0:
            raise InputError("no token to feed; give at least one")
        self._require_place(n, cache, position)
        row = torch.tensor([ids], dtype=torch.long, device=self.device)
        positions = torch.arange(position, position + n, device=self.device)[None]
        with unchanged([cache]):
            logits: Tensor = self.model(
                input_ids=row,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[0, -1].float()

    @torch.inference_mode()
    def forward_rows(
        self, tokens: Sequence[int], caches: Sequence[LiveCache], positions: Sequence[int]
    ) -> Tensor:
        """Feed one token to each of B live caches, at a position in each, in one pass.

        Returns the logits `(B, vocab)` after them, in fp32. No cache is changed when anything is
        raised: BudgetError as by `forward`, for the first row at fault; InputError for a cache
        that is two rows.
        """
        if len(set(map(id, caches))) < len(caches) or not caches:
            raise InputError("rows of a batch are live caches of their own; give each one once")
        for cache, position in zip(caches, positions, strict=True):
            self._require_place(1, cache, position)
        with unchanged(caches):
            logits: Tensor = self.model(
                input_ids=torch.tensor(tokens, dtype=torch.long, device=self.device)[:, None],
                position_ids=torch.tensor(positions, device=self.device)[:, None],
                attention_mask={"full_attention": None},  # one new token a row sees every slot
                past_key_values=Rows(caches),
                use_cache=True,
            ).logits
        return logits[:, -1].float()

    def _require_place(self, n: int, cache: LiveCache, position: int) -> None:
        if n > cache.room:
            raise BudgetError(
                f"the live cache has room for {cache.room} slots and {n} more are needed; "
                "compact first, or raise the budget"
            )
        if position < 0 or position + n > self.window:
            raise BudgetError(
                f"positions {position} to {position + n - 1} leave the window of {self.window} "
                f"that {self.name!r} was trained for; use a budget of at most that many slots"
            )

    def encode(self, text: str) -> list[int]:
        """See `still_memory.compactors.looks.Reader`."""
        return self.tokenizer.encode(text)

    @torch.inference_mode()
    def look(self, before: Sequence[Span], ids: Sequence[int]) -> list[Looks]:
        """See `still_memory.compactors.looks.Reader`.

        BudgetError past the trained window, InputError for ids that the model does not have.
        """
        self._require_known(ids)
        held = sum(len(span) for span in before)
        cache = self.new_cache(held + len(ids))
        base = 0
        for span in before:
            for layer, (slots, at) in enumerate(zip(span.layers, cache.lengths, strict=True)):
                keys = place(span, layer, base, self.rope, self.dtype)
                cache.load(layer, keys, slots.values, slots.bias, at=at)
            base += len(span)
        queries = cache.observed()
        for first in range(0, len(ids), LOOK):
            self.forward(ids[first : first + LOOK], cache, held + first)
        return [
            Looks(torch.cat([q[0] for q in queries[n :: self.layers]], dim=1), *cache.row(n))
            for n in range(self.layers)
        ]

    def _require_known(self, ids: Sequence[int]) -> None:
        if not all(0 <= i < self.vocab_size for i in ids):
            raise InputError(f"there are token ids past the {self.vocab_size} of {self.name!r}")

    def read(
        self, before: Cache, ids: Tensor, adapt: Adapt | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `still_memory.compactors.kv_distill.Reader`.

        BudgetError past the trained window, InputError for ids that the model does not have.
        """
        self._require_known(ids.flatten().tolist())
        held, n = before.slots, ids.shape[1]
        if held + n > self.window:
            raise BudgetError(
                f"{held} slots and {n} tokens leave the window of {self.window} that "
                f"{self.name!r} was trained for; use a smaller budget"
            )
        past: Any = placed(before, self.rope, self.dtype)
        at = torch.arange(held, held + n, device=ids.device)
        for first in range(0, n, LOOK):
            some = slice(first, first + LOOK)
            with self._adapted(adapt, some):
                self.model.model(
                    input_ids=ids[:, some], position_ids=at[None, some], past_key_values=past,
                    use_cache=True,
                )  # fmt: skip
        keys = [unrotate(x.keys[:, :, held:], at.float(), self.rope) for x in past.layers]
        return keys, [x.values[:, :, held:].to(self.dtype) for x in past.layers]

    @contextmanager
    def _adapted(self, adapt: Adapt | None, tokens: slice) -> Iterator[None]:
        """In here, and in this thread alone, projections give what `adapt` adds as well."""
        mine, hooks = threading.get_ident(), []

        def added(layer: int, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Any]:
            def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
                if adapt is None or threading.get_ident() != mine:
                    return None
                more = adapt(layer, name, inputs[0], tokens)
                return None if more is None else output + more

            return hook

        try:
            for n, layer in enumerate(self.model.model.layers if adapt else ()):
                for name in "qkvo":
                    projection = getattr(layer.self_attn, f"{name}_proj")
                    hooks.append(projection.register_forward_hook(added(n, name)))
            yield
        finally:
            for held in hooks:
                held.remove()


def _require_whole_attention(layer_types: Sequence[str]) -> None:
    if others := sorted(set(layer_types) - {"full_attention"}):
        raise InputError(
            f"layers of type {', '.join(others)} are not supported; "
            "use a Qwen3 whose layers all attend to everything (use_sliding_window=false)"
        )


def _require_fixed_frequencies(model: Qwen3ForCausalLM) -> None:
    rotary = model.model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope") or "dynamic" in rotary.rope_type:
        raise InputError(
            f"RoPE of type {rotary.rope_type!r} changes its frequencies with the length, so a "
            "stored key could not be moved; set rope_type to default, linear, yarn or llama3"
        )
    fresh = type(rotary)(model.config).inv_freq
    held = rotary.inv_freq
    if held.dtype != torch.float32 or not torch.allclose(held.cpu(), fresh, rtol=1e-6, atol=0):
        raise InputError(
            "the model's RoPE frequencies have been rounded by a cast; load it with "
            "from_pretrained(dtype=...) instead of calling .to(dtype)"
        )
    if 2 * held.shape[-1] != model.config.head_dim:
        raise InputError("RoPE on a part of each head is not supported; use a stock Qwen3")


def _config_digest(model: Qwen3ForCausalLM) -> str:
    fields = {name: getattr(model.config, name, None) for name in CONFIG_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
