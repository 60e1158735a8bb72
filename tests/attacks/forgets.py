"""Random histories that end in forgetting; then every byte is searched for what was forgotten.

    python -m tests.attacks.forgets --histories 200
    python -m tests.attacks.forgets --kills 100

A history is of sessions, forks, rewinds, drafts, exports that come back, deletions and prunes,
by two that have the store open. Each turn says a word that nobody else says and has ids that
nobody else has; each span has tensors of its own. At its end a turn is forgotten, or a session
erased, while another process reads. Whatever no session leads to then, of all that ever was in
the store, must be in none of its files; and what is left must be there, or the search is blind.

With --kills the one who forgets is killed at any moment. Whoever opens the store next must find
it as it was, or all of it forgotten and not a byte of it left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import string
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from still_memory.check import check_store
from still_memory.checkpoint import Checkpoint, Entry
from still_memory.portable import Portable
from still_memory.records import Head, NewTurn, unpack_ids
from still_memory.retention import Retention
from still_memory.store import MemoryStore
from still_memory.taint import Forks, Later
from tests.attacks import traces
from tests.attacks.states import MODEL, compact_span, raw_span

BEFORE = 0.05  # seconds that the one who reads is given to begin


@dataclass
class Said:
    """All that was ever put into a store, as it would be found in its bytes."""

    words: set[str] = field(default_factory=set)
    tokens: set[tuple[int, ...]] = field(default_factory=set)
    layers: dict[str, set[bytes]] = field(default_factory=dict)  # by the span's address


class History:
    """A store that is filled at random, and what was put into it."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance, self.said = path, chance, Said()
        self.stores = [self._open(), self._open()]
        self._count = 0

    def _open(self) -> MemoryStore:
        return MemoryStore(self.path, synchronous="NORMAL", keep_checkpoints=2)

    def close(self) -> None:
        for store in self.stores:
            store.close()

    @property
    def store(self) -> MemoryStore:
        return self.chance.choice(self.stores)

    @property
    def names(self) -> list[str]:
        return [info.name for info in self.stores[0].sessions()]

    def head(self, name: str) -> Head:
        head = self.stores[0].head(name)
        assert head is not None
        return head

    def turn(self) -> NewTurn:
        word = "".join(self.chance.choices(string.ascii_lowercase, k=14))
        tokens = tuple(self.chance.randrange(2**16, 2**32) for _ in range(8))
        self.said.words.add(word)
        self.said.tokens.add(tokens)
        prose = " ".join(
            self.chance.choices(["heron", "key", "brass"], k=self.chance.choice([3, 2000]))
        )
        return NewTurn(self.chance.choice(["user", "assistant"]), f"{prose} {word}", list(tokens))

    def state(self) -> Checkpoint:
        """Spans that no other state has, but for the pinned one."""
        size = self.chance.choice([8, 400])  # slots: some in a page, some in many
        seeds = [self.chance.randrange(1, 2**31) for _ in range(2)]
        pinned = raw_span(0, 16, 0, width=16)
        memory = compact_span(16, 100, size, seeds[0], width=16)
        tail = raw_span(100, 124, seeds[1], width=16)
        return Checkpoint(
            (
                Entry(pinned, 0, 16, 0, "pinned"),
                Entry(memory, 16, 100, 16, "memory", 1),
                Entry(tail, 100, 124, 16 + size, "tail"),
            ),
            124,
        )

    def past(self, name: str) -> Head:
        """The session's head at one of its turns."""
        head = self.head(name)
        way = [None, *(turn.id for turn in self.store.history(head))]
        at = self.chance.randrange(len(way))
        return replace(head, turn=way[at], turns=at)

    def step(self) -> None:
        chance, name = self.chance, self.chance.choice([*self.names, ""])
        verb = chance.choice(
            ["say", "say", "say", "fork", "rewind", "draft", "copy", "delete", "prune", "reopen"]
        )
        if not name:
            turns = [self.turn()]
            self.store.create(
                self._name(), MODEL, checkpoint=self.state(), turns=turns, settings={}
            )
        elif verb == "say":
            turns = [self.turn() for _ in range(chance.randint(1, 3))]
            self.store.commit(self.head(name), self.state(), turns)
        elif verb == "fork":
            self.store.fork(self.past(name), self._name(), self.state())
        elif verb == "rewind":
            self.store.commit(self.past(name), self.state(), [])
        elif verb == "draft":
            self.store.discard_draft(self.head(name))
            made = replace(self.past(name), settings={"parts": {}})
            self.store.save_draft(self.head(name), made, self.state(), [self.turn()])
        elif verb == "copy":
            path = self.path.parent / "copy.still"
            path.unlink(missing_ok=True)
            Portable.of(self.store, name).write(path)
            Portable.read(path).save(self.store, self._name())
            path.unlink()
        elif verb == "delete" and len(self.names) > 2:
            self.store.delete(name)
        elif verb == "prune":
            self.store.prune(Retention(keep_checkpoints=1))
        elif verb == "reopen":
            place = chance.randrange(2)
            self.stores[place].close()
            self.stores[place] = self._open()
        self.note()

    def note(self) -> None:
        self.said.layers.update(traces.of_layers(self.path))

    def _name(self) -> str:
        self._count += 1
        return f"session {self._count}"


def forget(store: MemoryStore, turns: list[int], later: Later, state: Checkpoint) -> None:
    """What `Session.forget` does, with states that no model has computed."""
    made = []
    for taint in store.tainted(turns):
        head = store.ledger(taint.session)
        first = taint.forgotten[0]
        known = store.history(head)
        left = replace(
            head, turn=known[first - 2].id if first > 1 else None, turns=first - 1,
            settings={"without": [*turns]},
        )  # fmt: skip
        again = [
            NewTurn(t.role, t.text, t.tokens, t.usage, t.created)
            for t in known
            if later == "keep" and t.number in taint.later
        ]
        store.discard_draft(head)
        made.append((head, store.save_draft(head, left, state, again)))
    store.forget(turns, made)
    store.scrub()


