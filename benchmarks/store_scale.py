"""What a store's size does not change: the save of a turn, and open, list and resume.

A turn of 20 tokens is saved in a session with 1,000 tokens of history and in one with 100,000,
each in a store of its own, in turns; reported are the bytes put into rows and given to the file
system, the medians, and their ratios (1 is the same). Then two stores, of 10 sessions and of
10,000: open, resume one, ask for one that is not there, and list, which is told for each session
too, since a longer list takes longer. These four are times of the processor.

    python benchmarks/store_scale.py --tokens 1000 100000 --sessions 10 10000
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from store_io import MODEL, raw_span, tail_of

from still_memory.checkpoint import Checkpoint
from still_memory.records import Head, NewTurn
from still_memory.store import MemoryStore

TURN = 20  # tokens
TAIL = 10  # turns that stay in the state: it is bounded, as a session's is
WORDS = "The wind rose and the sea was grey and long and nobody in the boat spoke of it"


def to_files() -> int:
    """Bytes that this process has given to write calls so far (0 where Linux does not tell)."""
    try:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])
    except OSError:
        return 0


class Talk:
    """A session whose history is as long as one wants, and its state bounded."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.turns = 0
        self.kept = [raw_span(TURN * n, TURN * (n + 1), n) for n in range(TAIL - 1)]
        with MemoryStore(path, synchronous="NORMAL") as fill:
            first = self._state()
            head = fill.create("x", MODEL, checkpoint=first, turns=[], settings={})
            while self.turns * TURN < tokens:
                some = [self._turn() for _ in range(min(100, tokens // TURN - self.turns + 1))]
                head = fill.commit(head, self._state(), some)
        self.head: Head = head
        self.store = MemoryStore(path)

    def _turn(self) -> NewTurn:
        self.turns += 1
        return NewTurn("user", f"{WORDS} {self.turns:09}", list(range(TURN)))

    def _state(self) -> Checkpoint:
        """What stays, and a new run of as many tokens as a turn has."""
        start = TURN * len(self.kept)
        return tail_of([*self.kept, raw_span(start, start + TURN, 100 + self.turns)])

    def save(self) -> tuple[float, int, int]:
        """Seconds, bytes in rows, and bytes to the file system of one more turn."""
        state, turn = self._state(), self._turn()
        rows, files, began = self.store.bytes_written, to_files(), time.perf_counter()
        self.head = self.store.commit(self.head, state, [turn])
        seconds = time.perf_counter() - began
        return seconds, self.store.bytes_written - rows, to_files() - files


def saves(folder: Path, lengths: list[int], repeats: int) -> dict[str, Any]:
    talks = {tokens: Talk(folder / f"{tokens}.db", tokens) for tokens in lengths}
    found: dict[int, list[tuple[float, int, int]]] = {tokens: [] for tokens in lengths}
    for _ in range(repeats):
        for tokens, talk in talks.items():
            found[tokens].append(talk.save())
    rows = {}
    for tokens, seen in found.items():
        talks[tokens].store.close()
        seconds, in_rows, in_files = zip(*seen, strict=True)
        quartiles = statistics.quantiles(seconds)
        rows[tokens] = {
            "ms": 1e3 * statistics.median(seconds), "row_bytes": statistics.median(in_rows),
            "file_bytes": statistics.median(in_files),
            "spread_ms": 1e3 * (quartiles[2] - quartiles[0]),
        }  # fmt: skip
    low, high = rows[min(lengths)], rows[max(lengths)]
    ratios = {key: high[key] / low[key] if low[key] else 0.0 for key in ("ms", "row_bytes")}
    files = high["file_bytes"] / low["file_bytes"] if low["file_bytes"] else 0.0
    return {"saves": rows, "ratios": {**ratios, "file_bytes": files}}


def filled(path: Path, sessions: int) -> Path:
    with MemoryStore(path, synchronous="NORMAL") as store:
        states = [tail_of([raw_span(0, 4, n)]) for n in range(10)]
        for n in range(sessions):
            turns = [NewTurn("user", f"{WORDS} {n}", [n])]
            store.create(f"session {n}", MODEL, checkpoint=states[n % 10], turns=turns, settings={})
    return path


def timed(work: Callable[[], object]) -> float:
    """Seconds of this process: no disk is waited for, and other work must not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def stores(folder: Path, counts: list[int], repeats: int) -> dict[str, Any]:
    paths = {count: filled(folder / f"{count} sessions.db", count) for count in counts}
    seconds: dict[int, dict[str, list[float]]] = {
        count: {n: [] for n in ("open", "resume", "absent", "list")} for count in counts
    }
    for n in range(repeats):
        for count, path in paths.items():
            here = seconds[count]
            began = time.process_time()
            store = MemoryStore(path)
            here["open"].append(time.process_time() - began)
            name = f"session {(n * 7919) % count}"

            def resume(store: MemoryStore = store, name: str = name) -> None:
                head = store.head(name)
                assert head is not None
                store.load(head)
                store.history(head)

            here["resume"].append(timed(resume))
            here["absent"].append(timed(lambda store=store: store.head("nobody")))
            here["list"].append(timed(store.sessions))
            store.close()
    rows = {
        count: {
            **{f"{verb}_ms": 1e3 * statistics.median(taken) for verb, taken in here.items()},
            "list_us_each": 1e6 * statistics.median(here["list"]) / count,
            "file_mb": paths[count].stat().st_size / 1e6,
        }
        for count, here in seconds.items()
    }
    low, high = rows[min(counts)], rows[max(counts)]
    return {"sessions": rows, "ratios": {key: high[key] / low[key] for key in low}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs=2, default=[1_000, 100_000])
    parser.add_argument("--sessions", type=int, nargs=2, default=[10, 10_000])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        turns = saves(Path(folder), args.tokens, args.repeats)
        many = stores(Path(folder), args.sessions, args.repeats)
    if args.json:
        print(json.dumps({"history": turns, "many": many}))
        return
    for tokens, row in turns["saves"].items():
        print(
            f"{tokens:>7,} tokens: a turn of {TURN} takes {row['ms']:6.2f} ms (quartiles "
            f"{row['spread_ms']:.2f} apart), {row['row_bytes']:,.0f} B in rows, "
            f"{row['file_bytes']:,.0f} B written"
        )
    print("  ratios:", *(f"{n} x{r:.3f}" for n, r in turns["ratios"].items()))
    for count, row in many["sessions"].items():
        print(
            f"{count:>7,} sessions: open {row['open_ms']:.2f} ms, resume {row['resume_ms']:.2f}, "
            f"ask for another {row['absent_ms']:.2f}, list {row['list_ms']:.2f} "
            f"({row['list_us_each']:.1f} us each), file {row['file_mb']:.1f} MB"
        )
    print("  ratios:", *(f"{n} x{r:.2f}" for n, r in many["ratios"].items()))


if __name__ == "__main__":
    main()
