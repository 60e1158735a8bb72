"""Train the reference model's language model from scratch.

    python examples/reference_model/train_base.py --books BOOKS --out DIR [--resume]

A curriculum of context lengths; a stage ends when held-out recall passes `advance` or its
share of the time is spent. The loss is cross-entropy on answers plus `prose_weight` times
that on a sample of all other tokens. Writes a Hugging Face folder, `log.jsonl`, and a
checkpoint to resume from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from still_agent.evaluation import facts
from still_agent.evaluation.dialogues import Prose, dialogue
from structured_init import structured_init
from tokens import Tokens

HELD_OUT_BOOKS = ("wizard_of_oz", "treasure_island", "alice_in_wonderland")


def build(args: argparse.Namespace, vocab: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=args.d,
        intermediate_size=args.ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": args.theta},
    )
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(config)
    structured_init(model, args.seed)
    return model


def make_optimizers(
    model: Qwen3ForCausalLM, rate: float, *, muon: bool
) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982's scaling) for the layers' matrices, AdamW for all else."""
    inner = [q for n, q in model.named_parameters() if muon and q.dim() == 2 and "embed" not in n]
    taken = {id(q) for q in inner}
    rest = [q for q in model.parameters() if id(q) not in taken]
    groups = [
        {"params": [q for q in rest if q.dim() > 1], "weight_decay": 0.01},
        {"params": [q for q in rest if q.dim() == 1], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9, fused=True)
    ]
    if inner:
        found.append(
            torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return found


def batch(
    rng,
    split,
    prose,
    tokens: Tokens,
    length: int,
    size: int,
    low: int,
    high: int,
    shared: float,
    dense: float = 0.0,
):
    """Rows of exactly `length` tokens: ids, answer mask, prose mask."""
    ids = torch.full((size, length), tokens.pad)
    answers = torch.zeros(size, length, dtype=torch.bool)
    for b in range(size):
        count = rng.randint(low, high)
        told = facts.facts(rng, split, count, shared_names=shared)
        asked = min(count, 24)
        room = 0 if rng.random() < dense else length - asked * 36 - 30
        d = dialogue(rng, split, prose, tokens=max(room, 0), told=told, asked=asked)
        row, mask = tokens.render(d.lines())
        ids[b, : len(row)] = torch.tensor(row[:length])
        answers[b, : len(row)] = torch.tensor(mask[:length])
    return ids, answers, ids != tokens.pad


@torch.no_grad()
def exact(
    model, prose, tokens: Tokens, length: int, low: int, high: int, rows: int, dense: float = 0.0
) -> float:
    """Share of held-out answers that are right in every token (teacher forced)."""
    model.eval()
    rng = random.Random(77)
    right = total = 0
    for _ in range(math.ceil(rows / 8)):
        ids, answers, _ = batch(rng, "held_out", prose, tokens, length, 8, low, high, 0.0, dense)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for b in range(len(ids)):
            where = answers[b, 1:].nonzero()[:, 0]
            hit = (
                F.linear(hidden[b, where].float(), model.lm_head.weight).argmax(-1)
                == ids[b, where + 1]
            )
            runs = (where.diff(prepend=where[:1] - 2) != 1).cumsum(0)
            for r in runs.unique():
                if (runs == r).sum() > 4:  # not an acknowledgement
                    right += bool(hit[runs == r].all())
                    total += 1
    model.train()
    return right / max(total, 1)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--books", type=Path, required=True)
    p.add_argument("--tokenizer", type=Path, default=Path("still_agent/reference/model"))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--init", type=Path)
    for k, v in dict(
        d=256,
        layers=4,
        heads=6,
        kv_heads=2,
        head_dim=64,
        ff=512,
        seed=0,
        threads=2,
        every=50,
        compile=0,
        muon=1,
    ).items():
        p.add_argument("--" + k.replace("_", "-"), type=int, default=v)
    for k, v in dict(theta=1e6, lr=2e-3, final=0.1, prose_weight=0.3, advance=0.96).items():
        p.add_argument("--" + k.replace("_", "-"), type=float, default=v)
    p.add_argument(
        "--stages",
        default="160,3,3,24,4,1;256,3,6,16,5,0.5;512,4,12,8,10,0.2;1024,6,24,4,15,0.1;2048,8,40,2,20,0.1",
        help="length,fewest facts,most facts,rows,minutes,share without prose; ...",
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    tokens = Tokens(args.tokenizer)
    paths = sorted(args.books.glob("*.txt"))
    train = Prose.of(*(b for b in paths if b.stem not in HELD_OUT_BOOKS))
    held_out = Prose.of(*(b for b in paths if b.stem in HELD_OUT_BOOKS))
    args.out.mkdir(parents=True, exist_ok=True)
    model = (
        Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        if args.init
        else build(args, tokens.size)
    )
    print(f"{sum(q.numel() for q in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizers = make_optimizers(model, args.lr, muon=bool(args.muon))
    step, seen, spent = 0, 0, 0.0
    if args.resume and (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, spent = state["step"], state["seen"], state["spent"]
    started = time.time() - spent
    log = (args.out / "log.jsonl").open("a")
    body = torch.compile(model.model, dynamic=False) if args.compile else model.model
    stages = [tuple(float(x) for x in s.split(",")) for s in args.stages.split(";")]
    for index, (length, low, high, rows, minutes, dense) in enumerate(stages):
        length, low, high, rows = int(length), int(low), int(high), int(rows)
        rng = random.Random(args.seed * 1000 + index + step)
        begun, last = time.time(), index == len(stages) - 1
        losses: list[tuple[float, float]] = []
        while (elapsed := (time.time() - begun) / 60) < minutes:
            rate = args.lr * min(1.0, (step + 1) / 50)
            if last:
                rate *= max(args.final, 1 - (1 - args.final) * elapsed / minutes)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            ids, answers, real = batch(
                rng,
                "train",
                train,
                tokens,
                length,
                rows,
                low,
                high,
                0.15 if length >= 256 else 0,
                dense,
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                target, is_answer = ids[:, 1:], answers[:, 1:]
                other = real[:, 1:] & ~is_answer & (torch.rand(target.shape) < 0.25)
                weight = model.lm_head.weight
                on_answer = F.cross_entropy(
                    F.linear(hidden[is_answer], weight).float(), target[is_answer]
                )
                on_prose = F.cross_entropy(F.linear(hidden[other], weight).float(), target[other])
            (on_answer + args.prose_weight * on_prose).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, seen = step + 1, seen + int(real.sum())
            losses.append((on_answer.item(), on_prose.item()))
            if step % args.every == 0:
                score = exact(model, held_out, tokens, length, low, high, 16, dense)
                a, o = (sum(x) / len(losses) for x in zip(*losses, strict=True))
                losses.clear()
                spent = time.time() - started
                row = {
                    "step": step,
                    "minutes": round(spent / 60, 2),
                    "length": length,
                    "answer": round(a, 4),
                    "prose": round(o, 4),
                    "exact": round(score, 4),
                    "tokens_per_s": int(seen / spent),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
                model.save_pretrained(args.out)
                state = {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "seen": seen,
                    "spent": spent,
                }
                torch.save(state, args.out / "state.tmp")
                os.replace(args.out / "state.tmp", args.out / "state.pt")
                if score >= args.advance and not last:
                    break
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
