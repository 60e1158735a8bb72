"""Many processes write to one store at once: nothing is lost, nothing is mixed.

    python -m tests.attacks.rivals --processes 8 --sessions 8 --turns 1000

Twice. First each process has that many sessions of its own. Then all share that many, and race
for their heads: who loses is told (ConflictError), follows and repeats. Afterwards every session
must hold each turn that was acknowledged, once, in the order of the generations that were told,
with the very ids, and the state of its last turn. Reported: how long a commit took, the wait for
other writers included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from still_memory.errors import ConflictError
from still_memory.records import NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, check_file, mark, state

LENGTH = 300  # tokens of a state


def text(process: int, session: str, turn: int) -> str:
    return f"process {process} tells {session} of turn {turn}"


def work(path: Path, process: int, names: list[str], turns: int, synchronous: str) -> str:
    """Commit so many turns; what was acknowledged, as JSON."""
    chance, told, conflicts = random.Random(process), [], 0
    torch.set_num_threads(1)
    with MemoryStore(path, synchronous=synchronous, timeout=300) as store:
        for turn in range(turns):
            name = chance.choice(names)
            while True:
                head = store.head(name)
                assert head is not None
                seed = 1000 * process + turn
                new = NewTurn("user", text(process, name, turn), [process, turn])
                now, began = state(seed, LENGTH), time.perf_counter()
                try:
                    head = store.commit(head, now, [new])
                except ConflictError:
                    conflicts += 1
                    continue
                told.append((name, head.generation, seed, turn, time.perf_counter() - began))
                break
    return json.dumps({"process": process, "told": told, "conflicts": conflicts})


def _fork(path: Path, process: int, names: list[str], turns: int, how: str) -> tuple[int, int]:
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with open(into, "w") as pipe:
                pipe.write(work(path, process, names, turns, how))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(into)
    return pid, out


def race(path: Path, processes: int, names: list[list[str]], turns: int, how: str) -> dict:  # type: ignore[type-arg]
    """All at once, then every turn looked for. AssertionError for one that is not as told."""
    with MemoryStore(path, synchronous=how) as store:
        for name in sorted({name for mine in names for name in mine}):
            store.create(name, MODEL, checkpoint=state(0, LENGTH), turns=[], settings={})
    began = time.perf_counter()
    shares = [turns // processes + (n < turns % processes) for n in range(processes)]
    running = [_fork(path, n, names[n], shares[n], how) for n in range(processes)]
    found = []
    for pid, out in running:
        with open(out) as pipe:
            found.append(json.loads(pipe.read() or '{"told": [], "conflicts": 0, "process": -1}'))
        os.waitpid(pid, 0)
    seconds = time.perf_counter() - began
    right: dict[str, dict[int, tuple[int, int, int]]] = {}
    waits = []
    for answer in found:
        for name, generation, seed, turn, wait in answer["told"]:
            here = right.setdefault(name, {})
            assert generation not in here, f"two writers were told {name} {generation}"
            here[generation] = answer["process"], turn, seed
            waits.append(wait)
    assert len(waits) == turns, f"{turns - len(waits)} turns were not acknowledged"
    with MemoryStore(path) as store:
        for name, here in right.items():
            head = store.head(name)
            assert head is not None and head.generation == max(here) == len(here) + 1
            last = [here[generation] for generation in sorted(here)]
            said = [(t.text, t.tokens) for t in store.history(head)]
            assert said == [(text(p, name, turn), [p, turn]) for p, turn, _ in last], name
            assert mark(store.load(head)) == mark(state(last[-1][2], LENGTH)), name
        assert store.stats().turns == turns
    check_file(path)
    waits.sort()
    return {
        "processes": processes, "sessions": len(right), "turns": turns, "seconds": seconds,
        "conflicts": sum(a["conflicts"] for a in found),
        **{f"p{p}_ms": 1e3 * waits[min(turns - 1, turns * p // 100)] for p in (50, 95, 99)},
        "longest_ms": 1e3 * waits[-1], "writers": len(Counter(a["process"] for a in found)),
    }  # fmt: skip


def run(processes: int, sessions: int, turns: int, how: str) -> dict[str, dict]:  # type: ignore[type-arg]
    own = [[f"{p}/{s}" for s in range(sessions)] for p in range(processes)]
    shared = [[f"shared {s}" for s in range(sessions)]] * processes
    results = {}
    for kind, names, count in (("alone", own[:1], 1), ("own", own, 0), ("shared", shared, 0)):
        with tempfile.TemporaryDirectory() as folder:
            some = turns if not count else max(1, turns // 8)
            path = Path(folder) / "rivals.db"
            results[kind] = race(path, count or processes, names, some, how)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--synchronous", default="FULL", choices=["FULL", "NORMAL"])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    results = run(args.processes, args.sessions, args.turns, args.synchronous)
    if args.json:
        print(json.dumps(results))
        return
    for kind, found in results.items():
        print(
            f"{kind:>6}: {found['processes']} processes, {found['sessions']} sessions, "
            f"{found['turns']:,} turns in {found['seconds']:.1f} s; a commit takes "
            f"{found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f}, longest "
            f"{found['longest_ms']:.0f}; {found['conflicts']} conflicts told"
        )
    print("Nothing lost, nothing mixed.")


if __name__ == "__main__":
    main()
