"""Time to the first token of a reply: a resumed session against its history read again.

One process, one run, the model loaded and the weights hashed already; the variants take turns.
Resuming opens the store, checks every digest, fills the cache and takes in a short question.
Reading again takes in the ledger's tokens and the same question, in two ways: into the same
budget, compacting as the session did, and into a full cache of stock transformers, without
any compaction. Reported: the medians and both ratios; the smaller one is what we claim.

    python benchmarks/resume.py --tokens 8000
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from still_agent import Agent, Budget
from still_agent.compactor import choose_compactor
from still_agent.evaluation.trajectory import book
from still_agent.models import FrozenModel, load_model
from still_agent.rolling import PREFILL, RollingState
from still_agent.text import parts
from still_memory.compactors import Compactor
from still_memory.store import MemoryStore

QUESTION = "What was the girl's name?"
PAGE = 1_000  # tokens of one message


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--compactor", help="a folder or a training-free method")
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--schedule", default="rolling", choices=["rolling", "tiered"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


class Race:
    """One history, and three ways to the first token after it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.model: FrozenModel = load_model(args.model)
        self.compactor: Compactor = choose_compactor(args.compactor, args.model, self.model)
        self.budget = Budget(slots=args.slots, schedule=args.schedule)
        self.path = folder / "resume.db"
        tokenizer = self.model.tokenizer
        self.question = [*tokenizer.message("user", QUESTION), *tokenizer.reply_opening()]
        with self._agent() as agent:
            chat = agent.session("x")
            for page in parts(book(), tokenizer.encode, PAGE):
                chat.read(page)
                if chat.stats.logical_tokens >= args.tokens:
                    break
            self.history = [t for turn in chat.history() for t in turn.tokens]

    def _agent(self) -> Agent:
        store = MemoryStore(self.path)
        return Agent(self.model, self.compactor, store, budget=self.budget)

    def resume(self) -> float:
        began = time.perf_counter()
        agent = self._agent()
        # A piece comes when the next token is known, or the turn is saved: so two tokens.
        with agent, agent.session("x").stream(QUESTION, max_tokens=2) as pieces:
            next(pieces)
            return time.perf_counter() - began

    def read_again(self) -> float:
        began = time.perf_counter()
        state = RollingState(self.model, self.compactor, self.budget)
        state.pin(self.model.tokenizer.start)
        state.extend(self.history)
        state.extend(self.question).argmax().item()
        return time.perf_counter() - began

    @torch.inference_mode()
    def prefill_stock(self) -> float:
        began = time.perf_counter()
        cache = DynamicCache(config=self.model.model.config)
        ids = torch.tensor([[*self.model.tokenizer.start, *self.history, *self.question]])
        for chunk in ids.to(self.model.device).split(PREFILL, dim=1):
            logits = self.model.model(
                input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        logits.argmax().item()
        return time.perf_counter() - began


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        race = Race(args, Path(folder))
        ways = {"resume": race.resume, "same budget": race.read_again, "full": race.prefill_stock}
        race.resume()  # once, to warm up
        runs = [{name: run() for name, run in ways.items()} for _ in range(args.repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in ways}
    ratios = {name: median[name] / median["resume"] for name in ways if name != "resume"}
    if args.json:
        result = {"tokens": len(race.history), "seconds": median, "ratios": ratios}
        print(json.dumps({**result, "ratio": min(ratios.values())}))
        return
    print(f"time to the first token after {len(race.history):,} tokens in {args.slots:,} slots")
    print(f"  resumed from the store      {median['resume'] * 1e3:9.1f} ms")
    print(f"  read again, same budget     {median['same budget'] * 1e3:9.1f} ms")
    print(f"  read again, full cache      {median['full'] * 1e3:9.1f} ms")
    print(f"resume is x{min(ratios.values()):.1f} faster")


if __name__ == "__main__":
    main()
