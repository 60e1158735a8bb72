"""A grid is measured once, goes on where it stopped, and compares like with like."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from still_agent.cli.app import app
from still_agent.evaluation.bench import Bench, Context, Item
from still_agent.evaluation.dialogues import Prose, Question, render
from still_agent.evaluation.facts import Fact
from still_agent.evaluation.grid import Grid, measure, outdated
from still_agent.evaluation.phrasings import PERSON
from still_agent.evaluation.rows import Row, opened
from still_agent.evaluation.ruler import TASKS, score, sized
from still_agent.evaluation.shares import shares_of
from still_agent.evaluation.standings import draw, interval, leads, standings
from still_agent.evaluation.trajectory import book
from still_agent.models import FrozenModel, load_model
from still_memory.compactors import AttentionMatchingCompactor, KVzipCompactor
from still_memory.compactors.kv_distill import KVDistillCompactor, KVDistillConfig
from still_memory.errors import InputError
from still_memory.rotation import free
from still_memory.span import Span

METHODS = ("full", "none", "truncate", "streaming", "kvzip", "told-selection")
PROSE = Prose([book()])
SMALL = Grid(
    tasks=("niah_single_2", "bindings"), methods=METHODS, lengths=(160,), ratios=(4.0, 8.0),
    rounds=(1, 2), samples=1, seeds=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tiny: FrozenModel) -> Bench:
    return Bench(tiny, name="tiny")


@pytest.fixture(scope="module")
def rows(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return measure(
        bench, SMALL, PROSE, tmp_path_factory.mktemp("grid") / "rows.jsonl", lambda *_: None
    )


def context(bench: Bench, task: str, length: int = 160) -> Context:
    talk = sized(TASKS[task], "x", length, PROSE, bench.model.tokenizer)
    return Context(bench, Item({}, lambda: talk, lambda *_: {}))


def test_every_cell_is_measured_once_with_the_slots_asked_for(rows: list[Row]) -> None:
    # full and none once, two rulers at two ratios, two compactors at two ratios and two rounds
    assert len(rows) == 2 * (1 + 1 + 2 * 2 + 2 * 2 * 2)
    for row in rows:
        assert 120 <= row["tokens"] <= 164
        assert all(0.0 <= score <= 1.0 for score in row["scores"])
        if row["method"] == "full":
            assert row["slots"] == row["tokens"]
        elif row["method"] != "none":
            assert row["slots"] == int(row["tokens"] / row["ratio"])


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    bench: Bench, rows: list[Row], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    seen = 0

    def stop(row: Row, done: float) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(bench, SMALL, PROSE, file, stop)
    with file.open("a") as cut:
        cut.write('{"task": "bind')  # a row that a kill cut off
    fresh: list[Row] = []
    again = measure(bench, SMALL, PROSE, file, lambda row, _: fresh.append(row))
    assert len(fresh) == len(rows) - 5

    def timeless(some: list[Row]) -> list[str]:
        return sorted(json.dumps({**row, "seconds": 0}, sort_keys=True) for row in some)

    assert timeless(again) == timeless(rows)
    assert (
        measure(bench, SMALL, PROSE, file, lambda *_: pytest.fail("nothing was left to do"))
        == again
    )


def test_a_file_of_another_model_is_not_added_to(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"model": "another"}\n')
    with pytest.raises(InputError, match=r"a run of another model .*: name another file"):
        measure(bench, SMALL, PROSE, file, lambda *_: None)
    file.write_text("not JSON\nnot JSON\n")
    with pytest.raises(InputError, match="line 1"):
        measure(bench, SMALL, PROSE, file, lambda *_: None)


def test_a_trained_rival_is_measured_by_its_folder(tiny: FrozenModel, tmp_path: Path) -> None:
    def train(seed: int) -> None:
        torch.manual_seed(seed)
        config = KVDistillConfig(
            layers=tiny.layers, heads=tiny.heads, kv_heads=tiny.kv_heads, head_dim=tiny.head_dim,
            width=tiny.width, rank=2, scored_at=1,
        )  # fmt: skip
        KVDistillCompactor(config, tiny.identity, tiny).save(folder)

    def run() -> list[Row]:
        return measure(Bench(tiny, name="tiny"), grid, PROSE, file, lambda *_: None)

    folder, file = tmp_path / "still-a-rival", tmp_path / "rows.jsonl"
    train(0)
    grid = Grid(
        tasks=("bindings",), methods=(str(folder), f"{folder}+int8"), lengths=(160,),
        ratios=(4.0,), rounds=(2,), samples=1, seeds=(0,),
    )  # fmt: skip
    rows = run()
    assert [row["method"] for row in rows] == [str(folder), f"{folder}+int8"]
    assert run() == rows
    train(1)
    with pytest.raises(InputError, match=r"a run of another .*still-a-rival"):
        run()


def test_what_is_remembered_whole_answers_as_an_unbroken_conversation(bench: Bench) -> None:
    made = context(bench, "bindings")
    whole = made.remembered("full", 0, 1)
    assert whole.slots == len(made.ids)
    question = made.talk.exam[0]
    cache = bench.model.new_cache(400)
    tokenizer = bench.model.tokenizer
    ids = [*made.ids, *tokenizer.message("user", question.text), *tokenizer.reply_opening()]
    first = int(bench.model.forward(ids, cache, 0).argmax())
    said = made.ask(whole, question)
    assert said.startswith(tokenizer.decode([first])) and first not in tokenizer.eos_ids


def test_asking_changes_nothing(bench: Bench) -> None:
    made = context(bench, "bindings")
    short = made.remembered("streaming", 40, 1)
    question = made.talk.exam[0]
    assert made.ask(short, question) == made.ask(short, question)
    assert short.slots == 40


def test_rounds_end_with_the_same_number_of_slots(bench: Bench) -> None:
    made = context(bench, "niah_single_2")
    for rounds in (1, 2, 4):
        state = made.remembered("kvzip", 20, rounds)
        assert state.slots == 20
        assert max(entry.span.rounds for entry in state.entries) == max(1, rounds)


@pytest.mark.parametrize(
    ("ruler", "kind", "rival"),
    [("told-selection", KVzipCompactor, "kvzip"),
     ("told-attention-matching", AttentionMatchingCompactor, "attention-matching")],
)  # fmt: skip
def test_a_ruler_keeps_what_its_method_keeps_of_these_very_questions(
    bench: Bench, ruler: str, kind: Any, rival: str
) -> None:
    made = context(bench, "bindings")
    fewer = replace(made.talk, exam=made.talk.exam[:1])
    another = Context(bench, replace(made.item, talk=lambda: fewer))
    (entry,) = made.whole.entries
    whole = free(entry.span, bench.model.rope)

    def asked(some: Context) -> Span:
        lines = [line for question in some.talk.exam for line in question.lines()]
        questions = render(bench.model.tokenizer, lines)[0]
        return kind(bench.model, questions=tuple(questions)).compact([whole], 24)

    def values(span: Span) -> torch.Tensor:
        return torch.stack([slots.values for slots in span.layers])

    def kept(some: Context, method: str) -> torch.Tensor:
        return values(some.remembered(method, 24, 1).entries[0].span)

    for some in (made, another):
        torch.testing.assert_close(kept(some, ruler), values(asked(some)))
    assert not kept(made, ruler).equal(kept(another, ruler))
    assert kept(made, rival).equal(kept(another, rival))  # what is blind keeps the same


@pytest.mark.parametrize("method", ["kvzip+shares+int8", "told-attention-matching"])
def test_unequal_layers_hold_no_more_slots_in_all(tiny: FrozenModel, method: str) -> None:
    bench = Bench(tiny, name="tiny", shares=((4.0, 2.0), (1.0, 1.0)))
    made = context(bench, "bindings")
    for rounds in (1, 2) if method.startswith("kvzip") else (1,):
        state = made.remembered(method, 20, rounds)
        (entry,) = state.entries
        assert [len(slots) for slots in entry.span.layers] == [31, 8]
        first = entry.span.layers[0].bias
        assert first is not None and first.isfinite().sum(1).tolist() == [31, 16]
        assert state.slots == 20 and state.positions == 31
    if method.startswith("kvzip"):
        even = made.remembered("kvzip+int8", 20, 1)
        assert [len(slots) for slots in even.entries[0].span.layers] == [20, 20]


def test_shares_that_nobody_names_are_asked_for(tiny: FrozenModel) -> None:
    with pytest.raises(InputError, match="--shares"):
        context(Bench(tiny, name="tiny"), "bindings").remembered("kvzip+shares", 20, 1)


def test_shares_are_read_from_a_list_of_lists(tmp_path: Path) -> None:
    (file := tmp_path / "shares.json").write_text("[[4, 1], [0.5, 1]]")
    assert shares_of(file) == ((4.0, 1.0), (0.5, 1.0))
    for wrong in ("4", '[["x"]]', "{"):
        file.write_text(wrong)
        with pytest.raises(InputError, match="no list of numbers for each layer"):
            shares_of(file)


def test_fitted_slots_know_what_a_told_selection_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    made = context(Bench(load_model("reference")), "niah_multikey_2", 512)
    (question,) = made.talk.exam

    def found(method: str) -> float:
        state = made.remembered(method, 48, 1)
        assert state.slots == 48
        return score(made.ask(state, question), question.expected)

    assert (found("told-selection"), found("told-optimised")) == (0.0, 1.0)
    told = dict(re.findall(r"for (\S+) is: (\d+)", made.talk.context[0].text))
    (mine,) = (key for key in told if key in question.text)
    other = next(key for key in told if key != mine)
    another = replace(question, text=question.text.replace(mine, other), answer=told[other])
    monkeypatch.setattr(made.talk, "exam", [another])  # fitted to what will not be asked
    assert found("told-optimised") == 0.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ("niah",)}, "no task 'niah'; the known ones are niah_single_1"),
        ({"methods": ("gzip",)}, "no method 'gzip'; the known ones are still"),
        ({"ratios": (0.5,)}, "a ratio of 0.5 makes no sense"),
        ({"ratios": (64.0,), "lengths": (128,)}, "leaves 128 tokens fewer than 4"),
        ({"rounds": (0,)}, "a number of rounds of 0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Grid(**wrong)


def test_a_context_past_the_models_window_is_refused(bench: Bench, tmp_path: Path) -> None:
    grid = Grid(tasks=("vt",), methods=("full",), lengths=(bench.model.window,))
    with pytest.raises(InputError, match="do not fit the window of 512"):
        measure(bench, grid, PROSE, tmp_path / "rows.jsonl", lambda *_: None)


def row(method: str, sample: int, *scores: float, task: str = "vt") -> Row:
    return {
        "task": task, "length": 1000, "seed": 0, "sample": sample, "method": method,
        "ratio": 1.0 if method == "full" else 8.0, "rounds": 1, "tokens": 999, "slots": 124,
        "seconds": 0.1, "scores": list(scores),
    }  # fmt: skip


def test_standings_and_leads_by_hand() -> None:
    rows = [
        row("full", 0, 1.0), row("full", 1, 0.5), row("still", 0, 1.0), row("still", 1, 0.0),
        row("kvzip", 0, 0.5, 0.0), row("kvzip", 1, 0.0), row("knorm", 0, 0.0), row("knorm", 1, 0.0),
        row("still+int8", 0, 1.0), row("told-selection", 0, 1.0), row("runs/kvd", 0, 0.1),
    ]  # fmt: skip
    found = {s.method: s for s in standings(rows) if s.tasks == "vt"}
    assert found["still"].score == 0.5
    assert found["still"].share_of_full == pytest.approx(2 / 3)
    assert found["kvzip"].score == 0.125
    (lead,) = (x for x in leads(rows) if x.tasks == "all, never trained")
    assert lead.rival == "kvzip"
    assert lead.lead == pytest.approx(0.375)
    assert lead.interval == (0.0, 0.75)


def test_a_lead_counts_the_contexts_that_both_have() -> None:
    rows = [row("still", 0, 0.5), row("knorm", 0, 0.0), row("knorm", 1, 1.0), row("kvzip", 0, 0.4)]
    (lead,) = (x for x in leads(rows) if x.tasks == "vt")
    assert (lead.rival, lead.lead) == ("kvzip", pytest.approx(0.1))
    assert leads([row("still", 0, 0.5), row("knorm", 1, 1.0)]) == []


def test_a_corrected_value_makes_a_reply_wrong() -> None:
    fact = Fact(PERSON, "Ana", "PIN", ("1234", "5678"), corrected=True)
    question = Question("Ana's PIN?", "Ana's PIN is 5678.", ("5678",), fact)
    assert not outdated(question, "It is 5678.")
    assert outdated(question, "It was 1234 and is 5678.")
    assert not outdated(replace(question, fact=None), "1234")


def test_an_interval_holds_its_mean_and_narrows() -> None:
    few, many = interval([0.0, 1.0] * 4), interval([0.0, 1.0] * 64)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]


def test_the_plot_is_a_picture(rows: list[Row], tmp_path: Path) -> None:
    draw(rows, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    command = ["eval", "ruler", "--model", str(tiny_folder), "--tasks", "bindings", "--methods",
               "full,knorm", "--lengths", "120", "--ratios", "4", "--samples", "1", "--seeds", "0",
               "--out", str(tmp_path / "eval")]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {s["method"] for s in found["standings"]} == {"full", "knorm"}
    table = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert "bindings, 120 tokens, 4x, 1 round" in table.stdout and "knorm" in table.stdout
    assert (tmp_path / "eval" / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "8,many"], "not a list of numbers"),
        (["--ratios", "nan"], "a ratio of nan makes no sense"),
        (["--ratios", ""], "no ratio is given"),
        (["--lengths", ""], "no length is given"),
        (["--methods", ""], "no method is named"),
        (["--tasks", "kvzip"], "there is no task 'kvzip'"),
        (["--seeds", ""], "no seed is given"),
        (["--qa-1", "nowhere.json"], "cannot read 'nowhere.json'"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["eval", "ruler", *options])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


def test_a_folder_of_another_haystack_is_not_added_to(bench: Bench, tmp_path: Path) -> None:
    grid = replace(SMALL, tasks=("niah_single_2",), methods=("none",))
    measure(bench, grid, PROSE, tmp_path / "rows.jsonl", lambda *_: None)
    with pytest.raises(InputError, match="another haystack"):
        measure(bench, grid, Prose(["Another text. " * 99]), tmp_path / "rows.jsonl",
                lambda *_: None)  # fmt: skip


@pytest.mark.parametrize("held", [b"7\n", b"\xff\n", b'{"model": "x"}\n{"task": 1}\n'])
def test_a_file_that_holds_no_rows_is_left_as_it_is(held: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(held + b"cut")
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        opened(file, {"model": "x"})
    assert file.read_bytes() == held + b"cut"