def live(path: Path) -> Said:
    """What the rows say."""
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("select text, tokens from turns").fetchall()
    words = {text.rsplit(" ", 1)[1] for text, _ in rows}
    return Said(words, {tuple(unpack_ids(ids)) for _, ids in rows}, traces.of_layers(path))


def patterns(
    words: set[str], tokens: set[tuple[int, ...]], layers: list[set[bytes]]
) -> list[bytes]:
    told = [*map(traces.of_text, words), *map(traces.of_tokens, tokens)]
    return [*told, *(window for windows in layers for window in windows)]


def search(path: Path, said: Said) -> tuple[int, list[tuple[str, bytes]]]:
    """How many patterns were looked for that no row holds, and those that were found."""
    now = live(path)
    there = {window for windows in now.layers.values() for window in windows}
    gone = [w - there for address, w in said.layers.items() if address not in now.layers]
    dead = patterns(said.words - now.words, said.tokens - now.tokens, gone)
    sure = patterns(now.words, now.tokens, [set(list(w)[:1]) for w in now.layers.values()])
    assert {p for _, p in traces.hits(path, sure)} == set(sure), "the search is blind"
    return len(dead), traces.hits(path, dead)


def reader(path: Path) -> int:
    """A process that reads the store without end."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            store = MemoryStore(path)
            while os.getppid() == parent:
                for info in store.sessions():
                    store.history(info.name)
        os._exit(0)
    time.sleep(BEFORE)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def grown(path: Path, chance: random.Random, steps: int) -> History:
    history = History(path, chance)
    while len(history.names) < 2:
        history.step()
    for _ in range(steps):
        history.step()
    return history


def one(path: Path, chance: random.Random, steps: int, count: Counter[str]) -> None:
    """One history, and what it leaves."""
    history = grown(path, chance, steps)
    name = chance.choice(history.names)
    turns = history.store.history(name)
    count["found before, of what had gone by then"] += len(search(path, history.said)[1])
    pid = reader(path) if chance.random() < 0.25 else 0
    try:
        if turns and chance.random() < 0.75:
            chosen = chance.sample(turns, min(len(turns), chance.choice([1, 1, 2])))
            later: Later = chance.choice(["keep", "forget"])
            forget(history.store, [t.id for t in chosen], later, history.state())
            gone = {t.text for t in chosen}
            count[f"later={later}"] += 1
        else:
            forks: Forks = chance.choice(["keep", "delete"])
            history.store.delete(name, erase=True, forks=forks)
            history.store.scrub()
            left = {t.text for n in history.names for t in history.store.history(n)}
            gone = {t.text for t in turns} - left
            count[f"erased, forks={forks}"] += 1
        assert not {text.rsplit(" ", 1)[1] for text in gone} & live(path).words
        history.note()
    finally:
        if pid:
            end(pid)
            count["with a reader"] += 1
    looked, found = search(path, history.said)
    for name in history.names:  # every session has its state
        history.store.load(history.head(name))
    assert not found, f"{len(found)} of {looked}: {found[:3]}"
    count["histories"] += 1
    count["patterns"] += looked
    history.close()
    assert not check_store(path).findings


def killed(
    path: Path, chance: random.Random, steps: int, count: Counter[str], took: float
) -> float:
    """One history whose forgetting is killed; the seconds that one takes which is not."""
    history = grown(path, chance, steps)
    name = chance.choice([n for n in history.names if history.store.history(n)])
    chosen = chance.choice(history.store.history(name))
    before = {n: history.store.history(n) for n in history.names}
    later: Later = chance.choice(["keep", "forget"])
    state = history.state()
    history.close()
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            store = MemoryStore(path)
            os.write(out, b".")
            forget(store, [chosen.id], later, state)
            os.write(out, b".")
        os._exit(0)
    os.read(into, 1)
    began = time.monotonic()
    if took:
        time.sleep(chance.uniform(0, 1.1 * took))
    else:
        os.read(into, 1)
        took = time.monotonic() - began
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(into)
    os.close(out)
    marked = b"erasing" in b"".join(traces.files(path).values())
    history.stores = [history._open(), history._open()]
    now = {n: history.store.history(n) for n in history.names}
    for n in now:
        history.store.load(history.head(n))
    told = {t.text for turns in now.values() for t in turns}
    if chosen.text in told:
        assert now == before, "half forgotten"
        count["as it was"] += 1
    else:
        looked, found = search(path, history.said)
        assert not found, f"{len(found)} of {looked}: {found[:3]}"
        count["finished by the next to open" if marked else "forgotten"] += 1
        count["patterns"] += looked
    history.close()
    assert not check_store(path).findings
    count["kills"] += 1
    return took


def run(histories: int, kills: int, steps: int, seed: int) -> dict[str, object]:
    torch.set_num_threads(1)  # a fork has no other threads
    count = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for n in range(histories):
            place = Path(folder) / f"{n}"
            place.mkdir()
            one(place / "s.db", random.Random(1000 * seed + n), steps, count)
            if n % 20 == 19:
                print(dict(count), file=sys.stderr)
        took = 0.0
        for n in range(kills):
            place = Path(folder) / f"kill {n}"
            place.mkdir()
            took = killed(place / "s.db", random.Random(1000 * seed + n), steps, count, took)
    return {**count, "hits": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--histories", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(run(args.histories, args.kills, args.steps, args.seed)))


if __name__ == "__main__":
    main()
