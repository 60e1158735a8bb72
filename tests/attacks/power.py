"""The power fails: what was not synced is lost, in part or whole, and the store opens.

    python -m tests.attacks.power --cuts 400

Everything that SQLite asks of the disk while a store is used is recorded (see vfs.py). Then, at
many moments, the files are made as a disk might have left them: what was synced is there; of
what was written since, nothing, all, a random part in any order, or writes torn at a sector.
Such a store must open, be whole, and show all sessions as they were at one moment:

    synchronous=FULL      of the last verb that had returned, or of the one that was under way
    synchronous=NORMAL    no older than the last verb that had returned when the log was synced
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from still_memory.errors import StillError
from still_memory.records import NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, check_file, mark, state, told
from tests.attacks.vfs import Event, recorded

SECTOR = 512
Moment = dict[str, tuple[str, tuple[object, ...]]]  # state and turns of each session


@dataclass
class Disk:
    """What is on it for certain, and what was asked of it since, file by file.

    SQLite syncs the folder with the first sync of a new log or journal, and then deletions are
    certain too.
    """

    durable: dict[str, bytes] = field(default_factory=dict)
    pending: dict[str, list[Event]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        self.pending.setdefault(event.file, []).append(event)
        if event.kind == "sync":
            if event.file not in self.durable or self._deleted(event.file):
                for file in list(filter(self._deleted, self.pending)):
                    self._settle(file)
            self._settle(event.file)

    def _deleted(self, file: str) -> bool:
        return any(event.kind == "delete" for event in self.pending.get(file, ()))

    def after_a_cut(self, chance: random.Random) -> dict[str, bytes]:
        """The files as they may be found."""
        found = dict(self.durable)
        for file, events in self.pending.items():
            how = chance.choice(["nothing", "all", "some", "first", "torn"])
            if how == "nothing":
                continue
            if how == "some":
                events = [e for e in events if chance.random() < 0.5]
            elif how == "first":
                events = events[: chance.randrange(len(events) + 1)]
            elif how == "torn":
                events = [e for event in events for e in _torn(event, chance)]
            data = _applied(found.pop(file, None), events)
            if data is not None:
                found[file] = data
        return found

    def _settle(self, file: str) -> None:
        data = _applied(self.durable.pop(file, None), self.pending.pop(file, []))
        if data is not None:
            self.durable[file] = data


def _applied(data: bytes | None, events: list[Event]) -> bytes | None:
    now = None if data is None else bytearray(data)
    for event in events:
        if event.kind == "delete":
            now = None
            continue
        if now is None:
            now = bytearray()
        if event.kind == "write":
            now.extend(bytes(max(0, event.at - len(now))))
            now[event.at : event.at + len(event.data)] = event.data
        elif event.kind == "truncate":
            del now[event.at :]
    return None if now is None else bytes(now)


def _torn(event: Event, chance: random.Random) -> list[Event]:
    """A write of which some sectors have arrived."""
    if event.kind != "write":
        return [event]
    first = -event.at % SECTOR
    cuts = [0, *range(first or SECTOR, len(event.data), SECTOR), len(event.data)]
    return [
        Event("write", event.file, event.at + low, event.data[low:high])
        for low, high in pairwise(cuts)
        if chance.random() < 0.7
    ]


def moment(store: MemoryStore) -> Moment:
    found: Moment = {}
    for info in store.sessions():
        head = store.head(info.name)
        assert head is not None
        found[info.name] = mark(store.load(head)), tuple(t[2] for t in told(store, info.name))
    return found


def live(path: Path, synchronous: str, verbs: int, seed: int) -> tuple[list[Event], list[Moment]]:
    """Use a store; each event, and what the store shows after each verb that has returned."""
    chance, events, moments = random.Random(seed), list[Event](), list[Moment]()
    with recorded(events):
        store = MemoryStore(path, synchronous=synchronous)
        moments.append({})
        events.append(Event("returned"))
        for n in range(verbs):
            name, kind = chance.choice("abc"), chance.random()
            head = store.head(name)
            turn = NewTurn("user", f"{name}, verb {n}", [n])
            if head is None:
                store.create(name, MODEL, checkpoint=state(n), turns=[turn], settings={})
            elif kind < 0.1:
                store.delete(name)
            elif kind < 0.2:  # a rewind to where a kept checkpoint stands
                past = store.kept(head)[-1]
                here = head.__class__(**{**vars(head), "turn": past.turn, "turns": past.turns})
                store.commit(here, store.load(past), [])
            else:
                store.commit(head, state(n, chance.choice([30, 300, 3000])), [turn])
            if chance.random() < 0.08:  # all of the log goes into the file, and the log away
                store.close()
                store = MemoryStore(path, synchronous=synchronous)
            moments.append(moment(store))
            events.append(Event("returned"))
        store.close()
    return [e for e in events if e.kind == "returned" or e.file], moments


def judge(folder: Path, files: dict[str, bytes], name: str, allowed: list[Moment]) -> str:
    """`right`, or what is wrong with what was found."""
    for leftover in folder.iterdir():
        leftover.unlink()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    try:
        with MemoryStore(folder / name) as store:
            if (found := moment(store)) not in allowed:
                return f"shows {sorted(found)}, which is none of {len(allowed)} moments"
        check_file(folder / name)
    except (StillError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def run(cuts: int, verbs: int, synchronous: str, seed: int) -> dict[str, object]:
    chance, count, wrong = random.Random(seed), Counter[str](), list[str]()
    shared = Path("/dev/shm")  # found files are written for each cut: no disk need see them
    with (
        tempfile.TemporaryDirectory() as used,
        tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as found,
    ):
        path = Path(used) / "power.db"
        events, moments = live(path, synchronous, verbs, seed)
        first = next(n for n, e in enumerate(events) if e.kind == "returned")
        points = sorted(chance.randrange(first, len(events)) for _ in range(cuts))
        disk, returned, certain, at = Disk(), -1, 0, 0
        for point in points:
            for event in events[at : point + 1]:
                if event.kind == "returned":
                    returned += 1
                    continue
                disk.take(event)
                if event.kind == "sync" and event.file.endswith("-wal"):
                    certain = max(certain, returned)
            at = point + 1
            oldest = returned if synchronous == "FULL" else certain
            allowed = moments[oldest : returned + 2]
            files = disk.after_a_cut(chance)
            verdict = judge(Path(found), files, path.name, allowed)
            count["right" if verdict == "right" else "wrong"] += 1
            count["could_lose"] += len(allowed) > 2
            if verdict != "right":
                wrong.append(f"after event {point}, verb {returned}: {verdict}")
    syncs = Counter(e.file for e in events if e.kind == "sync")
    return {
        "synchronous": synchronous, "cuts": cuts, "verbs": verbs, "events": len(events),
        "syncs": sum(syncs.values()), "right": count["right"], "wrong": count["wrong"],
        "could_lose": count["could_lose"], "wrong_ones": wrong,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cuts", type=int, default=400, help="of each setting")
    parser.add_argument("--verbs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    results = [run(args.cuts, args.verbs, how, args.seed) for how in ("FULL", "NORMAL")]
    if args.json:
        print(json.dumps(results))
        return
    for result in results:
        print(
            f"{result['synchronous']}: {result['cuts']} cuts in {result['verbs']} verbs, "
            f"{result['events']:,} writes and syncs ({result['syncs']} syncs): "
            f"{result['right']} right, {result['wrong']} wrong"
        )
        for line in result["wrong_ones"][:20]:  # type: ignore[index]
            print(" ", line)
    sys.exit(any(result["wrong"] for result in results))


if __name__ == "__main__":
    main()
