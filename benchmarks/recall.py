"""Recall after one compaction, against the full cache and against training-free rivals.

    python benchmarks/recall.py [--length 1024] [--seeds 3] [--methods still ...] [--json FILE]

Held-out dialogues (words, names, numbers, phrasings and a book that nothing was trained on);
every method gets the same contexts, the same slots and the same questions, which none sees
before it compacts. An answer counts if greedy decoding gives it exactly. Two densities of
facts: what must be kept decides as much as the ratio. A rival's name with "+shares" deals its slots
out to layers as Still's are.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from still_agent.evaluation.bench import Bench
from still_agent.evaluation.dialogues import Prose
from still_agent.evaluation.methods import shared
from still_agent.evaluation.trajectory import book
from still_agent.models.frozen import FrozenModel
from still_agent.models.loading import load_model
from still_agent.training.dialogue_exams import dialogue_exams
from still_agent.training.exams import Exams, all_right
from still_agent.training.student import answer_logits
from still_agent.training.teacher import teach
from still_memory.compactors import TRAINING_FREE
from still_memory.compactors.cache import PER_SLOT, Cache
from still_memory.span import Slots, Span

METHODS = ("still", *TRAINING_FREE, *(f"{name}+shares" for name in TRAINING_FREE))
DENSITIES = {"1 fact in 100 tokens": 1.0, "1 fact in 40 tokens": 2.5}


def spans_of(cache: Cache, ids: Tensor) -> list[Span]:
    """Each row of a raw cache as a span; `ids` (B, S)."""
    rows = []
    for b in range(cache.bias.shape[1]):
        layers = tuple(
            Slots(k[b], v[b], p[b])
            for k, v, p in zip(cache.keys, cache.values, cache.positions, strict=True)
        )
        rows.append(Span(0, cache.slots, layers, rotated_at=None, ids=tuple(ids[b].tolist())))
    return rows


def stacked(spans: list[Span]) -> Cache:
    """A batch of them. Those that take fewer positions than others end with empty slots."""
    longest = max(map(len, spans))
    rows = [padded(Cache.of(span), longest) for span in spans]
    keys, values = (
        [torch.cat(layer) for layer in zip(*(getattr(r, name) for r in rows), strict=True)]
        for name in ("keys", "values")
    )
    per_slot = (torch.cat([getattr(r, n) for r in rows], dim=1) for n in PER_SLOT)
    return Cache(keys, values, *per_slot)


def padded(cache: Cache, slots: int) -> Cache:
    room = slots - cache.slots
    kv = ([pad(x, (0, 0, 0, room)) for x in side] for side in (cache.keys, cache.values))
    rest = (pad(getattr(cache, n), (0, room)) for n in PER_SLOT)
    both = Cache(*kv, *rest)
    both.bias[..., cache.slots :] = -torch.inf
    return both


@torch.no_grad()
def right(frozen: FrozenModel, exams: Exams, state: Cache) -> int:
    answer = exams.answer[:, 1:]
    logits = answer_logits(frozen, state, exams.exam, answer.nonzero(as_tuple=True))
    hits = torch.zeros_like(exams.answer)
    hits[:, 1:][answer] = logits.argmax(-1) == exams.exam[:, 1:][answer]
    return all_right(hits, exams)[0]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="reference")
    p.add_argument("--compactor", help="a folder; default: the packaged one")
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--ratios", type=int, nargs="+", default=[4, 8, 16, 32])
    p.add_argument("--methods", nargs="+", choices=METHODS)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    frozen = load_model(args.model)
    bench = Bench(frozen, args.compactor, args.model)
    methods = args.methods or [m for m in METHODS if bench.dealt or not shared(m)]
    compactors = {name: bench.compactor(name) for name in methods}
    prose = Prose([book()])
    found = []
    for title, density in DENSITIES.items():
        full: list[float] = []
        scores: dict[tuple[str, int], list[float]] = {}
        for seed in range(args.seeds):
            rng = random.Random(f"recall {seed}")
            exams = dialogue_exams(
                rng, "held_out", prose, frozen.tokenizer, args.rows, args.length, (density, density)
            )
            lesson = teach(frozen, exams)
            full.append(lesson.right[0] / lesson.right[1])
            spans = spans_of(lesson.cache, exams.context)
            for ratio in args.ratios:
                for name, compactor in compactors.items():
                    short = stacked([compactor.compact([s], args.length // ratio) for s in spans])
                    share = right(frozen, exams, short) / lesson.right[1]
                    scores.setdefault((name, ratio), []).append(share)
        print(f"{title}, {args.length} tokens: full cache {spread(full)}")
        for (name, ratio), values in sorted(scores.items()):
            of_full = statistics.mean(values) / statistics.mean(full)
            print(f"  {name:25} {ratio:3}x  {spread(values)}  {of_full:6.1%} of the full cache")
            found.append({"density": density, "method": name, "ratio": ratio, "exact": values,
                          "full": full, "share_of_full": of_full})  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
