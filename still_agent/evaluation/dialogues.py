"""Generated conversations: prose that is read, facts told amid it, then questions.

A dialogue is a list of lines. `context` is what happens before the exam, `exam` is the
questions with their reference answers. Prose comes from real books, in its own order; the
facts are put between its sentences, a correction always after what it corrects.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from still_agent.evaluation.facts import Fact, say
from still_agent.evaluation.phrasings import MULTI_QUERY_QUESTIONS, NEEDLE, Split
from still_memory.errors import InputError

if TYPE_CHECKING:
    from still_agent.models.tokenizers import Tokenizer

CHARS_PER_TOKEN = 3.4  # of the reference encoding, on the books
ACKNOWLEDGEMENT = "Noted."
SYSTEM_PROMPTS = ("You are brief.", "You answer from memory.", "You are a careful assistant.")


@dataclass(frozen=True)
class Line:
    """One message; `answer` marks what the model itself should say."""

    role: str
    text: str
    answer: bool = False


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    expected: tuple[str, ...]  # strings that a right answer contains
    fact: Fact | None = None

    def lines(self) -> list[Line]:
        return [Line("user", self.text), Line("assistant", self.answer, answer=True)]


@dataclass
class Dialogue:
    context: list[Line]
    exam: list[Question]
    facts: list[Fact] = field(default_factory=list)

    def lines(self) -> list[Line]:
        return self.context + [line for q in self.exam for line in q.lines()]


def render(tokenizer: Tokenizer, lines: Iterable[Line]) -> tuple[list[int], list[bool]]:
    """Token ids of whole messages, and which of them a model should say itself."""
    ids: list[int] = []
    said: list[bool] = []
    opening = len(tokenizer.frames["assistant"].opening)
    for line in lines:
        message = tokenizer.message(line.role, line.text)
        ids += message
        said += [line.answer and at >= opening for at in range(len(message))]
    return ids, said


class Prose:
    """Sentences of books, in order. Raises InputError for a blank one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.books = [
            [s.strip() for p in text.split("\n") for s in re.split(r"(?<=[.!?]) +", p) if s.strip()]
            for text in texts
        ]
        if not all(self.books):
            raise InputError("a text of prose is blank: give one that holds sentences")

    @classmethod
    def of(cls, *paths: Path) -> Prose:
        return cls([p.read_text("utf-8") for p in paths])

    @property
    def digest(self) -> str:
        """Of all sentences, in order."""
        return hashlib.sha256(repr(self.books).encode()).hexdigest()[:16]

    def passage(self, rng: random.Random, chars: int) -> list[str]:
        """Consecutive sentences from a random place, about `chars` characters in all."""
        book = rng.choices(self.books, weights=[len(b) for b in self.books])[0]
        at = rng.randrange(len(book))
        taken: list[str] = []
        while chars > 0:
            sentence = book[at % len(book)][:400]
            taken.append(sentence)
            chars -= len(sentence) + 1
            at += 1
        return taken


def questions(
    rng: random.Random, split: Split, told: Sequence[Fact], count: int, *, multi_query: float = 0.1
) -> list[Question]:
    """`count` questions about `told`, each fact asked once while they last."""
    order = rng.sample(list(told), len(told))
    asked: list[Question] = []
    while len(asked) < count and order:
        fact = order.pop()
        alike = [
            f for f in told
            if f.family is NEEDLE and f.attribute == fact.attribute and len(f.current) == 1
        ]  # fmt: skip
        single = fact.family is NEEDLE and len(fact.current) == 1
        if single and len(alike) > 1 and rng.random() < multi_query * 3:
            asked.append(multi_query_question(rng, split, alike))
            continue
        text, answer = fact.ask(rng, split)
        asked.append(Question(text, answer, fact.current, fact))
    return asked


def multi_query_question(rng: random.Random, split: Split, alike: Sequence[Fact]) -> Question:
    """RULER's multi-query needle: several keys in one question."""
    group = rng.sample(list(alike), min(len(alike), rng.randint(2, 4)))
    keys = ", ".join(f.subject for f in group[:-1]) + " and " + group[-1].subject
    text = say(rng, split, MULTI_QUERY_QUESTIONS, s=keys, a=group[0].attribute)
    pairs = ", ".join(f"{f.subject} is {f.current[0]}" for f in group)
    answer = f"The special magic {group[0].attribute}s: {pairs}."
    return Question(text, answer, tuple(f.current[0] for f in group))


def dialogue(
    rng: random.Random, split: Split, prose: Prose, *, tokens: int, told: Sequence[Fact],
    asked: int, multi_query: float = 0.1,
) -> Dialogue:  # fmt: skip
    """A conversation whose context is about `tokens` tokens long.

    The statements of `told` are spread over it. One of three manners is drawn: everything in
    a few texts that are read, every fact a message of its own, or a mixture.
    """
    events = [(f, i) for f in told for i in range(len(f.values))]
    keyed = [(rng.random(), f, i) for f, i in events]
    places = {id(f): sorted(k for k, g, _ in keyed if g is f) for f, _ in events}
    statements = sorted((places[id(f)][i], f.state(rng, i, split), f) for f, i in events)
    chars = int(tokens * CHARS_PER_TOKEN) - sum(len(s) for _, s, _ in statements)
    manner = rng.choice(("read", "chat", "mixed"))
    alone = {"read": 0.0, "chat": 1.0, "mixed": 0.5}[manner]
    sentences = prose.passage(rng, chars) if chars > 0 else []
    merged = [(rng_place, text, None) for rng_place, text in spread(sentences)]
    stream = sorted([*merged, *((p, s, f) for p, s, f in statements)], key=lambda x: x[0])
    context: list[Line] = []
    if rng.random() < 0.7:
        context.append(Line("system", rng.choice(SYSTEM_PROMPTS)))
    page: list[str] = []
    page_size = rng.choice((400, 1500, 6000))

    def turn_page() -> None:
        if page:
            context.append(Line("user", " ".join(page)))
            if rng.random() < 0.3:
                context.append(Line("assistant", ACKNOWLEDGEMENT, answer=True))
            page.clear()

    for _, text, fact in stream:
        if fact is not None and rng.random() < alone:
            turn_page()
            context.append(Line("user", text))
            context.append(Line("assistant", ACKNOWLEDGEMENT, answer=True))
            continue
        page.append(text)
        if sum(map(len, page)) > page_size:
            turn_page()
    turn_page()
    exam = questions(rng, split, told, asked, multi_query=multi_query)
    return Dialogue(context, exam, list(told))


def spread(sentences: Sequence[str]) -> list[tuple[float, str]]:
    total = sum(map(len, sentences)) or 1
    places, so_far = [], 0
    for s in sentences:
        places.append((so_far / total, s))
        so_far += len(s)
    return places
