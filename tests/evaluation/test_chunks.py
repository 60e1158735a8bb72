"""A context in many chunks ends in the same slots; the rounds are those of its schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from still_agent.budget import Budget
from still_agent.cli.app import app
from still_agent.evaluation.bench import Bench
from still_agent.evaluation.chunks import SPANS, Chunks
from still_agent.evaluation.grid import Grid
from still_agent.evaluation.iteration import iteration
from still_agent.evaluation.methods import METHODS, blind, compactor_of, schedule_of, scheduled
from still_agent.evaluation.rows import Row
from still_agent.evaluation.standings import is_rival, leads
from still_agent.models import FrozenModel
from still_agent.rolling import RollingState
from still_agent.schedule import ScheduleName
from still_memory.checkpoint import Checkpoint
from still_memory.compactors import StreamingCompactor
from still_memory.errors import InputError
from tests.evaluation.test_grid import context, row

IDS = list(range(300, 556))
SLOTS = 31


def read(model: FrozenModel, count: int, schedule: ScheduleName) -> Checkpoint:
    state = RollingState(model, StreamingCompactor(), Budget(slots=len(IDS)))
    chunks = Chunks(len(IDS), count, SLOTS)
    for chunk in chunks:
        state.extend(IDS[chunk])
        chunks.compact(state, schedule)
        assert state.slots <= SLOTS
    return state.checkpoint()


@given(st.integers(8, 5000), st.integers(1, 64))
def test_chunks_are_even_and_all_of_the_context(tokens: int, count: int) -> None:
    chunks = Chunks(tokens, min(count, tokens // 4), 10)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert len(sizes) == chunks.count and sum(sizes) == tokens
    assert max(sizes) == chunks.size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [2, 5, 8, 16, 32])
def test_every_schedule_ends_with_its_slots_and_rounds(tiny: FrozenModel, count: int) -> None:
    made = {schedule: read(tiny, count, schedule) for schedule in get_args(ScheduleName)}
    rolling, append, tiered = made["rolling"], made["append"], made["tiered"]
    for kept in made.values():
        assert kept.length == len(IDS) and not any(entry.span.raw for entry in kept.entries)
    assert rolling.slots == append.slots == SLOTS
    assert len(rolling.entries) == 1 and len(append.entries) == min(count, SLOTS)
    rounds = {name: max(e.span.rounds for e in kept.entries) for name, kept in made.items()}
    skipped = sum(chunk.stop <= SLOTS for chunk in Chunks(len(IDS), count, SLOTS))
    assert rounds["rolling"] == count - skipped and rounds["append"] == 1
    if count <= SPANS:
        assert [e.span.end for e in tiered.entries] == [e.span.end for e in append.entries]
    else:
        assert tiered.slots > SLOTS - 2 * (SLOTS // SPANS) and len(tiered.entries) <= SPANS
        assert 2 <= rounds["tiered"] <= count.bit_length() < rounds["rolling"]


def test_a_chunk_worth_less_than_a_slot_waits_for_the_next(tiny: FrozenModel) -> None:
    state = RollingState(tiny, StreamingCompactor(), Budget(slots=64))
    chunks = Chunks(32, 8, 4)
    held = []
    for chunk in chunks:
        state.extend(IDS[chunk])
        chunks.compact(state, "append")
        held.append((len(state.memory), state.shares["tail"]))
    assert held == [(0, 4), (1, 0), (1, 4), (2, 0), (2, 4), (3, 0), (3, 4), (4, 0)]


def test_a_schedule_stands_behind_a_methods_name() -> None:
    named = scheduled("kvzip+shares+int8", "tiered")
    assert named == "kvzip+tiered+shares+int8"
    assert schedule_of(named) == "tiered" and compactor_of(named) == "kvzip+shares+int8"
    assert blind(named) and not is_rival(scheduled("kvzip", "append"))
    assert scheduled(named, "append") == named
    assert scheduled("still", "rolling") == "still" and schedule_of("still") == "rolling"
    assert not any(schedule_of(method) != "rolling" for method in METHODS)


def test_schedules_are_the_same_where_nothing_is_read_after_a_compaction(tiny: FrozenModel) -> None:
    made = context(Bench(tiny, name="tiny"), "bindings")
    (rolling, append) = (made.remembered(f"kvzip{s}", 20, 1) for s in ("", "+append"))
    pairs = zip(rolling.entries[0].span.layers, append.entries[0].span.layers, strict=True)
    for mine, other in pairs:
        assert mine.positions.equal(other.positions) and mine.keys.equal(other.keys)
    twice = [made.remembered(f"kvzip{s}", 20, 2).entries for s in ("", "+append")]
    assert [len(entries) for entries in twice] == [1, 2]


def of(method: str, rounds: int, *scores: float) -> list[Row]:
    return [row(method, n, x) | {"rounds": rounds, "compactions": rounds}
            for n, x in enumerate(scores)]  # fmt: skip


def test_what_is_kept_is_of_the_same_contexts_compacted_once() -> None:
    rows = [*of("still", 1, 1.0, 0.5, 0.5), *of("still", 8, 0.5, 0.5), *of("full", 1, 1.0),
            *of("still+tiered", 8, 0.0, 1.0), *of("still+tiered", 16, 0.0)]  # fmt: skip
    found = {(x.schedule, x.chunks): x for x in iteration(rows) if x.tasks == "vt"}
    assert set(found) == {("rolling", 1), ("rolling", 8), ("tiered", 8), ("tiered", 16)}
    eight = found["rolling", 8]
    assert (eight.method, eight.contexts, eight.score) == ("still", 2, 0.5)
    assert eight.kept == pytest.approx(1.0 / 1.5) and eight.compactions == 8
    assert eight.kept_interval == pytest.approx((0.5, 1.0))
    assert found["rolling", 1].kept == 1.0
    assert found["tiered", 8].kept is None  # nothing was measured after one chunk
    assert iteration(of("still", 1, 1.0)) == []


def test_a_lead_is_over_rivals_under_the_same_schedule() -> None:
    rows = [*of("still", 8, 0.5), *of("kvzip", 8, 0.1), *of("kvzip+append", 8, 0.9)]
    assert {lead.rival for lead in leads(rows)} == {"kvzip"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds": (64,), "lengths": (128,)}, "64 rounds leave chunks of 128 tokens fewer than 4"),
        ({"methods": ("kvzip+append",), "rounds": (32,), "ratios": (16.0,), "lengths": (256,)},
         "32 chunks that are appended .* leaves 16: ask for fewer rounds"),
    ],
)  # fmt: skip
def test_rounds_that_leave_too_little_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Grid(**wrong)


def test_the_command_makes_the_table(tiny_folder: Path, tmp_path: Path) -> None:
    command = ["eval", "ruler", "--model", str(tiny_folder), "--tasks", "bindings", "--methods",
               "full,knorm+int8", "--schedules", "rolling,tiered,append", "--rounds", "1,24",
               "--lengths", "120", "--ratios", "4", "--samples", "1", "--seeds", "0",
               "--out", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = [x for x in json.loads(done.stdout)["iteration"] if x["tasks"] == "bindings"]
    assert [(x["schedule"], x["chunks"], x["method"]) for x in found] == [
        (s, n, "knorm+int8") for s in ("rolling", "tiered", "append") for n in (1, 24)
    ]
    rolled, tiered, appended = (x["compactions"] for x in found if x["chunks"] == 24)
    assert rolled > tiered > appended == 1
    table = CliRunner().invoke(app, command, env={"COLUMNS": "80"}).stdout
    assert "bindings, 120 tokens, 4x: knorm+int8 by number of chunks" in table
    assert "tiered" in table and max(map(len, table.splitlines())) <= 80
    with pytest.raises(InputError, match="no schedule 'yearly'; the known ones are rolling"):
        CliRunner().invoke(app, [*command, "--schedules", "yearly"], catch_exceptions=False)
