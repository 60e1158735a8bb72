"""The packaged model and compactor do their job, together and offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from still_agent import Agent, Budget
from still_agent.compactor import PACKAGED
from still_agent.evaluation.reader import Event, Reading, live
from still_agent.evaluation.trajectory import Answer, Script, recall
from still_agent.models.loading import load_model
from still_memory.compactors.still import StillCompactor

SCRIPT = Script(facts=12, decoys=3, tokens=8_000, seed=1)  # one seed; docs/results.md has more
RECALL_GATE = 0.5  # loose on purpose: twelve questions


def lived(folder: Path, compactor: str | None) -> tuple[list[Event], float]:
    """A conversation of 8,000 tokens in 1,024 slots, and the share of right answers."""
    events: list[Event] = []
    live(Reading(str(folder / "r.db"), SCRIPT, compactor=compactor), events.append)
    found = [
        Answer(**{k: v for k, v in e.items() if k != "kind"})
        for e in events
        if e["kind"] == "answer"
    ]
    share = recall(found)
    assert share is not None and len(found) == SCRIPT.facts
    return events, share


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], float]:
    return lived(tmp_path_factory.mktemp("still"), None)


def test_the_compactor_is_of_the_model_that_ships() -> None:
    frozen = load_model("reference")
    compactor = StillCompactor.load(PACKAGED, frozen.identity)
    assert compactor.model.address == frozen.identity.address


def test_it_remembers_what_it_was_told_long_ago(still: tuple[list[Event], float]) -> None:
    events, share = still
    assert max(e["slots"] for e in events if "slots" in e) <= 1024
    assert sum(e["kind"] == "compaction" for e in events) > 20
    assert share >= RECALL_GATE


def test_dropping_the_old_forgets_it(still: tuple[list[Event], float], tmp_path: Path) -> None:
    """The same model, script and slots without Still: the difference is the compactor's."""
    _, without = lived(tmp_path, "streaming")
    assert without < still[1] / 2


def test_resumed_logits_are_bit_equal(tmp_path: Path) -> None:
    text = "The door code of Brenda is 4821. " + "It was a quiet day and nothing happened. " * 300
    budget = Budget(slots=512)
    with Agent.load("reference", store=tmp_path / "a.db", budget=budget) as first:
        chat = first.session("a", system="You are brief.")
        chat.read(text)
        ids = first.model.tokenizer.message("user", "What is Brenda's door code?")
        wanted = chat._state.extend(ids)
        assert chat.stats.rounds > 2
    with Agent.load("reference", store=tmp_path / "a.db", budget=budget) as second:
        got = second.session("a")._state.extend(ids)
    assert torch.equal(got, wanted)
