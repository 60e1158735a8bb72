"""Training's promises: a frozen model that is its own teacher, and kills that cost nothing."""

from __future__ import annotations

import json
import random

import pytest
import torch

from still_agent.training.exams import all_right, pack
from still_agent.training.gates import gated_logits
from still_agent.training.recall import recall
from still_agent.training.still import Recipe, Trainer
from still_agent.training.student import answer_logits, compact_in_rounds
from still_agent.training.targets import Targets, divergence
from still_agent.training.teacher import logits_of, teach
from still_memory.compactors.still import StillCompactor, StillConfig

RECIPE = Recipe(
    steps=6, rows=2, lengths=(32,), ratios=(2, 4), rounds=(1, 2), raw_tails=(0, 4), rate=3e-3,
    scorer_steps=2, scorer_lengths=(24,),
)  # fmt: skip


def source(rng: random.Random, rows: int, length: int):
    def ids(n: int) -> list[int]:
        return [rng.randrange(300, 1000) for _ in range(n)]

    mask = [False] * 3 + [True] * 4 + [False] * 2 + [True] * 3
    return pack([(ids(length), ids(12), mask) for _ in range(rows)])


def exams_of(seed: int, rows: int, length: int):
    return source(random.Random(seed), rows, length)


def compactor(tiny, **settings) -> StillCompactor:
    torch.manual_seed(0)
    config = StillConfig(layers=tiny.layers, kv_heads=tiny.kv_heads, head_dim=tiny.head_dim,
                         **{"beta": True, "placement": "salient", **settings})  # fmt: skip
    return StillCompactor(config, tiny.identity)


def taught(tiny, exams):
    """A lesson whose answers are the model's own: teach once more on what it would say."""
    for _ in range(12):
        lesson = teach(tiny, exams)
        if lesson.right[0] == lesson.right[1]:
            break
        full = answer_logits(
            tiny, lesson.cache, exams.exam, exams.answer[:, 1:].nonzero(as_tuple=True)
        )
        exams.exam[:, 1:][exams.answer[:, 1:]] = full.argmax(-1)
    return lesson


def far(teacher, student, gold, top_k):
    """The divergence of whole logits."""
    wanted = Targets.of(teacher, gold, top_k)
    return divergence(wanted, student.gather(-1, wanted.tokens))


def test_divergence_is_zero_only_for_the_teacher_itself():
    logits, gold = torch.randn(5, 50), torch.arange(5)
    assert far(logits, logits, gold, 8) == pytest.approx(0, abs=1e-6)
    assert far(logits, torch.randn(5, 50), gold, 8) > 0.01


def test_divergence_always_looks_at_the_gold_token():
    teacher = torch.zeros(1, 50)
    teacher[0, :8] = 10.0
    worse = teacher.clone()
    worse[0, 49] = 12.0  # a token outside the teacher's top 8
    none, forced = (far(teacher, worse, torch.tensor([g]), 8) for g in (0, 49))
    assert none == pytest.approx(0, abs=1e-6) and forced > 0.1


def test_a_batch_with_nothing_to_learn_changes_no_weight_to_nan(tiny, tmp_path):
    exams = exams_of(1, 2, 24)
    exams.answer[:] = False
    exams.runs[:] = -1
    trainer = Trainer(tiny, compactor(tiny), lambda *_: exams, RECIPE, tmp_path)
    assert trainer.learn()["kl"] == 0
    assert all(torch.isfinite(p).all() for p in trainer.still.parameters())


def test_answers_by_another_model_are_not_taught(tiny):
    exams = exams_of(1, 3, 24)
    lesson = teach(tiny, exams)
    columns = lesson.where[1] + 1
    assert (exams.exam[lesson.where[0], columns] == lesson.gold).all()
    assert (logits_of(tiny, lesson.hidden).argmax(-1) == lesson.gold).all()
    assert len(lesson.gold) < int(exams.answer.sum())  # random answers are not the model's own


def test_own_answers_are_all_taught(tiny):
    exams = exams_of(2, 2, 24)
    lesson = taught(tiny, exams)
    assert lesson.right[0] == lesson.right[1] > 0
    assert len(lesson.gold) == int(exams.answer.sum())


def test_student_with_the_whole_cache_is_the_teacher(tiny):
    exams = exams_of(3, 2, 24)
    lesson = taught(tiny, exams)
    student = answer_logits(tiny, lesson.cache, exams.exam, lesson.where)
    assert torch.allclose(student, logits_of(tiny, lesson.hidden), atol=2e-4)


