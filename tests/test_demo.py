"""The demo, small: really killed, really resumed, and nothing lost or said twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from still_agent import Agent, Budget, CompactorError
from still_agent.cli.app import app
from still_agent.evaluation.exam import Exam
from still_agent.evaluation.journey import journey
from still_agent.evaluation.reader import Event, Reading, live
from still_agent.evaluation.trajectory import SYSTEM, Script, trajectory
from still_memory import MemoryStore

SCRIPT = Script(facts=8, tokens=2000)
SLOTS = 128


@dataclass
class Demo:
    run: dict[str, Any]
    log: str
    folder: Path

    def ledger(self) -> list[tuple[str, str]]:
        return ledger(self.folder / "conversation-8.db")


def ledger(store: Path) -> list[tuple[str, str]]:
    with MemoryStore(store) as memory:
        return [(turn.role, turn.text) for turn in memory.history("demo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    done = CliRunner().invoke(
        app,
        ["demo", "--facts", "8", "--tokens", "2000", "--slots", str(SLOTS), "--json",
         "--model", str(tiny_folder), "--compactor", "streaming", "--out", str(folder)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (run,) = json.loads(done.stdout)["runs"]
    return Demo(run, done.stderr, folder)


def test_the_process_is_killed_by_sigkill_and_another_resumes(demo: Demo) -> None:
    assert "SIGKILL" in demo.log and "exit status -9" in demo.log
    assert demo.run["reused_tokens"] > 0.5 * demo.run["tokens"]
    assert 0 <= demo.run["recomputed_tokens"] < 0.4 * demo.run["tokens"]


def test_every_step_is_in_the_ledger_once_and_in_order(demo: Demo) -> None:
    said = [text for role, text in demo.ledger() if role == "user"]
    assert said == [step.text for step in trajectory(SCRIPT).steps]


def test_a_killed_conversation_says_what_an_uninterrupted_one_says(
    demo: Demo, tmp_path: Path, tiny_folder: Path
) -> None:
    store, events = tmp_path / "whole.db", list[Event]()
    live(
        Reading(str(store), SCRIPT, str(tiny_folder), compactor="streaming", slots=SLOTS),
        events.append,
    )
    assert ledger(store) == demo.ledger()
    (read,) = (e for e in events if e["kind"] == "read")
    assert (read["tokens"], read["slots"]) == (demo.run["tokens"], demo.run["slots"])
    right = sum(
        all(value in e["reply"] for value in e["expected"]) for e in events if e["kind"] == "answer"
    )
    assert right == round(demo.run["recall"] * SCRIPT.facts)


def test_slots_never_pass_the_budget_while_tokens_grow(demo: Demo) -> None:
    assert demo.run["most_slots"] <= SLOTS < demo.run["tokens"]
    assert demo.run["full_bytes"] > demo.run["held_bytes"]
    assert demo.run["compactions"] > 10


def test_reading_again_is_measured_beside_the_resume(demo: Demo) -> None:
    assert 0 < demo.run["first_token_seconds"] < demo.run["reread_first_token_seconds"]


def test_recall_is_told_in_all_and_by_age(demo: Demo) -> None:
    assert demo.run["facts"] == 8 and demo.run["decoys"] == 2
    assert sum(age["questions"] for age in demo.run["recall_by_age"]) == 8


def test_the_sawtooth_is_a_png(demo: Demo) -> None:
    assert (demo.folder / "sawtooth.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_questions_do_not_touch_the_session_they_are_asked_of(
    tmp_path: Path, tiny_folder: Path
) -> None:
    budget = Budget(slots=SLOTS)
    with Agent.load(
        tiny_folder, store=tmp_path / "s.db", compactor="streaming", budget=budget
    ) as agent:
        chat = agent.session("demo", system=SYSTEM)
        chat.read("The river was quiet, and nobody came. " * 30)
        before = agent.store.head("demo")
        exam = Exam(agent, "demo")
        first, other = exam.ask("Who came?", max_tokens=8), exam.ask("Where?", max_tokens=8)
        assert exam.ask("Who came?", max_tokens=8) == first != other
        assert agent.store.head("demo") == before
        assert chat.send("Who came?", max_tokens=8).text.strip() == first


def test_a_typed_error_of_the_child_is_raised_by_the_parent(
    tmp_path: Path, tiny_folder: Path
) -> None:
    reading = Reading(str(tmp_path / "s.db"), SCRIPT, str(tiny_folder), slots=SLOTS)
    with pytest.raises(CompactorError, match="train_still"):
        journey(reading, tmp_path / "log", lambda event: None)
