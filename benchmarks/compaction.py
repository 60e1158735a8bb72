"""Compaction against prefill of the same tokens.

    python benchmarks/compaction.py [--shape reference|qwen3-0.6b] [--tokens N] [--slots N]

Prints both times, their ratio, and the ratio of their FLOPs: how far compaction is from what
arithmetic alone would cost. `qwen3-0.6b` is that model's shape with random weights (speed does
not depend on the values) and the paper's compactor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from still_agent.models.frozen import FrozenModel
from still_agent.models.loading import load_model
from still_memory.compactors.still import StillCompactor, StillConfig
from still_memory.identity import ModelIdentity
from still_memory.rotation import free
from still_memory.span import Span, raw_slots

QWEN3_06B = Qwen3Config(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=40960,
)  # fmt: skip


def prefill_flops(c: Qwen3Config, tokens: int) -> float:
    """Multiply-adds count two; attention is causal."""
    width = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * width + 2 * kv + 3 * c.intermediate_size)
    attention = 2 * width * tokens / 2  # scores and values, half of the square
    return 2 * c.num_hidden_layers * tokens * (weights + attention)


def compaction_flops(c: StillConfig, tokens: int, slots: int) -> float:
    width = 2 * c.head_dim
    cross = tokens * width**2 + slots * 3 * width**2 + 2 * tokens * slots * width
    among = slots * 4 * width**2 + 2 * slots**2 * width
    feed = slots * 2 * c.feed_forward * width**2
    heads = slots * width**2
    perceiver = c.blocks * (cross + among + feed) + heads
    scorer = 0.0
    if c.placement == "salient":
        entire = c.layers * c.kv_heads * width
        w = c.scorer_width
        scorer = tokens * (entire * w + (2 * c.scorer_reach + 1) * w * w + 2 * w * w)
    return 2 * (c.layers * c.kv_heads * perceiver + scorer)


def best_of(n: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(n):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=("reference", "qwen3-0.6b"), default="reference")
    p.add_argument("--tokens", type=int)
    p.add_argument("--slots", type=int)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--json", action="store_true")
    args = p.parse_args()
    if args.shape == "reference":
        frozen = load_model("reference")
        model, config = frozen.model, frozen.model.config
        still = load_reference_compactor(frozen)
        tokens, slots = args.tokens or 1024, args.slots or 128
        repeat = args.repeat
    else:
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        config = QWEN3_06B
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
        frozen = None
        still = StillCompactor(
            StillConfig(layers=28, kv_heads=8, head_dim=128),
            ModelIdentity(name="", weights="", config="", tokenizer="", template="", dtype=""),
        ).to(dtype).eval().requires_grad_(False)  # fmt: skip
        tokens, slots = args.tokens or 8192, args.slots or 164
        repeat = 1 if args.tokens is None else args.repeat
    ids = torch.randint(300, 4000, (1, tokens))
    held: list[Span] = []

    def prefill() -> None:
        held.clear()
        with torch.inference_mode():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        layers = tuple(raw_slots(x.keys[0], x.values[0], 0) for x in out.layers)
        held.append(Span(0, tokens, layers, rotated_at=0))

    def rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = model.model.rotary_emb(torch.empty(0), positions.reshape(1, -1))
        return cos[0], sin[0]

    with torch.inference_mode():
        warm = ids[:, :64]
        model(input_ids=warm, use_cache=False, logits_to_keep=1)
    read = best_of(repeat, prefill)
    shorten = best_of(repeat, lambda: still.compact([free(held[0], rope)], slots))
    flops = compaction_flops(still.config, tokens, slots) / prefill_flops(config, tokens)
    row = {
        "shape": args.shape, "tokens": tokens, "slots": slots, "prefill_s": round(read, 4),
        "compaction_s": round(shorten, 4), "ratio": round(shorten / read, 4),
        "flops_ratio": round(flops, 4), "times_the_flops_ratio": round(shorten / read / flops, 2),
        "prefill_gflops": round(prefill_flops(config, tokens) / 1e9, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:24} {value}")


def load_reference_compactor(frozen: FrozenModel) -> StillCompactor:
    from still_agent.compactor import choose_compactor

    still = choose_compactor(None, "reference", frozen)
    assert isinstance(still, StillCompactor)
    return still


if __name__ == "__main__":
    main()
