"""Train the reference model's language model from scratch.

    torchrun --nproc-per-node 2 examples/reference_model/train_base.py --books BOOKS --out DIR

One process a core (`--threads 1`) is faster than one process with several threads; a single
one needs no torchrun. `--device cuda` is for one process on a GPU.

A curriculum of context lengths; a stage ends when held-out recall passes `advance` or its
share of the time is spent (`--mixed`: all stages at once, each as often as its minutes say).
With `--thin 0.5`, in half of the steps answers see of what was told little more than its values.
The loss is cross-entropy on answers plus `prose_weight` times that on a sample of all other
tokens; with a second lookup (`second_lookup.py`, and then `look_again.py`), also
`lookup_weight` times what `lookups.py` asks of attention. Writes a
Hugging Face folder, `log.jsonl`, and a checkpoint to resume from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from look_again import lay_look_again
from lookups import Lookups, lookup_loss, restated_loss
from second_lookup import Sample, lay_second_lookup
from still_agent.evaluation import facts
from still_agent.evaluation.dialogues import Prose, dialogue, render
from still_agent.evaluation.phrasings import Split
from still_agent.models.tokenizers import TiktokenTokenizer
from structured_init import prefer_recent, structured_init
from train_tokenizer import HELD_OUT_BOOKS

VOCABULARY = 4096
Losses = dict[str, float]
RESTATED = "restated.safetensors"
LOOKUP = 1  # the layer that finds statements; the last one chooses among them
QUESTION_TOKENS = 36  # of a question and its answer, about
FEWEST_QUESTIONS, MOST_QUESTIONS = 12, 24
SINK = 8  # first tokens, which a runtime pins
KEPT = (0.0, 0.03, 0.1, 0.3)  # shares of tokens that a thin memory keeps beside values
NEARBY = (64, 128, 256, 512)  # tokens back that are still raw


def build(args: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
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
    model = Qwen3ForCausalLM(config)
    structured_init(model, args.seed)
    return model


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982's scaling) for the layers' matrices, AdamW for all else."""
    inner = [q for n, q in model.named_parameters() if q.dim() == 2 and "embed" not in n]
    taken = {id(q) for q in inner}
    rest = [q for q in model.parameters() if id(q) not in taken]
    groups = [
        {"params": [q for q in rest if q.dim() > 1], "weight_decay": 0.01},
        {"params": [q for q in rest if q.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9, fused=True),
        torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum."""

    length: int
    fewest: int  # facts in a row
    most: int
    rows: int
    minutes: float
    dense: float  # share of rows that hold facts alone, without prose

    @classmethod
    def parse(cls, text: str) -> Stage:
        length, fewest, most, rows, minutes, dense = text.split(",")
        return cls(int(length), int(fewest), int(most), int(rows), float(minutes), float(dense))


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    answers: Tensor  # (B, T) bool
    real: Tensor  # (B, T) bool: no padding
    lookups: Lookups

    def to(self, device: torch.device) -> Batch:
        tensors = (t.to(device) for t in (self.ids, self.answers, self.real))
        return Batch(*tensors, self.lookups)

    def thinned(self, rng: random.Random) -> Tensor:
        """Which tokens see which (B, 1, T, T), as if memory kept values and few tokens beside.

        A token that is not kept is seen from nearby alone: for as long as a chunk would be raw.
        """
        rows, length = self.ids.shape
        at = torch.arange(length)
        back = at[:, None] - at
        seen = torch.empty(rows, 1, length, length, dtype=torch.bool)
        for b in range(rows):
            draw = torch.Generator().manual_seed(rng.getrandbits(63))
            kept = torch.rand(length, generator=draw) < rng.choice(KEPT)
            kept[:SINK] = True
            kept[self.lookups.asked[b] :] = True
            for row, first, end in self.lookups.needed:
                if row == b:
                    kept[first - 1 : end + 1] = True
            seen[b, 0] = (back >= 0) & (kept | (back < rng.choice(NEARBY)))
        return seen


def batch(
    rng: random.Random, split: Split, prose: Prose, tokenizer: TiktokenTokenizer, stage: Stage,
    rows: int,
) -> Batch:  # fmt: skip
    """Rows of `stage.length` tokens."""
    ids = torch.zeros(rows, stage.length, dtype=torch.long)
    answers = torch.zeros(rows, stage.length, dtype=torch.bool)
    real = torch.zeros(rows, stage.length, dtype=torch.bool)
    lookups = Lookups()
    hard = {"corrected": 0.5, "multi": 0.3, "shared_names": 0.2} if split == "train" else {}
    for b in range(rows):
        told = facts.facts(rng, split, rng.randint(stage.fewest, stage.most), **hard)
        asked = min(len(told), MOST_QUESTIONS)
        room = stage.length - asked * QUESTION_TOKENS - 30
        tokens = 0 if rng.random() < stage.dense else max(room, 0)
        talk = dialogue(rng, split, prose, tokens=tokens, told=told, asked=asked)
        most = stage.length - min(asked, FEWEST_QUESTIONS) * QUESTION_TOKENS
        while len(render(tokenizer, talk.context)[0]) > most and len(told) > 1:
            told = told[: len(told) * 4 // 5]  # else its questions would be cut off
            talk = dialogue(rng, split, prose, tokens=tokens, told=told, asked=asked)
        row, mask = render(tokenizer, talk.lines())
        row, mask = [*tokenizer.start, *row], [False] * len(tokenizer.start) + mask
        n = min(len(row), stage.length)
        ids[b, :n] = torch.tensor(row[:n])
        answers[b, :n] = torch.tensor(mask[:n])
        real[b, :n] = True
        words = [tokenizer.token_bytes(token).decode("latin-1") for token in row[:n]]
        lookups.add(b, words, talk)
    return Batch(ids, answers, real, lookups)


@torch.no_grad()
def exact(
    model: Qwen3ForCausalLM, prose: Prose, tokenizer: TiktokenTokenizer, stage: Stage, rows: int
) -> float:
    """Share of held-out answers that are right in every token (teacher forced)."""
    model.eval()
    rng = random.Random(77)
    right = total = 0
    for _ in range(math.ceil(rows / 8)):
        drawn = batch(rng, "held_out", prose, tokenizer, stage, 8).to(model.device)
        ids, answers = drawn.ids, drawn.answers
        with torch.autocast(model.device.type, torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for b in range(len(ids)):
            where = answers[b, 1:].nonzero()[:, 0]
            likeliest = F.linear(hidden[b, where].float(), model.lm_head.weight).argmax(-1)
            hit = likeliest == ids[b, where + 1]
            runs = (where.diff(prepend=where[:1] - 2) != 1).cumsum(0)
            for run in runs.unique():
                if (runs == run).sum() > 4:  # not an acknowledgement
                    right += bool(hit[runs == run].all())
                    total += 1
    model.train()
    return right / max(total, 1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(figure: float) -> float:
    """The first process's figure, so that all take the same turns."""
    if not dist.is_initialized():
        return figure
    told = torch.tensor(figure, dtype=torch.float64)
    dist.broadcast(told, 0)
    return float(told)


class Run:
    """A model in training, with what it takes to stop and go on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = TiktokenTokenizer(args.tokenizer)
        books = sorted(args.books.glob("*.txt"))
        self.train = Prose.of(*(b for b in books if b.stem not in HELD_OUT_BOOKS))
        self.held_out = Prose.of(*(b for b in books if b.stem in HELD_OUT_BOOKS))
        self.model = build(args) if args.init is None else Qwen3ForCausalLM.from_pretrained(
            args.init, dtype=torch.float32
        )  # fmt: skip
        self.restated: Tensor | None = None  # see second_lookup.py
        before = args.out if args.resume else args.init
        if before is not None and (known := before / RESTATED).exists():
            self.restated = load_file(known)["restated"]
        self.again = before is not None and known.exists() and "again" in load_file(known)
        if args.prefer_recent and not args.resume:
            sample = random.Random(args.seed)
            stage = Stage(384, 3, 9, 8, 0.0, 0.5)
            drawn = batch(sample, "train", self.train, self.tokenizer, stage, stage.rows)
            prefer_recent(self.model, drawn.ids)
        if args.second_lookup and not args.resume:
            self.restated = lay_second_lookup(self.model, self.samples, args.seed)
        if args.look_again and not args.resume:
            if self.restated is None:
                raise SystemExit(
                    f"--look-again needs --second-lookup, or an --init with {RESTATED}"
                )
            lay_look_again(self.model, self.samples, self.restated, args.seed)
            self.again = True
        self.device = torch.device(args.device)  # what is laid is laid on the CPU
        self.model.to(self.device)
        if self.restated is not None:
            self.restated = self.restated.to(self.device)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.stages = [Stage.parse(text) for text in args.stages.split(";")]
        self.stage = self.step = self.seen = 0
        self.spent = 0.0  # minutes, of the whole run
        self.here = 0.0  # minutes, of this stage
        args.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def samples(self) -> list[Sample]:
        """160 dialogues, half of them without prose, without padding."""
        rng = random.Random(self.args.seed)
        stages = (Stage(1024, 6, 14, 1, 0.0, dense) for dense in (0.0, 1.0) for _ in range(80))
        rows = (batch(rng, "train", self.train, self.tokenizer, s, 1) for s in stages)
        return [(x.ids[:, : int(x.real.sum())], x.lookups) for x in rows]

    @property
    def rate(self) -> float:
        """Warm-up, then constant, then linear to `final` over the last `decay` of the time."""
        done = sum(s.minutes for s in self.stages[: self.stage]) + self.here
        left = 1 - done / sum(s.minutes for s in self.stages)
        fall = max(self.args.final, min(1.0, left / self.args.decay))
        return self.args.lr * min(1.0, (self.step + 1) / 50) * fall

    def go(self) -> None:
        body = self.forward
        if self.args.compile:
            torch._dynamo.config.recompile_limit = 4 * len(self.stages)  # one a shape, and thin
            body = torch.compile(body, dynamic=False)
        while self.stage < len(self.stages):
            rng = random.Random(f"{self.args.seed} {self.stage} {self.step} {rank()}")
            losses: list[Losses] = []
            clock, before = time.time(), self.spent
            began = self.here
            score = 0.0
            while self.here < self.minutes and score < self.args.advance:
                losses.append(self.learn(body, rng, self.drawn(self.step)))
                minutes = agreed((time.time() - clock) / 60)
                self.spent, self.here = before + minutes, began + minutes
                if self.step % self.args.every == 0:
                    stage = self.drawn(self.step)
                    score = agreed(exact(self.model, self.held_out, self.tokenizer, stage, 16))
                    if rank() == 0:
                        self.report(stage, losses, score)
                    losses.clear()
            self.stage = len(self.stages) if self.args.mixed else self.stage + 1
            self.here = 0.0
        if rank() == 0:
            self.save()

    @property
    def minutes(self) -> float:
        """Of what is under way: a stage, or with `--mixed` all of them together."""
        some = self.stages if self.args.mixed else self.stages[self.stage : self.stage + 1]
        return sum(s.minutes for s in some)

    def drawn(self, step: int) -> Stage:
        """The stage that a step belongs to, the same one in every process."""
        if not self.args.mixed:
            return self.stages[self.stage]
        weights = [s.minutes for s in self.stages]
        return random.Random(f"{self.args.seed} {step}").choices(self.stages, weights)[0]

    def thins(self, step: int, stage: Stage) -> bool:
        """Whether a step's memory is thin, the same in every process. Short talks stay raw."""
        if stage.length <= max(NEARBY):
            return False
        return random.Random(f"{self.args.seed} thin {step}").random() < self.args.thin

    def forward(self, ids: Tensor, seen: Tensor | None) -> list[Tensor]:
        """What each layer reads, and last the final hidden state, all (B, T, D).

        `seen` (B, 1, T, T): which tokens see which; None: all those before them.
        """
        model = self.model.model
        states = [model.embed_tokens(ids)]
        places = model.rotary_emb(states[0], torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in model.layers:
            states.append(layer(states[-1], attention_mask=seen, position_embeddings=places))
        return [*states[:-1], model.norm(states[-1])]

    def learn(self, body: Any, rng: random.Random, stage: Stage) -> Losses:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate
        drawn = batch(rng, "train", self.train, self.tokenizer, stage, stage.rows)
        seen = None
        if self.thins(self.step, stage):
            seen = drawn.thinned(rng).to(self.device)
        drawn = drawn.to(self.device)
        ids, answers, real = drawn.ids, drawn.answers, drawn.real
        with torch.autocast(self.device.type, torch.bfloat16):
            *streams, hidden = body(ids, seen)
            hidden = hidden[:, :-1]
            target, answer = ids[:, 1:], answers[:, 1:]
            other = real[:, 1:] & ~answer & (torch.rand(target.shape) < 0.25).to(self.device)
            head = self.model.lm_head.weight
            on_answer = F.cross_entropy(F.linear(hidden[answer], head).float(), target[answer])
            on_prose = F.cross_entropy(F.linear(hidden[other], head).float(), target[other])
            loss = on_answer + self.args.prose_weight * on_prose
            asked = {}
            if self.restated is not None:
                asked = self.asked_of_attention(streams, drawn.lookups, seen)
                loss = loss + self.args.lookup_weight * sum(asked.values())
        loss.backward()
        if dist.is_initialized():
            for q in self.model.parameters():
                dist.all_reduce(q.grad, dist.ReduceOp.SUM)
                q.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seen += int(real.sum()) * (dist.get_world_size() if dist.is_initialized() else 1)
        return {
            "answer": on_answer.item(), "prose": on_prose.item(),
            **{name: part.item() for name, part in asked.items()},
        }  # fmt: skip

    def asked_of_attention(
        self, streams: list[Tensor], lookups: Lookups, seen: Tensor | None
    ) -> dict[str, Tensor]:
        """What `lookups.py` makes of the layers' inputs; `streams` as `forward` returns them."""
        model, copies, onward = self.model, lookups.copies, lookups.onward
        looked = partial(lookup_loss, seen=seen)
        first, final, last = streams[LOOKUP], streams[-1], len(streams) - 1
        parts = {
            "found": looked(model, LOOKUP, first, lookups.mentions, every_token=True)
            + looked(model, LOOKUP, first, onward),
            "chosen": looked(model, last, final, copies, every_head=True),
            "onward": looked(model, last, final, onward, every_head=True),
            "subject": looked(model, last, final, lookups.subjects),
            "restated": restated_loss(final, self.restated, lookups),
        }
        if self.again:  # as look_again.py divides the heads of the layer before the last
            group = model.config.num_attention_heads // model.config.num_key_value_heads
            x, n, those = streams[last - 1], last - 1, slice(0, group)
            parts["again"] = looked(model, n, x, copies, heads=those)
            parts["onward"] = parts["onward"] + looked(model, n, x, onward, heads=those)
            parts["unsaid"] = looked(
                model, n, x, lookups.said, heads=slice(group + 1, None), every_token=True
            )
        return parts

    def report(self, stage: Stage, losses: list[Losses], score: float) -> None:
        means = {name: sum(x[name] for x in losses) / len(losses) for name in losses[0]}
        row = {
            "step": self.step, "minutes": round(self.spent, 2), "length": stage.length,
            **{name: round(mean, 4) for name, mean in means.items()},
            "exact": round(score, 4), "tokens": self.seen,
        }  # fmt: skip
        with (self.args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
        self.save()

    def save(self) -> None:
        self.model.save_pretrained(self.args.out)
        if self.restated is not None:
            laid = {"again": torch.ones(1)} if self.again else {}
            save_file({"restated": self.restated, **laid}, self.args.out / RESTATED)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            **{name: getattr(self, name) for name in ("stage", "step", "seen", "spent", "here")},
        }
        torch.save(state, self.args.out / "state.tmp")
        os.replace(self.args.out / "state.tmp", self.args.out / "state.pt")

    def resume(self) -> None:
        file = self.args.out / "state.pt"
        state = torch.load(file, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state.items():
            setattr(self, name, value)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--books", type=Path, required=True, help="a folder of plain texts")
    p.add_argument("--tokenizer", type=Path, default=Path("still_agent/reference/model"))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--init", type=Path, help="start from this folder's weights")
    p.add_argument("--prefer-recent", action="store_true", help="see structured_init.py")
    p.add_argument("--second-lookup", action="store_true", help="see second_lookup.py")
    p.add_argument("--look-again", action="store_true", help="see look_again.py")
    p.add_argument("--mixed", action="store_true", help="draw every step's stage, by its minutes")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="cpu")
    integers = {
        "d": 256, "ff": 512, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 64,
        "seed": 0, "threads": 2, "every": 50,
    }  # fmt: skip
    numbers = {
        "theta": 1e6, "lr": 1e-3, "decay": 0.6, "final": 0.03, "prose_weight": 0.3, "advance": 0.97,
        "lookup_weight": 0.1, "thin": 0.0,
    }  # fmt: skip
    for name, value in {**integers, **numbers}.items():
        p.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    p.add_argument(
        "--stages",
        default="160,3,3,24,4,1;384,3,6,16,15,0.7;768,6,14,8,15,0.5;1536,10,34,4,15,0.3;"
        "2048,8,44,3,20,0.2",
        help="length,fewest facts,most facts,rows,minutes,share without prose; ...",
    )
    args = p.parse_args()
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    run = Run(args)
    print(f"{sum(q.numel() for q in run.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if args.resume:
        run.resume()
    run.go()


if __name__ == "__main__":
    main()
