"""The scripted conversation is what the demo says it is."""

from __future__ import annotations

import pytest

from still_agent.evaluation.trajectory import (
    Answer,
    Script,
    Trajectory,
    book,
    recall,
    recall_by_age,
    trajectory,
)

SHORT = Script(facts=24, tokens=6000, seed=5)


def text(t: Trajectory) -> str:
    return "\n".join(step.text for step in t.steps)


def answer(place: float, reply: str = "it is 77", expected: tuple[str, ...] = ("77",)) -> Answer:
    return Answer("?", expected, reply, place)


def test_an_answer_that_also_gives_the_outdated_value_is_wrong() -> None:
    assert Answer("?", ("77",), "it is 77", 0.5, outdated=("12",)).right
    assert not Answer("?", ("77",), "it is 77, or 12", 0.5, outdated=("12",)).right
    assert Answer("?", ("77",), "it is 77", 0.5, outdated=("7",)).right  # whole words


def test_two_processes_with_one_script_read_the_same_words() -> None:
    assert trajectory(SHORT) == trajectory(SHORT)
    assert trajectory(SHORT) != trajectory(Script(facts=24, tokens=6000, seed=6))


def test_the_whole_book_is_read_in_its_own_order() -> None:
    script = Script(facts=1, decoys=0, corrected=0.0)
    read = text(trajectory(script)).split()
    words = iter(read)
    assert all(word in words for word in book().split())  # a subsequence: only facts are added
    assert len(read) < len(book().split()) + 40


def test_every_expected_string_is_told() -> None:
    t = trajectory(SHORT)
    said = text(t)
    for asked in t.exam:
        assert asked.question.expected
        assert all(value in said for value in asked.question.expected)


def test_corrections_come_after_what_they_correct() -> None:
    t = trajectory(Script(facts=60, tokens=6000, corrected=0.5))
    said = text(t)
    corrected = [a.question.fact for a in t.exam if a.question.fact and a.question.fact.corrected]
    assert len(corrected) > 15
    for fact in corrected:
        older, newer = (
            max(said.find(s) for s in spoken(fact, index)) for index in range(len(fact.values))
        )
        assert 0 <= older < newer


def spoken(fact, index: int) -> list[str]:
    family = fact.family
    forms = family.corrections if index else family.statements
    fields = {"s": fact.subject, "a": fact.attribute, "v": fact.values[index]}
    return [form.format(**fields) for form in forms["held_out"]]


def test_decoys_are_told_and_never_asked() -> None:
    t = trajectory(SHORT)
    said, asked = text(t), {a.question.text for a in t.exam}
    assert len(t.decoys) == SHORT.facts // 4
    for decoy in t.decoys:
        assert all(value in said for value in decoy.values)
        assert not any(decoy.subject in question for question in asked)


def test_facts_are_spread_over_the_whole_length() -> None:
    t = trajectory(Script(facts=80, tokens=6000))
    assert all(count >= 8 for count, _ in recall_by_age([answer(a.place) for a in t.exam]))
    said = text(t)
    for asked in t.exam:
        found = max(said.find(s) for s in spoken(asked.question.fact, newest(asked)))
        assert abs(found / len(said) - asked.place) < 0.1


def newest(asked) -> int:
    return len(asked.question.fact.values) - 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_fact_is_told_in_a_page_or_in_a_message_of_its_own(share: float) -> None:
    t = trajectory(Script(facts=12, tokens=3000, alone=share))
    answered = [step for step in t.steps if step.answered]
    assert len(answered) >= 12 if share else not answered


def test_a_page_is_one_turn() -> None:
    """The number of user turns in a store tells how far a killed reader had come."""
    assert max(len(step.text) for step in trajectory(Script()).steps) < 4096


def test_a_reply_is_right_when_every_expected_value_is_in_it() -> None:
    assert answer(0, "The PIN is 77.").right
    assert not answer(0, "The PIN is 778.").right
    assert not answer(0, "The PIN is 78.").right
    assert not answer(0, "blue and red", ("red", "green")).right


def test_recall_is_counted_by_quarters_of_the_conversation() -> None:
    answers = [answer(0.0), answer(0.3, "?"), answer(0.4), answer(1.0)]
    assert recall_by_age(answers) == [(1, 1.0), (2, 0.5), (0, None), (1, 1.0)]
    assert recall(answers) == 0.75
    assert recall([]) is None
