"""Attention with a bias per slot and per KV head, registered with transformers.

A compact slot stands for several tokens; a bias beta on its logit lets it weigh as much as
they did (beta = log n equals storing the slot n times). The bias belongs to the cache, so it
rides on the key tensor that the cache's `update` returns, as the attribute `slot_bias`,
`(B, H_kv, S)` or None. Any cache may set it, and gradients reach it. Minus infinity marks
an empty slot: padding of a batch, or of a head that holds fewer slots than its layer.

Layers may hold different numbers of slots. transformers builds one mask for all of them;
its last columns are always the new tokens, so it is trimmed or padded on the left.

Caches of several sessions make one batch: `rows` on the key tensor holds the keys and values of
each, and each row of the batch attends to its own, as it would alone (see `models/rows.py`).

A cache that is asked what queries look at puts `observe` on the key tensor: it is called with
the queries `(B, H, n, d)`, rotated, and changes nothing.

With no bias and a mask that fits, stock `sdpa_attention_forward` is called with the arguments
that came, so the result is the stock one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "still"


def still_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from `query` `(B, H, n, d)` to `key` and `value` `(B, H_kv, S, d)`.

    `attention_mask` is `(B, 1, n, S')`, boolean or additive, or None. Returns `(B, n, H, d)`.
    """
    if (rows := getattr(key, "rows", None)) is not None:
        return _by_row(module, query, rows, dropout, scaling), None
    if (observe := getattr(key, "observe", None)) is not None:
        observe(query)
    if attention_mask is not None:
        attention_mask = _fit(attention_mask, key.shape[-2])
    bias: Tensor | None = getattr(key, "slot_bias", None)
    if bias is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if bias.requires_grad:
        return _folded(module, query, key, value, attention_mask, bias, dropout, scaling), None
    return _biased(query, key, value, attention_mask, bias, dropout, scaling), None


def _by_row(
    module: torch.nn.Module,
    query: Tensor,
    rows: Sequence[tuple[Tensor, Tensor]],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """One new token a row, each over its own slots: what it gets alone, bit for bit.

    Without a bias that is this one call, for all that transformers does around it.
    """
    attended = []
    for q, (key, value) in zip(query.split(1), rows, strict=True):
        if key.__dict__:  # a bias, or who looks on
            out = still_attention(module, q, key, value, None, dropout, scaling)[0]
            attended.append(out.transpose(1, 2))
        else:
            attended.append(
                functional.scaled_dot_product_attention(
                    q, key, value, dropout_p=dropout, scale=scaling, enable_gqa=True
                )
            )
    return torch.cat(attended).transpose(1, 2)  # (B, 1, H, d)


def _fit(mask: Tensor, slots: int) -> Tensor:
    """The mask with `slots` columns: older slots are all seen, so the left may come and go."""
    missing = slots - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:] if missing else mask
    return functional.pad(mask, (missing, 0), value=mask.dtype == torch.bool)


def _biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    batch, heads, n, d = query.shape
    kv_heads, slots = key.shape[1:3]
    group = heads // kv_heads
    # The lowest finite number instead of -inf: a row that sees nothing stays free of NaN.
    lowest = torch.finfo(query.dtype).min
    logits = bias.to(query.dtype).clamp(min=lowest)[:, :, None]  # (B, H_kv, 1, S)
    if n == 1:
        # The query heads of a KV head become rows: keys are not repeated, the bias broadcasts.
        if mask is not None:
            logits = _masked(logits, mask, lowest)
        query = query.reshape(batch, kv_heads, group, d)
    else:
        if mask is None:
            mask = torch.ones(n, slots, dtype=torch.bool, device=query.device)
            mask = mask.tril(slots - n)[None, None]
        logits = _masked(logits, mask, lowest)  # (B, H_kv, n, S)
        # KV heads join the batch, so that one bias serves the query heads that share it.
        query = query.reshape(batch * kv_heads, group, n, d)
        key = key.reshape(batch * kv_heads, 1, slots, d).expand(-1, group, -1, -1)
        value = value.reshape(batch * kv_heads, 1, slots, d).expand(-1, group, -1, -1)
        logits = logits.reshape(batch * kv_heads, 1, n, slots)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=logits, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, heads, n, d).transpose(1, 2).contiguous()


def _folded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The bias as one more dimension of the keys: fused kernels give no gradient to a mask."""
    n, d = query.shape[2:]
    scaling = d**-0.5 if scaling is None else scaling
    bias = bias.to(query.dtype).clamp(min=-1e4) / scaling
    key = torch.cat([key, bias[..., None]], dim=-1)
    query, value = functional.pad(query, (0, 1), value=1.0), functional.pad(value, (0, 1))
    if mask is None:
        mask = torch.ones(1, 1, n, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - n)
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling
    )
    return out[..., :d]


def _masked(logits: Tensor, mask: Tensor, lowest: float) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, logits, lowest)
    return (logits + mask.to(logits.dtype)).clamp(min=lowest)


def register() -> None:
    """Make the name "still" known to transformers, with sdpa's mask (else: no mask at all)."""
    AttentionInterface.register(NAME, still_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
