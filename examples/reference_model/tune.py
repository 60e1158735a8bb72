"""A compactor's options, and shares of its layers, measured on the training side.

    python examples/reference_model/tune.py --books BOOKS --method attention-matching
        --options '{}' '{"keys": "pursuit"}'
    python examples/reference_model/tune.py --books BOOKS --method still --ratios 8 32
        --shares '[]' '[[0.1, 0.1], [3.1, 3.1], [0.1, 0.1], [0.7, 0.7]]'

Contexts, words and books of training, never those of the benchmarks. Every variant gets the same
total of slots.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy

from benchmarks.recall import spans_of, stacked
from still_agent.compactor import choose_compactor
from still_agent.evaluation.dialogues import Prose
from still_agent.evaluation.shares import SharedOut
from still_agent.models.frozen import FrozenModel
from still_agent.models.loading import load_model
from still_agent.training.dialogue_exams import dialogue_exams
from still_agent.training.exams import Exams, all_right
from still_agent.training.student import answer_logits
from still_agent.training.teacher import teach
from still_memory.compactors.cache import Cache
from still_memory.shares import Shares
from train_tokenizer import HELD_OUT_BOOKS


def shares(text: str) -> Shares:
    return tuple(map(tuple, json.loads(text)))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--books", type=Path, required=True)
    p.add_argument("--model", default="reference")
    p.add_argument("--method", default="still", help="a name, or a trained compactor's folder")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--density", type=float, default=2.0)
    p.add_argument("--ratios", type=int, nargs="+", default=[8])
    p.add_argument("--rows", type=int, default=6)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--options", type=json.loads, nargs="+", default=[{}], help="of a dataclass")
    p.add_argument(
        "--shares",
        type=shares,
        nargs="+",
        help="[[of each KV head] of each layer]; []: the same for all",
    )
    args = p.parse_args()
    frozen = load_model(args.model)
    made = choose_compactor(args.method, args.model, frozen)
    prose = Prose.of(*(b for b in sorted(args.books.glob("*.txt")) if b.stem not in HELD_OUT_BOOKS))
    density = (args.density, args.density)
    exams = dialogue_exams(
        random.Random(f"tune {args.seed}"), "train", prose, frozen.tokenizer,
        args.rows, args.length, density,
    )  # fmt: skip
    lesson = teach(frozen, exams)
    spans = spans_of(lesson.cache, exams.context)
    print("full cache", *graded(frozen, exams, lesson.cache), flush=True)
    for ratio in args.ratios:
        for options in args.options:
            compactor = replace(cast("Any", made), **options) if options else made
            for some in args.shares or [None]:
                dealt = compactor if some is None else SharedOut(compactor, some)
                began = time.process_time()
                short = stacked([dealt.compact([s], args.length // ratio) for s in spans])
                seconds = (time.process_time() - began) / len(spans)
                loss, right = graded(frozen, exams, short)
                print(
                    f"{ratio}x {json.dumps(options)} shares {json.dumps(some)}: loss {loss:.3f}, "
                    f"{right:.3f} exact, {seconds:.1f} s of CPU a context",
                    flush=True,
                )


@torch.no_grad()
def graded(frozen: FrozenModel, exams: Exams, state: Cache) -> tuple[float, float]:
    """Mean loss of an answer's token, and the share of answers that are exact."""
    answer = exams.answer[:, 1:]
    logits = answer_logits(frozen, state, exams.exam, answer.nonzero(as_tuple=True))
    gold = exams.exam[:, 1:][answer]
    hits = torch.zeros_like(exams.answer)
    hits[:, 1:][answer] = logits.argmax(-1) == gold
    right, total = all_right(hits, exams)
    return cross_entropy(logits, gold).item(), right / total


if __name__ == "__main__":
    main()
