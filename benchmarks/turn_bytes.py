"""Bytes put into the store for a turn: a x its tokens + b x the slots it produced, no more.

Reads messages of many sizes into one session and counts what each puts into rows (tensors,
text, token ids, the checkpoint), and what SQLite then writes to the file system for it: every
page that is touched, whole, once into the WAL and once out of it. A turn's slots are those of
the compact spans that stand after it and did not before. Fitted by least squares with two more
terms that may take what a and b do not explain: c for each turn (the list of entries: bounded
by the budget) and d for each token of history, which must be nothing.

    python benchmarks/turn_bytes.py --tokens 40000
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from still_agent import Agent, Budget
from still_agent.evaluation.trajectory import book
from still_memory.store import MemoryStore


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--compactor", help="a folder or a training-free method")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--schedule", default="rolling", choices=["rolling", "tiered"])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def to_files() -> int:
    """Bytes that this process has given to write calls so far (0 where Linux does not tell)."""
    try:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])
    except OSError:
        return 0


def messages() -> Iterator[str]:
    """Pieces of a book of 40 to 4,000 characters, without end."""
    rng, text, at = random.Random(0), " ".join(book().split()), 0
    while True:
        size = int(40 * 100 ** rng.random())
        yield text[at : at + size]
        at = (at + size) % (len(text) - 4000)


def measure(args: argparse.Namespace, path: Path) -> tuple[np.ndarray, int]:
    """A row a turn: tokens, slots produced, tokens before it, bytes in rows, bytes written.

    And the bytes of a slot.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    budget = Budget(slots=args.slots, schedule=args.schedule)
    with Agent.load(args.model, compactor=args.compactor, store=path, budget=budget) as agent:
        store, chat = agent.store, agent.session("x")
        assert isinstance(store, MemoryStore)

        def compact_spans() -> dict[tuple[int, int, int], int]:
            head = store.head("x")
            assert head is not None
            spans = [e.span for e in store.load(head).entries if not e.span.raw]
            return {(s.start, s.end, s.rounds): len(s) for s in spans}

        standing = compact_spans()
        for text in messages():
            history, written = chat.stats.logical_tokens, store.bytes_written
            begun = to_files()
            chat.read(text)
            in_files = to_files() - begun
            tokens, written = chat.stats.logical_tokens - history, store.bytes_written - written
            before, standing = standing, compact_spans()
            new = sum(slots for span, slots in standing.items() if span not in before)
            rows.append((tokens, new, history, written, in_files))
            if history + tokens >= args.tokens:
                return np.array(rows, dtype=float), agent.model.bytes_per_slot
    raise AssertionError("messages do not end")


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows, slot = measure(args, Path(folder) / "bytes.db")
    tokens, slots, history, written, in_files = rows.T
    # Raw tokens that a turn compacts again at once are never written: the fit is over turns
    # that keep all of theirs, and the bound must hold for every turn.
    kept = slots == 0
    terms = np.stack([tokens, np.ones_like(tokens), history], axis=1)
    (a, c, d), *_ = np.linalg.lstsq(terms[kept], written[kept], rcond=None)
    compacted = ~kept & (tokens < args.slots // 16)  # all their tokens are look-ahead
    b = float(np.median((written - a * tokens - c)[compacted] / slots[compacted]))
    over = (written / (a * tokens + b * slots + c)).max()
    share = abs(d) * history.max() / written.mean()
    result = {
        "a": a, "b": b, "c": c, "d": d, "bytes_per_slot": slot, "turns": len(rows),
        "largest_over_bound": over, "history_share": share,
        "file_bytes_a_turn": in_files.mean(), "row_bytes_a_turn": written.mean(),
        "file_bytes_late_over_early": in_files[len(rows) // 2 :].mean()
        / max(in_files[: len(rows) // 2].mean(), 1.0),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
        return
    print(f"{len(rows):,} turns, {history.max():,.0f} tokens; a slot's keys and values: {slot:,} B")
    print(f"bytes = {a:,.0f} x tokens + {b:,.0f} x slots produced + {c:,.0f}")
    print(f"the largest turn is x{over:.2f} of that")
    print(
        f"to the file system: {in_files.mean():,.0f} B a turn, "
        f"x{in_files.sum() / written.sum():.2f} of its rows; "
        f"second half of the turns over the first: x{result['file_bytes_late_over_early']:.2f}"
    )
    print(
        f"history: {d:+.4f} bytes for each token, at the end {share:.2%} of an average turn's bytes"
    )


if __name__ == "__main__":
    main()