def gated(tiny, logit: float, exams, lesson, **settings):
    """The student behind gates that all have one logit, noise aside."""
    still = compactor(tiny, **settings)
    torch.nn.init.zeros_(still.scorer.outward.weight)
    torch.nn.init.constant_(still.scorer.outward.bias, logit)
    return still, *gated_logits(tiny, still, exams, lesson, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("per_head", [False, True])
def test_open_gates_change_nothing_and_shut_ones_hide_the_context(tiny, per_head):
    exams = exams_of(4, 2, 24)
    lesson = taught(tiny, exams)
    _, student, opened = gated(tiny, 50.0, exams, lesson, per_head=per_head)
    assert torch.allclose(student, logits_of(tiny, lesson.hidden), atol=2e-4)
    assert opened.item() == pytest.approx(2 * 24)
    _, student, opened = gated(tiny, -50.0, exams, lesson, per_head=per_head)
    assert far(logits_of(tiny, lesson.hidden), student, lesson.gold, 50) > 0.01
    assert opened.item() == pytest.approx(0, abs=1e-6)


def test_answers_open_gates_and_the_price_shuts_them(tiny):
    exams = exams_of(4, 2, 24)
    lesson = taught(tiny, exams)
    still, student, opened = gated(tiny, -2.0, exams, lesson)
    bias = still.scorer.outward.bias
    (by_price,) = torch.autograd.grad(opened, bias, retain_graph=True)
    (by_answers,) = torch.autograd.grad(
        far(logits_of(tiny, lesson.hidden), student, lesson.gold, 50), bias
    )
    assert by_price.sum() > 0 > by_answers.sum()


def test_text_that_is_never_asked_about_is_taught_to_be_worth_nothing(tiny, tmp_path):
    ids = torch.randint(300, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=12, scorer_steps=12, rows=2, scorer_lengths=(24,), scorer_rate=1e-2,
                    warm_up=1, price=0.0)  # fmt: skip
    trainer = Trainer(tiny, compactor(tiny), source, recipe, tmp_path,
                      background=lambda *_: ids)  # fmt: skip
    before = trainer._scores_of(ids).mean()
    for _ in range(12):
        trainer.learn()
    assert trainer._scores_of(ids).mean() < before - 1


def test_the_scorer_is_taught_first_and_the_perceivers_then(tiny, tmp_path):
    trainer = Trainer(tiny, compactor(tiny), source, RECIPE, tmp_path)
    start = {n: p.clone() for n, p in trainer.still.named_parameters()}

    def moved() -> set[str]:
        now = trainer.still.named_parameters()
        return {n.split(".")[0] for n, p in now if not torch.equal(p, start[n])}

    assert "open" in trainer.learn() and "open" in trainer.learn()
    assert moved() == {"scorer"}
    start |= {n: p.clone() for n, p in trainer.still.named_parameters()}
    assert "ratio" in trainer.learn() and moved() == {"perceivers"}


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("tail", [0, 6])
def test_rounds_keep_the_asked_number_of_slots(tiny, rounds, tail):
    exams = exams_of(5, 2, 30)
    lesson = teach(tiny, exams)
    state = compact_in_rounds(tiny, compactor(tiny), exams.context, lesson.cache,
                              rounds=rounds, slots=8, raw_tail=tail)  # fmt: skip
    assert state.slots <= 8 + tail
    assert (state.positions.diff(dim=-1) > 0).all()


def test_no_compaction_is_no_change(tiny):
    """Rounds that drop nothing leave the student equal to the teacher."""
    exams = exams_of(6, 2, 24)
    lesson = taught(tiny, exams)
    state = compact_in_rounds(tiny, compactor(tiny), exams.context, lesson.cache,
                              rounds=3, slots=24, raw_tail=0)  # fmt: skip
    student = answer_logits(tiny, state, exams.exam, lesson.where)
    assert torch.allclose(student, logits_of(tiny, lesson.hidden), atol=2e-4)


def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny, tmp_path):
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    still, exams = compactor(tiny, placement="even"), exams_of(7, 4, 32)
    taught(tiny, exams)
    recipe = Recipe(steps=40, rows=4, lengths=(32,), ratios=(4,), rounds=(1,), raw_tails=(0,),
                    rate=3e-3, warm_up=2)  # fmt: skip
    trainer = Trainer(tiny, still, lambda *_: exams, recipe, tmp_path)
    losses = [trainer.learn()["kl"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(torch.equal(p, before[n]) for n, p in tiny.model.named_parameters())
    assert not any(p.requires_grad for p in tiny.model.parameters())


@pytest.mark.parametrize("killed_after", [1, 3], ids=["scorer", "perceivers"])
def test_killed_training_resumes_bit_for_bit(tiny, tmp_path, killed_after):
    def prose(rng: random.Random, rows: int, length: int) -> torch.Tensor:
        return torch.tensor([[rng.randrange(300, 1000) for _ in range(24)] for _ in range(rows)])

    def trainer(folder: str) -> Trainer:
        return Trainer(tiny, compactor(tiny), source, RECIPE, tmp_path / folder, background=prose)

    whole = trainer("whole")
    for _ in range(6):
        whole.learn()
    first = trainer("parts")
    for _ in range(killed_after):
        first.learn()
    first.save()
    second = trainer("parts")
    second.resume()
    torch.rand(3)  # what else draws random numbers in the new process
    for _ in range(6 - killed_after):
        second.learn()
    ours, theirs = whole.still.state_dict(), second.still.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_the_log_can_be_read_and_the_folder_loaded(tiny, tmp_path):
    trainer = Trainer(tiny, compactor(tiny), source, RECIPE, tmp_path)
    rows: list[dict] = []
    trainer.run(rows.append, every=2, save_every=3, evaluate=lambda: {"checked": 1.0})
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == rows and [r["step"] for r in rows] == [2, 3, 4, 6]
    assert [r["step"] for r in rows if "checked" in r] == [3, 6]
    assert StillCompactor.load(tmp_path, tiny.identity).identity == trainer.still.identity


def test_recall_with_every_slot_is_the_teachers(tiny):
    exams = exams_of(10, 2, 24)
    taught(tiny, exams)
    assert recall(tiny, compactor(tiny), [exams], ratio=1) == (1.0, 1.0)


def test_all_right_counts_answers_not_tokens():
    exams = exams_of(11, 1, 8)
    hits = exams.answer.clone()
    assert all_right(hits, exams) == (2, 2)
    hits[0, 4] = False
    assert all_right(hits, exams) == (1, 2)
