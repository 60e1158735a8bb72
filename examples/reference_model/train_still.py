"""Train the reference compactor against the reference language model.

python examples/reference_model/train_still.py --books BOOKS --model DIR --out DIR [--resume]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from still_agent.evaluation.dialogues import Prose
from still_agent.models.loading import load_model
from still_agent.training.dialogue_exams import dialogue_exams
from still_agent.training.exams import Exams
from still_agent.training.still import Recipe, Trainer, recall
from still_memory.compactors.still import StillCompactor, StillConfig
from train_tokenizer import HELD_OUT_BOOKS


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--books", type=Path, required=True)
    p.add_argument("--model", type=Path, default=Path("still_agent/reference/model"))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--init", type=Path, help="start from the compactor in this folder")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--minutes", type=float, default=float("inf"))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--every", type=int, default=20)
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--density", type=float, nargs=2, default=(0.5, 3.0))
    p.add_argument("--scorer-density", type=float, nargs=2, default=(0.2, 4.0))
    p.add_argument("--per-head", action="store_true", help="each head places its own latents")
    p.add_argument("--even", action="store_true", help="the paper's placement")
    p.add_argument("--unsettled", action="store_true", help="write old slots anew at each round")
    p.add_argument("--feed-forward", type=int, default=2)
    p.add_argument("--neighbourhood", type=float, default=0.1)
    for f in fields(Recipe):
        kind = type(f.default)
        if kind is bool:
            p.add_argument("--" + f.name, action="store_true")
        elif kind is tuple:
            p.add_argument("--" + f.name.replace("_", "-"), type=int, nargs="+", default=f.default)
        else:
            p.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # shut gates make many, and they are slow
    frozen = load_model(str(args.model), device=args.device)
    paths = sorted(args.books.glob("*.txt"))
    train = Prose.of(*(b for b in paths if b.stem not in HELD_OUT_BOOKS))
    held_out = Prose.of(*(b for b in paths if b.stem in HELD_OUT_BOOKS))

    def source(rng: random.Random, rows: int, length: int) -> Exams:
        return dialogue_exams(
            rng, "train", train, frozen.tokenizer, rows, length, tuple(args.density)
        )

    def telling(rng: random.Random, rows: int, length: int) -> Exams:
        return dialogue_exams(
            rng, "train", train, frozen.tokenizer, rows, length, tuple(args.scorer_density)
        )

    def background(rng: random.Random, rows: int, length: int) -> Tensor:
        """Prose alone, as it is read."""
        found = []
        for _ in range(rows):
            text = " ".join(train.passage(rng, 5 * length))
            found.append(frozen.tokenizer.message("user", text)[:length])
        return torch.tensor(found)

    config = StillConfig(
        layers=frozen.layers,
        kv_heads=frozen.kv_heads,
        head_dim=frozen.head_dim,
        beta=True,
        placement="even" if args.even else "salient",
        per_head=args.per_head,
        settled=not args.unsettled,
        feed_forward=args.feed_forward,
        neighbourhood=args.neighbourhood,
    )
    still = StillCompactor(config, frozen.identity).to(frozen.device)
    print(f"{sum(q.numel() for q in still.parameters()) / 1e6:.2f} M parameters", flush=True)
    recipe = Recipe(
        **{
            f.name: tuple(v) if isinstance(v := getattr(args, f.name), list) else v
            for f in fields(Recipe)
        }
    )
    trainer = Trainer(frozen, still, source, recipe, args.out, telling, background)
    if args.resume:
        trainer.resume()
    elif args.init:
        still.load_state_dict(load_file(args.init / "model.safetensors"))
    else:
        trainer.calibrate()
    check = random.Random(4242)

    def held_out_exams(density: float) -> Exams:
        return dialogue_exams(
            check, "held_out", held_out, frozen.tokenizer, 8, args.lengths[-1], (density, density)
        )

    sparse = [held_out_exams(0.8)]
    dense = [held_out_exams(2.5)]

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
