"""Slots and resident memory while a conversation grows: both must stay flat.

Reads a book over and over into one session with a store, and looks at the process at 5,000
tokens, 10,000, and so on. Reported: the largest resident memory from the first look on, over
that of the first; and the same for the slots, whose bound is the budget.

    python benchmarks/flat.py --tokens 100000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

from still_agent import Agent, Budget
from still_agent.evaluation.trajectory import book
from still_agent.text import parts

LOOK_EVERY = 5_000  # tokens
PAGE = 1_000  # tokens of one message


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--compactor", help="a folder or a training-free method")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--schedule", default="rolling", choices=["rolling", "tiered"])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def resident() -> int:
    """Bytes of this process in memory now (Linux; elsewhere the most there ever were)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    budget = Budget(slots=args.slots, schedule=args.schedule)
    looks: list[dict[str, float]] = []
    began = time.perf_counter()
    with Agent.load(
        args.model, compactor=args.compactor, store=folder / "flat.db", budget=budget
    ) as agent:
        chat = agent.session("flat")
        most = 0
        for page in cycle(list(parts(book(), agent.model.tokenizer.encode, PAGE))):
            chat.read(page)
            stats = chat.stats
            most = max(most, stats.slots)
            if stats.logical_tokens < (len(looks) + 1) * LOOK_EVERY:
                continue
            looks.append(
                {
                    "tokens": stats.logical_tokens,
                    "slots": most,
                    "held_mb": stats.held_bytes / 1e6,
                    "full_mb": stats.full_bytes / 1e6,
                    "resident_mb": resident() / 1e6,
                    "tokens_per_second": stats.logical_tokens / (time.perf_counter() - began),
                }
            )
            if not args.json:
                print("  ".join(f"{name} {value:10,.1f}" for name, value in looks[-1].items()))
            if stats.logical_tokens >= args.tokens:
                return looks
    raise AssertionError("a cycle does not end")


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        looks = measure(args, Path(folder))
    first = looks[0]
    grown = {name: max(x[name] for x in looks) / first[name] for name in ("slots", "resident_mb")}
    if args.json:
        print(json.dumps({"looks": looks, "growth": grown}))
        return
    print(
        f"from {first['tokens']:,} to {looks[-1]['tokens']:,} tokens: slots x{grown['slots']:.2f}, "
        f"resident memory x{grown['resident_mb']:.2f} (a full cache: "
        f"x{looks[-1]['full_mb'] / first['full_mb']:.0f})"
    )


if __name__ == "__main__":
    main()
