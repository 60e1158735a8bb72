"""SIGKILL at random moments of turns: what was answered is there, bit for bit.

    python -m tests.attacks.kills --kills 300

Several processes hold a conversation each, in one store, with a tiny random Qwen3. Again and
again one of them is killed: at any moment, or in the midst of a commit.
Its session is then opened, while the others go on, and must be that of a session which never
stopped (in this process, without a file): the turns it answered, perhaps one more that it was
about to answer, the same ids, every byte of the saved state, and the same next logits. The
killed process is replaced by one that resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from still_agent.agent import Agent
from still_agent.budget import Budget
from still_agent.ephemeral import EphemeralStore
from still_agent.models import FrozenModel, load_model
from still_agent.sampling import Sampling
from still_agent.session import Session
from still_memory.checkpoint import Checkpoint
from still_memory.compactors import StreamingCompactor
from still_memory.records import Head, NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import check_file, mark
from tests.conftest import REFERENCE, TOKENIZER_FILES, tiny_model

BUDGET, SAMPLING = Budget(slots=64), Sampling(max_tokens=4)
IN_TURN = 0.1  # seconds


class TellingStore(MemoryStore):
    """Says when a commit begins and how long it took, so that it can be killed there."""

    into: int

    def commit(self, head: Head, checkpoint: Checkpoint, turns: Sequence[NewTurn]) -> Head:
        os.write(self.into, b"commit\n")
        began = time.monotonic()
        head = super().commit(head, checkpoint, turns)
        os.write(self.into, f"saved {time.monotonic() - began}\n".encode())
        return head


def tiny(folder: Path) -> FrozenModel:
    transformers.logging.disable_progress_bar()
    tiny_model().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((REFERENCE / name).read_bytes())
    return load_model(folder, device="cpu", dtype="float32")


def agent(model: FrozenModel, store: Any) -> Agent:
    return Agent(model, StreamingCompactor(), store, budget=BUDGET, sampling=SAMPLING)


def say(chat: Session) -> None:
    """The next message of a conversation, which no other conversation has."""
    chat.send(f"{chat.id}, message {chat.stats.turns}: the wind rose, the sea was grey.")


def next_logits(chat: Session) -> torch.Tensor:
    """What the model would say next, and the state as it was."""
    logits = chat._state.extend(chat._tokenizer.message("user", "And now?"))
    chat._put_back()
    return logits


class Talker:
    """A process that talks until it is killed, and what it has told."""

    took = 0.004  # seconds of the newest commit of any

    def __init__(self, model: FrozenModel, path: Path, name: str) -> None:
        self.name = name
        self.answered: tuple[int, str] | None = None  # turns, and its state's mark
        self._left = b""
        self._out, into = os.pipe()
        may, self._may = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._talk(model, path, into, may, parent)
        os.close(into)
        os.close(may)

    def _talk(self, model: FrozenModel, path: Path, into: int, may: int, parent: int) -> None:
        try:
            TellingStore.into = into
            chat = agent(model, TellingStore(path)).session(self.name, system="Brief.")
            while os.getppid() == parent:
                if not select.select([may], [], [], 1)[0]:
                    continue
                os.read(may, 1)
                say(chat)
                told = f"answered {chat.stats.turns} {mark(chat._saved)}\n"
                os.write(into, told.encode())
        except BaseException as error:
            os.write(into, f"failed {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)

    def let(self, turns: int) -> None:
        """So many turns may follow: what is checked must be computed twice."""
        os.write(self._may, b"." * turns)

    def hear(self, seconds: float) -> list[str]:
        """What it says next, waiting so long at most; empty when nothing came."""
        if not select.select([self._out], [], [], seconds)[0]:
            return []
        *lines, self._left = (self._left + os.read(self._out, 1 << 16)).split(b"\n")
        return [self._note(line.decode()) for line in lines]

    def _note(self, line: str) -> str:
        kind, _, rest = line.partition(" ")
        if kind == "failed":
            raise AssertionError(f"{self.name} stopped by itself: {rest}")
        if kind == "answered":
            turns, state = rest.split()
            self.answered = int(turns), state
        if kind == "saved":
            Talker.took = float(rest)
        return kind

    def until(self, kind: str) -> None:
        deadline = time.monotonic() + 60
        while kind not in self.hear(1):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} has not come to {kind!r} in a minute")

    def kill(self) -> None:
        """End it, and hear what it still told; once."""
        if not self.pid:
            return
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0
        while select.select([self._out], [], [], 0)[0]:
            data = os.read(self._out, 1 << 16)
            if not data:
                break
            *lines, self._left = (self._left + data).split(b"\n")
            for line in lines:
                self._note(line.decode())
        os.close(self._out)
        os.close(self._may)


class Steady:
    """The same conversation, never stopped and never saved."""

    def __init__(self, model: FrozenModel, name: str) -> None:
        self.chat = agent(model, EphemeralStore()).session(name, system="Brief.")
        self.marks = {1: mark(self.chat._saved)}

    def at(self, turns: int) -> Session:
        while self.chat.stats.turns < turns:
            say(self.chat)
            self.marks[self.chat.stats.turns] = mark(self.chat._saved)
        return self.chat


def check(model: FrozenModel, path: Path, killed: Talker, steady: Steady, known: int) -> int:
    """The turns of the killed one's session, all of them right; `known` were there before."""
    with agent(model, MemoryStore(path)) as other:
        head = other.store.head(killed.name)
        if head is None:
            assert known == 0 and killed.answered is None, f"{killed.name} is not there"
            return 0
        answered = max(known, killed.answered[0] if killed.answered else 1)
        assert head.turns in (answered, answered + 2), f"{head.turns} turns of {answered}"
        truth = steady.at(head.turns)
        if killed.answered:
            turns, state = killed.answered
            assert steady.marks[turns] == state, f"{killed.name}: turn {turns} was another"
        assert mark(other.store.load(head)) == steady.marks[head.turns], "another state"
        chat = other.session(killed.name)
        assert [t.tokens for t in chat.history()] == [t.tokens for t in truth.history()]
        assert torch.equal(next_logits(chat), next_logits(truth)), "other logits"
        return head.turns


