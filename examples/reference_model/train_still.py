"""Train the reference compactor against the reference language model.

python examples/reference_model/train_still.py --books BOOKS --model DIR --out DIR [--resume]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields
from pathlib import Path

import torch

from still_agent.evaluation import facts
from still_agent.evaluation.dialogues import Prose, dialogue
from still_agent.evaluation.facts import Split
from still_agent.models.loading import load_model
from still_agent.training.exams import Exams, pack
from still_agent.training.still import Recipe, Trainer, recall
from still_memory.compactors.still import StillCompactor, StillConfig
from tokens import Tokens
from train_tokenizer import HELD_OUT_BOOKS

QUESTIONS = 14  # most questions an exam asks


def exams(
    rng: random.Random,
    split: Split,
    prose: Prose,
    tokens: Tokens,
    rows: int,
    length: int,
    density: tuple[float, float],
) -> Exams:
    """Contexts of exactly `length` tokens. `density`: facts per 100 tokens, drawn between."""
    packed = []
    while len(packed) < rows:
        count = max(2, round(length / 100 * rng.uniform(*density)))
        told = facts.facts(rng, split, count, shared_names=0.1)
        d = dialogue(rng, split, prose, tokens=int(length * 1.05) + 20, told=told, asked=QUESTIONS)
        context, _ = tokens.render(d.context)
        if len(context) < length:
            continue
        ids, mask = tokens.render((line for q in d.exam for line in q.lines()), start=False)
        # what is cut off at the end must not be asked: ask only of facts told in full
        text = tokens.encoding.decode(context[:length])
        lines = [
            line
            for q in d.exam
            if all(v in text for v in q.expected) and (q.fact is None or q.fact.values[-1] in text)
            for line in q.lines()
        ]
        if not lines:
            continue
        ids, mask = tokens.render(lines, start=False)
        packed.append((context[:length], ids, mask))
    return pack(packed, tokens.pad)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--books", type=Path, required=True)
    p.add_argument("--model", type=Path, default=Path("still_agent/reference/model"))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--init", type=Path, help="start from the compactor in this folder")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--minutes", type=float, default=float("inf"))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--every", type=int, default=20)
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--density", type=float, nargs=2, default=(0.5, 3.0))
    p.add_argument("--shared", action="store_true", help="one choice of tokens for all heads")
    p.add_argument("--even", action="store_true", help="the paper's placement")
    p.add_argument("--unsettled", action="store_true", help="write old slots anew at each round")
    p.add_argument("--feed-forward", type=int, default=2)
    p.add_argument("--neighbourhood", type=float, default=0.1)
    for f in fields(Recipe):
        kind = type(f.default)
        if kind is tuple:
            p.add_argument("--" + f.name.replace("_", "-"), type=int, nargs="+", default=f.default)
        else:
            p.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    frozen = load_model(str(args.model))
    tokens = Tokens(args.model)
    paths = sorted(args.books.glob("*.txt"))
    train = Prose.of(*(b for b in paths if b.stem not in HELD_OUT_BOOKS))
    held_out = Prose.of(*(b for b in paths if b.stem in HELD_OUT_BOOKS))
    rng = random.Random(args.seed + 1)

    def source(rows: int, length: int) -> Exams:
        return exams(rng, "train", train, tokens, rows, length, tuple(args.density))

    config = StillConfig(
        layers=frozen.layers,
        kv_heads=frozen.kv_heads,
        head_dim=frozen.head_dim,
        beta=True,
        placement="even" if args.even else "salient",
        per_head=not args.shared,
        settled=not args.unsettled,
        feed_forward=args.feed_forward,
        neighbourhood=args.neighbourhood,
    )
    still = StillCompactor(config, frozen.identity)
    print(f"{sum(q.numel() for q in still.parameters()) / 1e6:.2f} M parameters", flush=True)
    recipe = Recipe(
        **{
            f.name: tuple(v) if isinstance(v := getattr(args, f.name), list) else v
            for f in fields(Recipe)
        }
    )
    trainer = Trainer(frozen, still, source, recipe, args.out)
    if args.resume:
        trainer.resume()
        rng.seed(args.seed + 1 + trainer.step)
    elif args.init:
        weights = StillCompactor.load(args.init, StillCompactor.trained_for(args.init))
        still.load_state_dict(weights.state_dict())
    else:
        trainer.calibrate()
    check = random.Random(4242)
    sparse = [exams(check, "held_out", held_out, tokens, 8, args.lengths[-1], (0.8, 0.8))]
    dense = [exams(check, "held_out", held_out, tokens, 8, args.lengths[-1], (2.5, 2.5))]

    def evaluate() -> dict[str, float]:
        found = {}
        for name, batches in (("sparse", sparse), ("dense", dense)):
            for ratio, rounds in ((4, 1), (8, 1), (16, 1), (8, 4), (16, 4)):
                got, full = recall(frozen, still, batches, ratio=ratio, rounds=rounds)
                found[f"{name} {ratio}x/{rounds}"] = round(got, 3)
            found[f"{name} full"] = round(full, 3)
        return found

    trainer.run(
        lambda row: print(row, flush=True),
        every=args.every,
        save_every=args.save_every,
        evaluate=evaluate,
        minutes=args.minutes,
    )


if __name__ == "__main__":
    main()
