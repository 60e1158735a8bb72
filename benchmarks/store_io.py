"""Throughput of the store against a plain file: a state saved, and a state resumed.

The plain file is the best that could be done without a database: the same tensors encoded the
same way, a digest of the same kind of each layer, one new file, written and synced; then read,
checked and decoded. The store does all that it does for a turn: the commit is synced
(`synchronous=FULL`), older checkpoints are collected, and now and then the log goes into the
file. Both take turns, in one process, on one disk. Reported, for each size: medians, and the
plain file's time over the store's (1 is as fast; the goal is 0.7). The mean counts the saves
that move the log too; processor times are what other work on the machine does not change. The
opening of the store is not in it: store_scale.py has that.

    python benchmarks/store_io.py --megabytes 1 4 16

With --encrypted each size is measured once more with an encrypted store, against the same plain
file, which is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

import torch

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.codec import decode, encode
from still_memory.identity import ModelIdentity
from still_memory.records import NewTurn
from still_memory.span import Slots, Span, raw_slots
from still_memory.store import MemoryStore

MODEL = ModelIdentity(
    name="none", weights="w", config="c", tokenizer="t", template="x", dtype="float32"
)
LAYERS, HEADS, WIDTH = 8, 4, 64
BYTES_A_TOKEN = LAYERS * HEADS * (2 * WIDTH + 1) * 4


def raw_span(start: int, end: int, seed: int) -> Span:
    """Tokens `[start, end)` as slots of random content."""
    chance = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(LAYERS):
        keys, values = torch.randn(2, HEADS, end - start, WIDTH, generator=chance)
        layers.append(raw_slots(keys, values, start))
    return Span(start, end, tuple(layers), rotated_at=start, ids=tuple(range(start, end)))


def tail_of(spans: list[Span]) -> Checkpoint:
    """A state of raw spans, one after another from token 0 on."""
    entries = tuple(Entry(s, s.start, s.end, s.start, "tail") for s in spans)
    return Checkpoint(entries, spans[-1].end)


def save_plainly(span: Span, path: Path) -> None:
    with open(path, "wb") as file:
        for slots in span.layers:
            data = encode(slots)
            file.write(len(data).to_bytes(8, "little"))
            file.write(hashlib.blake2b(data, key=b"k" * 32, digest_size=32).digest())
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)  # so that the new name is on disk too
    os.fsync(folder)
    os.close(folder)


def read_plainly(path: Path) -> list[Slots]:
    layers = []
    with open(path, "rb") as file:
        while length := int.from_bytes(file.read(8), "little"):
            mark, data = file.read(32), file.read(length)
            assert hashlib.blake2b(data, key=b"k" * 32, digest_size=32).digest() == mark
            layers.append(decode(data, "a layer"))
    return layers


def compare(
    folder: Path, megabytes: float, repeats: int, key: bytes | None = None
) -> dict[str, float]:
    tokens = max(1, int(megabytes * 1e6 / BYTES_A_TOKEN))
    names = ("save", "file", "resume", "read")
    seconds: dict[str, list[float]] = {n: [] for n in names}
    computed: dict[str, list[float]] = {n: [] for n in names}
    name = f"{megabytes} {'plain' if key is None else 'encrypted'}"
    path, plain = folder / f"{name}.db", folder / f"{name}.plain"

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def timed(name: str, began: tuple[float, float]) -> None:
        ended = now()
        seconds[name].append(ended[0] - began[0])
        computed[name].append(ended[1] - began[1])

    store = MemoryStore(path, key=key)
    head = store.create("x", MODEL, checkpoint=tail_of([raw_span(0, 1, 0)]), turns=[], settings={})
    for n in range(repeats + 1):
        span = raw_span(0, tokens, n)
        began = now()
        head = store.commit(head, tail_of([span]), [NewTurn("user", "hello", [1])])
        timed("save", began)
        began = now()
        save_plainly(span, plain)
        timed("file", began)
        other = MemoryStore(path, key=key)  # which knows nothing of it yet
        began = now()
        found = other.head("x")
        assert found is not None
        (entry,) = other.load(found).entries
        timed("resume", began)
        other.close()
        began = now()
        layers = read_plainly(plain)
        timed("read", began)
        assert torch.equal(layers[0].keys, entry.span.layers[0].keys)
    store.close()
    warm = {name: taken[1:] for name, taken in seconds.items()}  # the first makes the files
    size = sum(len(encode(slots)) for slots in span.layers)
    median = {name: statistics.median(taken) for name, taken in warm.items()}
    cpu = {name: statistics.median(taken[1:]) for name, taken in computed.items()}
    return {
        "encrypted": store.encrypted,
        "bytes": size,
        **{f"{name}_ms": 1e3 * median[name] for name in median},
        "save_mb_a_second": size / 1e6 / median["save"],
        "resume_mb_a_second": size / 1e6 / median["resume"],
        "save_ratio": median["file"] / median["save"],
        "save_ratio_of_means": sum(warm["file"]) / sum(warm["save"]),
        "resume_ratio": median["read"] / median["resume"],
        "resume_ratio_of_processor_times": cpu["read"] / cpu["resume"],
        "save_ratio_of_processor_times": cpu["file"] / cpu["save"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--encrypted", action="store_true", help="an encrypted store too")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        keys = [None, secrets.token_bytes(32)] if args.encrypted else [None]
        rows = [
            compare(Path(folder), size, args.repeats, key)
            for size in args.megabytes
            for key in keys
        ]
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        kind = ", encrypted" if row["encrypted"] else ""
        print(
            f"{row['bytes'] / 1e6:6.1f} MB{kind}: save {row['save_ms']:7.1f} ms, file "
            f"{row['file_ms']:7.1f} ms, ratio {row['save_ratio']:.2f} (of means "
            f"{row['save_ratio_of_means']:.2f}); resume {row['resume_ms']:6.1f} ms, file "
            f"{row['read_ms']:6.1f} ms, ratio {row['resume_ratio']:.2f}; of processor times "
            f"{row['save_ratio_of_processor_times']:.2f}, "
            f"{row['resume_ratio_of_processor_times']:.2f}"
        )


if __name__ == "__main__":
    main()
