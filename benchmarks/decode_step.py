"""One decode step with a live cache of the budget's size, against stock transformers.

The same random weights, process and thread count; the variants take turns, step by step, so
that a noisy machine disturbs all alike. Reported: the median step, and its ratio to a stock
step (sdpa attention, a `DynamicCache` of the same length, a bare loop without `generate`'s own
work). Above 1 is slower than stock. Random weights do, for time does not depend on them; the
shape is the reference model's unless given:

    python benchmarks/decode_step.py --slots 1024
    python benchmarks/decode_step.py --hidden 1024 --layers 28 --heads 16 --kv-heads 8 \
        --head-dim 128 --intermediate 3072 --vocab 151936          # Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from still_agent.models import FrozenModel, LiveCache, TiktokenTokenizer

TOKENIZER = Path(__file__).parent.parent / "still_agent" / "reference" / "model"
TOKEN = 7


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    shape = {"slots": 1024, "layers": 4, "hidden": 256, "intermediate": 512, "heads": 6}
    shape |= {"kv_heads": 2, "head_dim": 64, "vocab": 4096, "steps": 100, "threads": 1}
    for name, value in shape.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=max(2048, args.slots),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
    return model.eval().to(device=args.device)


def filled(model: FrozenModel, args: argparse.Namespace, biased: int) -> LiveCache:
    """A cache with one slot left; the oldest `biased` slots carry a bias."""
    cache = model.new_cache(args.slots)
    shape = (model.kv_heads, args.slots - 1, model.head_dim)
    for layer in range(model.layers):
        keys, values = torch.randn(2, *shape).to(model.device, model.dtype)
        bias = torch.zeros(shape[:2], device=model.device)
        bias[:, :biased] = 1.5
        cache.load(layer, keys, values, bias if biased else None)
    return cache


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    stock = build(args)
    stock.set_attn_implementation("sdpa")
    ours = FrozenModel(build(args), TiktokenTokenizer(TOKENIZER), "random")
    last = args.slots - 1

    plain, biased = filled(ours, args, 0), filled(ours, args, args.slots * 5 // 8)
    dynamic = DynamicCache(config=stock.config)
    for layer in range(ours.layers):
        keys, values = plain.raw(layer, 0, last)
        dynamic.update(keys[None].clone(), values[None].clone(), layer)

    @torch.inference_mode()
    def stock_step() -> torch.Tensor:
        out = stock(
            torch.tensor([[TOKEN]], device=args.device),
            past_key_values=dynamic,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1].float()

    def live_step(cache: LiveCache) -> Callable[[], torch.Tensor]:
        return lambda: ours.forward([TOKEN], cache, last)

    variants = {
        "stock": (stock_step, dynamic),
        "live": (live_step(plain), plain),
        "live with bias": (live_step(biased), biased),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    logits: dict[str, torch.Tensor] = {}
    for _ in range(args.steps + 5):
        for name, (step, cache) in variants.items():
            begin = time.perf_counter()
            logits[name] = step()
            logits[name].argmax().item()  # as sampling does; waits for a GPU
            seconds[name].append(time.perf_counter() - begin)
            cache.crop(-1)
    medians = {name: statistics.median(times[5:]) for name, times in seconds.items()}
    result = {
        "slots": args.slots,
        "device": args.device,
        "dtype": args.dtype,
        "milliseconds": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "ratio": round(medians["live"] / medians["stock"], 3),
        "ratio with bias": round(medians["live with bias"] / medians["stock"], 3),
        "bit-equal": torch.equal(logits["live"], logits["stock"]),
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, value in medians.items():
        print(f"{name:>15}: {1e3 * value:7.3f} ms a step at {args.slots} slots")
    print(f"decode step, live / stock: {result['ratio']} (with bias: {result['ratio with bias']})")
    print(f"logits of live and stock bit-equal: {result['bit-equal']}")


if __name__ == "__main__":
    main()
