"""A process that lives a trajectory: reads it, is killed, reads on, is asked.

The demo must show that a kill loses nothing, so the reading happens in a child process that
can really be killed. `Reader` is the parent's side: it starts the child and yields what it
reports, one JSON object a line. `live` is the child's: it resumes whatever the store holds,
goes on from there and asks at the end. Where it goes on follows from the ledger alone: a
step of the script is one user turn, and a turn is in the store or it is not.

Events, each with `kind`:

    opened      resumed, open_seconds, steps_done, steps
    compared    resuming against reading the same history again, in seconds
    turn        a step begins
    compaction  in mid-turn, with before and after (slots)
    read        the script is read: bytes held, rounds, turns
    answer      an `Answer`
    failed      a typed error

All but `compared`, `answer` and `failed` tell done (share of the script), tokens, slots, seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from still_agent.evaluation.trajectory import SYSTEM, Answer, Script, trajectory
from still_agent.schedule import ScheduleName
from still_memory import errors

if TYPE_CHECKING:
    from still_agent.agent import Agent
    from still_agent.events import Compaction
    from still_agent.session import Session

Event = dict[str, Any]
PROBE = "What did I say?"  # answered only as far as its first token, then undone


@dataclass(frozen=True)
class Reading:
    """One process's work."""

    store: str
    script: Script = field(default_factory=Script)
    model: str = "reference"
    compactor: str | None = None
    slots: int = 1024
    schedule: ScheduleName = "rolling"
    horizon: int | None = None
    codec: str | None = None  # of the store, if it is new
    session: str = "demo"
    compare: bool = False  # after opening, time the resume against reading the history again

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Reading:
        fields = json.loads(text)
        return cls(**{**fields, "script": Script(**fields["script"])})


class Reader:
    """A child process that lives a `Reading`; its messages to people go to `log`."""

    def __init__(self, reading: Reading, log: Path) -> None:
        self.log = log
        with log.open("ab") as notes:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "still_agent.evaluation.reader", reading.to_json()],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=notes, text=True,
                encoding="utf-8",
            )  # fmt: skip

    def events(self) -> Iterator[Event]:
        """What the child reports, until it ends. Its typed errors are raised here too; any other
        end than a good one is a RuntimeError with the last lines of its log."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["kind"] == "failed":
                raise getattr(errors, event["error"])(event["message"])
            yield event
        if status := self.process.wait():
            tail = self.log.read_text("utf-8", errors="replace").strip().splitlines()[-5:]
            raise RuntimeError("\n".join([f"the reader ended with status {status}", *tail]))

    def kill(self) -> int:
        """SIGKILL, at once: no handler runs, nothing is flushed. Returns its exit status."""
        self.process.kill()
        status = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def live(reading: Reading, emit: Callable[[Event], None]) -> None:
    """Resume or begin, read to the end of the script, then answer its questions."""
    from still_agent.evaluation.exam import LONGEST_REPLY, Exam

    told = trajectory(reading.script)
    lengths = [len(step.text) for step in told.steps]
    clock, done = time.perf_counter(), 0.0
    chat: Session | None = None

    def now(kind: str, **more: object) -> None:
        assert chat is not None
        stats, seconds = chat.stats, time.perf_counter() - clock
        emit({"kind": kind, "done": done, "tokens": stats.logical_tokens, "slots": stats.slots,
              "seconds": seconds, **more})  # fmt: skip

    def compacted(event: Compaction) -> None:
        now("compaction", before=event.slots_before, after=event.slots_after)

    with _agent(reading, compacted) as agent:
        resumed = any(info.name == reading.session for info in agent.sessions())
        compare = resumed and reading.compare
        first_token = _resume(agent, reading.session) if compare else 0.0
        clock = time.perf_counter()
        chat = agent.session(reading.session, system=SYSTEM)
        opened = time.perf_counter() - clock
        first = sum(turn.role == "user" for turn in chat.history())
        now("opened", resumed=resumed, steps_done=first, steps=len(lengths), open_seconds=opened)
        if compare:
            again = _read_again(agent, reading.session)
            emit({"kind": "compared", "first_token_seconds": first_token,
                  "reread_first_token_seconds": again})  # fmt: skip
        clock = time.perf_counter()
        for index in range(first, len(told.steps)):
            done = sum(lengths[:index]) / sum(lengths)
            now("turn")
            step = told.steps[index]
            if step.answered:
                chat.send(step.text, max_tokens=LONGEST_REPLY)
            else:
                chat.read(step.text)
        done, stats = 1.0, chat.stats
        now("read", rounds=stats.rounds, turns=stats.turns, held_bytes=stats.held_bytes,
            full_bytes=stats.full_bytes)  # fmt: skip
        exam = Exam(agent, reading.session)
        for asked in told.exam:
            answer = Answer.to(asked, exam.ask(asked.question.text))
            emit({"kind": "answer", **asdict(answer)})


def _agent(reading: Reading, on_compaction: Callable[[Compaction], None]) -> Agent:
    from still_agent.agent import Agent
    from still_agent.budget import Budget

    budget = Budget(slots=reading.slots, schedule=reading.schedule, horizon=reading.horizon)
    return Agent.load(
        reading.model, store=reading.store, budget=budget, compactor=reading.compactor,
        on_compaction=on_compaction, codec=reading.codec,
    )  # fmt: skip


def _resume(agent: Agent, session: str) -> float:
    """Seconds from nothing but a loaded model to the first token of a stored session's reply."""
    from still_agent.evaluation.exam import Exam

    clock = time.perf_counter()
    Exam(agent, session).ask(PROBE, max_tokens=1)
    return time.perf_counter() - clock


def _read_again(agent: Agent, session: str) -> float:
    """The same, without the stored spans: the very tokens of the ledger are taken in again.

    They are compacted as the session compacted them; nothing is decoded and nothing written.
    """
    from still_agent.rolling import RollingState

    turns, tokenizer = agent.store.history(session), agent.model.tokenizer
    clock = time.perf_counter()
    state = RollingState(agent.model, agent.compactor, agent.budget, codec=agent.store.codec)
    state.pin([*tokenizer.start, *turns[0].tokens])  # the system prompt
    for turn in turns[1:]:
        state.extend(turn.tokens)
    state.extend([*tokenizer.message("user", PROBE), *tokenizer.reply_opening()]).argmax().item()
    return time.perf_counter() - clock


def main() -> None:
    """`python -m still_agent.evaluation.reader READING`: events on stdout, one a line."""

    def emit(event: Event) -> None:
        print(json.dumps(event), flush=True)

    try:
        live(Reading.from_json(sys.argv[1]), emit)
    except errors.StillError as error:
        emit({"kind": "failed", "error": type(error).__name__, "message": str(error)})


if __name__ == "__main__":
    main()