def run(kills: int, processes: int, seed: int) -> dict[str, object]:
    torch.set_num_threads(1)  # a fork has no other threads
    chance, count, turns = random.Random(seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        model, path = tiny(Path(folder)), Path(folder) / "kills.db"
        MemoryStore(path).close()
        names = [f"session {n}" for n in range(processes)]
        steady = {name: Steady(model, name) for name in names}
        talking = {name: Talker(model, path, name) for name in names}
        try:
            for kill in range(1, kills + 1):
                victim, rival = (talking[name] for name in chance.sample(names, 2))
                rival.let(1)
                victim.let(3)
                if chance.random() < 0.5:
                    victim.until("commit")
                    where, pause = "in_commit", chance.uniform(0, 1.2 * Talker.took)
                else:
                    where, pause = "in_turn", chance.uniform(0, IN_TURN)
                    victim.hear(10)  # it may be resuming still; then it is killed in that
                time.sleep(pause)
                victim.kill()
                found = check(model, path, victim, steady[victim.name], turns[victim.name])
                count[where] += 1
                told = max(turns[victim.name], victim.answered[0] if victim.answered else 1)
                count["saved_and_not_answered"] += found > told
                turns[victim.name] = found
                talking[victim.name] = Talker(model, path, victim.name)
                if kill % 20 == 0 or kill == kills:
                    check_file(path)
                    print(f"{kill} kills: {dict(count)}", file=sys.stderr)
        finally:
            for talker in talking.values():
                talker.kill()
        rounds = max(s.chat.stats.rounds for s in steady.values())
    return {
        "kills": kills, "processes": processes, "turns": sum(turns.values()), "rounds": rounds,
        "lost": 0, "differing": 0, "corrupt": 0, **count,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    result = run(args.kills, args.processes, args.seed)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['kills']} kills of {result['processes']} processes, {result['turns']} turns:")
    print(f"{result['in_commit']} at a commit, {result['in_turn']} at any moment;")
    print(f"{result['saved_and_not_answered']} turns were saved and not yet answered.")
    print("Every answered turn was there, every state that of a session that never stopped.")


if __name__ == "__main__":
    main()
