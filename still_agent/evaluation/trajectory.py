"""A long scripted conversation over a real book: what is said, what is asked, what was right.

The book is read page by page, in its own order. Facts are told amid it, half of them inside
a page and half in a message of their own, at places spread evenly over the whole length; a
correction always comes after what it corrects. Besides the facts that will be asked there
are decoys: facts of the same form that never are, so that what to keep cannot be guessed from
the form. The book and the `held_out` side of facts (words, names, numbers, phrasings) were
seen by neither the reference model nor its compactor.

Everything follows from a `Script`, so two processes that share one read the same words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from still_agent.evaluation.dialogues import CHARS_PER_TOKEN, Prose, Question, spread
from still_agent.evaluation.facts import Fact, facts

BOOK = "The Wonderful Wizard of Oz, L. Frank Baum (1900)"
SYSTEM = "You answer from memory."
QUARTERS = 4


@dataclass(frozen=True)
class Script:
    """What a trajectory is made from."""

    facts: int = 40
    decoys: int | None = None  # default: a quarter of the facts
    tokens: int | None = None  # about how long; default: the book once
    corrected: float = 0.2  # share of facts that are corrected later
    alone: float = 0.5  # share of statements that are messages of their own
    page: int = 3000  # characters in one page of the book
    seed: int = 0

    @property
    def told(self) -> int:
        """Facts told, asked or not."""
        return self.facts + (self.facts // 4 if self.decoys is None else self.decoys)


@dataclass(frozen=True)
class Step:
    """One message of the user's, and whether it is answered or only read."""

    text: str
    answered: bool


@dataclass(frozen=True)
class Asked:
    """A question, and where its answer was told: 0 is the start of the conversation."""

    question: Question
    place: float


@dataclass(frozen=True)
class Trajectory:
    steps: tuple[Step, ...]
    exam: tuple[Asked, ...]
    decoys: tuple[Fact, ...]


@dataclass(frozen=True)
class Answer:
    """What was replied to one question."""

    question: str
    expected: tuple[str, ...]
    reply: str
    place: float
    outdated: tuple[str, ...] = ()  # values that held before they were corrected

    @classmethod
    def to(cls, asked: Asked, reply: str) -> Answer:
        q = asked.question
        outdated = q.fact.values[:-1] if q.fact is not None and q.fact.corrected else ()
        return cls(q.text, q.expected, reply, asked.place, outdated)

    @property
    def right(self) -> bool:
        """Every expected string stands in the reply, as a whole word, and no outdated one does."""
        return all(map(self._says, self.expected)) and not any(map(self._says, self.outdated))

    def _says(self, value: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", self.reply) is not None

    @property
    def corrected(self) -> bool:
        return bool(self.outdated)


class _Event(NamedTuple):
    place: float
    text: str
    told: bool


def book() -> str:
    """The demo's book, as plain text."""
    file = resources.files("still_agent").joinpath("reference", "books", "wizard_of_oz.txt")
    return file.read_text("utf-8")


def trajectory(script: Script) -> Trajectory:
    """The whole conversation of `script`, the same every time."""
    rng = random.Random(script.seed)
    told = facts(rng, "held_out", script.told, corrected=script.corrected, multi=0.0)
    places = _places(rng, told)
    events = [_Event(p, s, False) for p, s in spread(_sentences(script))]
    for fact, at in zip(told, places, strict=True):
        for index, place in enumerate(at):
            events.append(_Event(place, fact.state(rng, index, "held_out"), True))
    events.sort(key=lambda event: event.place)
    newest = [at[-1] for at in places]
    order = rng.sample(range(len(told)), len(told))
    asked, decoys = order[: script.facts], order[script.facts :]
    return Trajectory(
        steps=tuple(_steps(rng, script, events)),
        exam=tuple(_ask(rng, told[i], newest[i]) for i in asked),
        decoys=tuple(told[i] for i in decoys),
    )


def recall(answers: Sequence[Answer]) -> float | None:
    """Share of right answers; None where there was no question."""
    return sum(a.right for a in answers) / len(answers) if answers else None


def recall_by_age(answers: Iterable[Answer]) -> list[tuple[int, float | None]]:
    """(questions, recall) for each quarter of the conversation, the oldest first."""
    by_quarter: list[list[Answer]] = [[] for _ in range(QUARTERS)]
    for answer in answers:
        by_quarter[min(int(answer.place * QUARTERS), QUARTERS - 1)].append(answer)
    return [(len(quarter), recall(quarter)) for quarter in by_quarter]


def _sentences(script: Script) -> list[str]:
    """The book's sentences, from its start; the book begins anew where it is too short."""
    (sentences,) = Prose([book()]).books
    if script.tokens is None:
        return sentences
    chars, taken = script.tokens * CHARS_PER_TOKEN, list[str]()
    while chars > 0:
        taken.append(sentences[len(taken) % len(sentences)])
        chars -= len(taken[-1]) + 1
    return taken


def _places(rng: random.Random, told: Sequence[Fact]) -> list[list[float]]:
    """For each fact the places of its statements, in order: one in each stretch of the text."""
    owners = [i for i, fact in enumerate(told) for _ in fact.values]
    rng.shuffle(owners)
    places: list[list[float]] = [[] for _ in told]
    for stretch, owner in enumerate(owners):
        places[owner].append((stretch + rng.random()) / len(owners))
    return places


def _steps(rng: random.Random, script: Script, events: Iterable[_Event]) -> Iterable[Step]:
    page: list[str] = []
    for event in events:
        if event.told and rng.random() < script.alone:
            if page:
                yield Step(" ".join(page), answered=False)
            page = []
            yield Step(event.text, answered=True)
            continue
        page.append(event.text)
        if sum(map(len, page)) >= script.page:
            yield Step(" ".join(page), answered=False)
            page = []
    if page:
        yield Step(" ".join(page), answered=False)


def _ask(rng: random.Random, fact: Fact, place: float) -> Asked:
    text, answer = fact.ask(rng, "held_out")
    return Asked(Question(text, answer, fact.current, fact), place)
