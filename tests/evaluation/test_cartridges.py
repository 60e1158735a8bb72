"""A cartridge is trained on one context, blind to the exam, and its first token stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from still_agent.evaluation.bench import Bench, Context, Item
from still_agent.evaluation.dialogues import Prose, Question
from still_agent.evaluation.exam import reply
from still_agent.evaluation.fitted import Conversation
from still_agent.evaluation.methods import CARTRIDGES, METHODS, Cells, blind
from still_agent.evaluation.ruler import TASKS, sized
from still_agent.evaluation.self_study import Study, self_study
from still_agent.evaluation.trajectory import book
from still_agent.models import FrozenModel, load_model
from still_agent.sampling import Sampling
from still_agent.training.exams import pack
from still_agent.training.student import answer_states
from still_agent.training.targets import divergence, logits_at, targets
from still_agent.training.teacher import teach
from still_memory.compactors.cache import Cache
from still_memory.errors import InputError
from still_memory.rotation import free
from still_memory.span import Span

SLOTS = 24
STUDY = Study("passages", conversations=2, steps=6)


@pytest.fixture(scope="module")
def reference() -> FrozenModel:
    return load_model("reference")


def context(model: FrozenModel, study: Study = STUDY) -> Context:
    talk = sized(TASKS["chat"], "x", 180, Prose([book()]), model.tokenizer)
    return Context(Bench(model, study=study), Item({}, lambda: talk, lambda *_: {}))


def said_in(model: FrozenModel, talk: Conversation) -> str:
    return model.tokenizer.decode(i for i, said in zip(*talk, strict=True) if said)


def of(made: Context) -> Span:
    (entry,) = made.remembered(CARTRIDGES, SLOTS, 1).entries
    return entry.span


def test_the_first_tokens_slots_are_trained_and_the_very_first_stays(
    reference: FrozenModel,
) -> None:
    made = context(reference)
    trained = of(made)
    first = free(made.whole.entries[0].span.cut(0, SLOTS), reference.rope)
    assert len(trained) == SLOTS and trained.tokens == len(made.ids) and not trained.raw
    for new, old in zip(trained.layers, first.layers, strict=True):
        for learnt, began in ((new.keys, old.keys), (new.values, old.values)):
            assert learnt[:, 0].equal(began[:, 0].to(learnt.dtype))
            assert (learnt[:, 1:] - began[:, 1:]).abs().amin((0, 2)).gt(0).all()
        assert new.bias is None


def test_training_brings_the_slots_nearer_to_the_whole_cache(reference: FrozenModel) -> None:
    made = context(reference)
    conversations = self_study(reference, made.ids, made.whole, STUDY)
    exams = pack([(made.ids, *talk) for talk in conversations])
    lesson = teach(reference, exams, own=False)
    wanted = targets(reference, lesson.hidden, lesson.gold, 200)

    @torch.no_grad()
    def far(span: Span) -> float:
        states = answer_states(reference, Cache.of(span), exams.exam, lesson.where)
        return divergence(wanted, logits_at(reference, states, wanted.tokens)).item()

    began = free(made.whole.entries[0].span.cut(0, SLOTS), reference.rope)
    assert far(of(made)) < 0.8 * far(began)


def test_a_cartridge_knows_nothing_of_the_exam(tiny: FrozenModel) -> None:
    made = context(tiny)
    asked = replace(made.talk, exam=[Question("Another?", "Yes.", ("Yes",))])
    another = Context(made.bench, replace(made.item, talk=lambda: asked))
    for mine, other in zip(of(made).layers, of(another).layers, strict=True):
        assert mine.keys.equal(other.keys) and mine.values.equal(other.values)


def test_every_step_is_reported(tiny: FrozenModel) -> None:
    made = context(tiny)
    seen: list[tuple[int, int]] = []
    made.bench.watch = lambda done, steps: seen.append((done, steps))
    of(made)
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("way", ["requests", "turns"])
def test_the_model_replies_to_itself_with_the_whole_cache(
    way: str, tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LONGEST_REQUEST", "LONGEST_REPLY"):
        monkeypatch.setattr(f"still_agent.evaluation.self_study.{name}", 12)
    made = context(tiny)
    study = replace(STUDY, way=way)
    talks = self_study(tiny, made.ids, made.whole, study)
    assert len(talks) == 2 and talks[0] != talks[1]
    assert talks == self_study(tiny, made.ids, made.whole, study)
    for ids, said in talks:
        request = tiny.tokenizer.decode(i for i, mine in zip(ids, said, strict=True) if not mine)
        assert said_in(tiny, (ids, said)) == reply(
            tiny, made.whole, request, Sampling(max_tokens=12)
        )


def test_passages_are_repeated_from_the_first_to_the_last(reference: FrozenModel) -> None:
    made = context(reference)
    told = "".join("".join(line.text for line in made.talk.context).split())
    first, last = (
        "".join(said_in(reference, talk).split())
        for talk in self_study(reference, made.ids, made.whole, STUDY)
    )
    assert told.startswith(first[:-8]) and told.endswith(last[8:])  # cut within a character
    assert len(first) + len(last) > len(told)


def test_a_model_that_writes_no_request_reads_passages(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(tiny)
    monkeypatch.setattr("still_agent.evaluation.self_study.reply", lambda *_: " \n")
    study = replace(STUDY, way="requests")
    assert self_study(tiny, made.ids, made.whole, study) == self_study(
        tiny, made.ids, made.whole, STUDY
    )


def test_it_is_listed_apart_from_what_needs_no_training() -> None:
    assert CARTRIDGES in METHODS and not blind(CARTRIDGES)
    assert list(Cells(rounds=(1, 4), ratios=(8.0,)).cells(CARTRIDGES)) == [(8.0, 1)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"way": "dreams"}, "no self-study by 'dreams': name requests or turns or passages"),
        ({"conversations": 0}, "a cartridge of 0 conversations"),
        ({"steps": 0}, "a cartridge of 0 steps"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Study(**wrong)
