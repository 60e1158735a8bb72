"""Facts that a conversation may state, correct and ask about, in many phrasings.

Everything here has a `train` and a `held_out` side, disjoint by construction: words,
names, values and phrasings. The reference model and its compactor are trained on the
first and scored on the second. Needles follow RULER's formats (arXiv 2404.06654,
section 3): "One of the special magic numbers for {key} is: {value}."
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

Split = Literal["train", "held_out"]


# A statement or question may begin and end in many ways. The lists are combined with the forms
# below (in training only), so that the model sees thousands of phrasings and not two dozen.
STATEMENT_OPENERS = (
    "", "", "", "", "So, ", "Well, ", "Also, ", "And ", "Note: ", "Hear this: ", "A fact: ",
    "For later: ", "Let me tell you: ", "Before I forget: ", "One more thing: ", "Listen, ",
    "Mind this: ", "News: ", "As you know, ", "I heard it today: ", "They wrote to me: ",
)  # fmt: skip
STATEMENT_CLOSERS = (
    "", "", "", "", " Remember it.", " Do not forget it.", " That is all.", " Write it down.",
    " It is important.", " I am sure of it.", " You will need it.", " Good to know.",
)  # fmt: skip
QUESTION_OPENERS = (
    "", "", "", "", "So, ", "Well, ", "And now: ", "A question: ", "Quick question: ", "Now, ",
    "Help me: ", "One more thing: ", "Let me ask you: ", "I forgot. ", "Hello. ", "Excuse me, ",
    "If you remember, ", "From memory: ", "Back to before. ", "Thank you. ", "Listen, ",
)  # fmt: skip
QUESTION_CLOSERS = (
    "", "", "", "", " I forgot.", " I need it.", " Be brief.", " Please.", " Thank you.",
    " Answer from memory.", " I told you before.", " You know it.", " Just that.",
)  # fmt: skip


def _lower(text: str) -> str:
    """Lower the first letter if a form begins so; names and "I" keep theirs."""
    return text[0].lower() + text[1:] if text.split(" ", 1)[0] in _first_words() else text


@cache
def _first_words() -> frozenset[str]:
    forms = [*MULTI_VALUE_QUESTIONS["train"], *MULTI_QUERY_QUESTIONS["train"]]
    for family in (NEEDLE, PERSON, RELATIVE):
        for by_split in (family.statements, family.corrections, family.questions):
            forms += by_split["train"]
    return frozenset(form.split(" ", 1)[0] for form in forms) - {"I"}


@dataclass(frozen=True)
class Family:
    """One form of fact. `{s}` subject, `{a}` attribute, `{v}` value."""

    name: str
    statements: dict[Split, tuple[str, ...]]
    corrections: dict[Split, tuple[str, ...]]
    questions: dict[Split, tuple[str, ...]]
    answer: str


@dataclass(frozen=True)
class Fact:
    """A subject's attribute with its values, oldest first.

    `corrected` facts have two values, and the newest wins; `multi` facts have several
    that all stand.
    """

    family: Family
    subject: str
    attribute: str
    values: tuple[str, ...]
    corrected: bool = False

    @property
    def current(self) -> tuple[str, ...]:
        """What a right answer must contain."""
        return self.values[-1:] if self.corrected else self.values

    def state(self, rng: random.Random, index: int, split: Split) -> str:
        """The sentence that tells value number `index`."""
        forms = self.family.corrections if self.corrected and index else self.family.statements
        told = rng.choice(forms[split]).format(
            s=self.subject, a=self.attribute, v=self.values[index]
        )
        return _varied(rng, split, told, STATEMENT_OPENERS, STATEMENT_CLOSERS)

    def ask(self, rng: random.Random, split: Split) -> tuple[str, str]:
        """A question and its reference answer."""
        if len(self.current) > 1:
            question = rng.choice(MULTI_VALUE_QUESTIONS[split])
            values = ", ".join(self.current[:-1]) + " and " + self.current[-1]
            answer = "The special magic {a}s for {s} are {v}."
            fields = {"s": self.subject, "a": self.attribute, "v": values}
            return ask(rng, split, question.format(**fields)), answer.format(**fields)
        fields = {"s": self.subject, "a": self.attribute, "v": self.current[0]}
        question = rng.choice(self.family.questions[split])
        return ask(rng, split, question.format(**fields)), self.family.answer.format(**fields)


def _varied(
    rng: random.Random, split: Split, text: str, openers: tuple[str, ...], closers: tuple[str, ...]
) -> str:
    """`text` with an opening and an ending; held-out forms are used as they stand."""
    if split == "held_out":
        return text
    opener = rng.choice(openers)
    begun = text if not opener or opener.endswith(". ") else _lower(text)
    return opener + begun + rng.choice(closers)


def ask(rng: random.Random, split: Split, question: str) -> str:
    """A question, opened and closed in one of many ways."""
    return _varied(rng, split, question, QUESTION_OPENERS, QUESTION_CLOSERS)


NEEDLE = Family(
    "needle",
    statements={
        "train": (
            "One of the special magic {a}s for {s} is: {v}.",
            "The special magic {a} for {s} is {v}.",
            "Remember that the special magic {a} for {s} is {v}.",
            "The magic {a} of {s} is: {v}.",
            "For {s}, the special magic {a} is {v}.",
            "A special magic {a} for {s} is {v}.",
        ),
        "held_out": (
            "One of the special magic {a}s for {s} is: {v}.",
            "Here is a special magic {a} for {s}: {v}.",
            "They say the magic {a} for {s} is {v}.",
        ),
    },
    corrections={
        "train": (
            "Correction: the special magic {a} for {s} is now {v}.",
            "The special magic {a} for {s} has changed to {v}.",
            "From now on the special magic {a} for {s} is {v}.",
            "Actually, the special magic {a} for {s} is {v}.",
        ),
        "held_out": (
            "Update: the special magic {a} for {s} became {v}.",
            "I was wrong, the special magic {a} for {s} is {v}.",
        ),
    },
    questions={
        "train": (
            "What is the special magic {a} for {s}?",
            "What is the special magic {a} for {s} mentioned in the provided text?",
            "Tell me the special magic {a} for {s}.",
            "Which special magic {a} belongs to {s}?",
            "The special magic {a} for {s}, please.",
            "Do you remember the special magic {a} for {s}?",
            "Can you tell me the special magic {a} for {s}?",
            "Could you repeat the magic {a} for {s}?",
            "I want to know the special magic {a} for {s}.",
            "I need the special magic {a} of {s}.",
            "Say the magic {a} of {s}.",
            "What did I tell you about the special magic {a} for {s}?",
            "Find the special magic {a} for {s}.",
            "What was the magic {a} for {s}?",
            "Repeat the special magic {a} of {s}.",
            "May I have the special magic {a} for {s}?",
        ),
        "held_out": (
            "What is the special magic {a} for {s} mentioned in the text?",
            "Can you recall the special magic {a} for {s}?",
            "Give me the magic {a} of {s}.",
        ),
    },
    answer="The special magic {a} for {s} is {v}.",
)

MULTI_VALUE_QUESTIONS: dict[Split, tuple[str, ...]] = {
    "train": (
        "What are all the special magic {a}s for {s}?",
        "What are all the special magic {a}s for {s} mentioned in the provided text?",
        "Tell me all the special magic {a}s for {s}.",
        "List every special magic {a} for {s}.",
    ),
    "held_out": (
        "What are all the special magic {a}s for {s} mentioned in the text?",
        "Give me all the special magic {a}s for {s}.",
    ),
}

MULTI_QUERY_QUESTIONS: dict[Split, tuple[str, ...]] = {
    "train": (
        "What are all the special magic {a}s for {s} mentioned in the provided text?",
        "Tell me the special magic {a}s for {s}.",
        "What are the special magic {a}s for {s}?",
    ),
    "held_out": (
        "What are all the special magic {a}s for {s} mentioned in the text?",
        "Give me the special magic {a}s for {s}.",
    ),
}

PERSON = Family(
    "person",
    statements={
        "train": (
            "{s}'s {a} is {v}.",
            "The {a} of {s} is {v}.",
            "Please note that {s}'s {a} is {v}.",
            "By the way, {s}'s {a} is {v}.",
            "{s} has {v} as {a}.",
            "For {s} the {a} is {v}.",
            "I just learned that {s}'s {a} is {v}.",
            "Remember this: the {a} of {s} is {v}.",
            "{s} told me that the {a} is {v}.",
            "You should know that the {a} of {s} is {v}.",
            "{s} uses {v} as {a}.",
            "We gave {s} the {a} {v}.",
            "About {s}: the {a} is {v}.",
            "{s}, {a} {v}.",
            "I think {s}'s {a} is {v}.",
            "It says here that the {a} of {s} is {v}.",
            "The {a} that belongs to {s} is {v}.",
        ),
        "held_out": (
            "Keep in mind that {s}'s {a} is {v}.",
            "In case you need it, the {a} of {s} is {v}.",
            "As for {s}, the {a} is {v}.",
            "It turns out that {s}'s {a} is {v}.",
        ),
    },
    corrections={
        "train": (
            "Correction: {s}'s {a} is now {v}.",
            "{s}'s {a} has changed to {v}.",
            "Actually, {s}'s {a} is {v}.",
            "From now on the {a} of {s} is {v}.",
            "I made a mistake: the {a} of {s} is {v}.",
            "The {a} of {s} is no longer the same, it is {v}.",
        ),
        "held_out": (
            "Update: the {a} of {s} became {v}.",
            "I was wrong, {s}'s {a} is {v}.",
            "There was a change, {s}'s {a} is now {v}.",
        ),
    },
    questions={
        "train": (
            "What is {s}'s {a}?",
            "What is the {a} of {s}?",
            "Tell me {s}'s {a}.",
            "Do you remember {s}'s {a}?",
            "Which {a} does {s} have?",
            "I forgot the {a} of {s}. What was it?",
            "And {s}'s {a}?",
            "Please give me the {a} of {s}.",
            "Can you tell me {s}'s {a}?",
            "Could you repeat the {a} of {s}?",
            "Would you say {s}'s {a} again?",
            "I want to know the {a} of {s}.",
            "I would like to have {s}'s {a}.",
            "Do you know which {a} {s} has?",
            "Say the {a} of {s}.",
            "Name {s}'s {a}.",
            "May I have the {a} of {s}?",
            "How about {s}'s {a}?",
            "The {a} of {s}?",
            "{s}'s {a}, please.",
            "What did I tell you about the {a} of {s}?",
            "Has {s} a {a}, and which?",
            "Find the {a} of {s} for me.",
            "I am looking for {s}'s {a}.",
            "We need the {a} of {s} at once.",
            "Repeat {s}'s {a} to me.",
        ),
        "held_out": (
            "Can you remind me of {s}'s {a}?",
            "What did I say is the {a} of {s}?",
            "I need {s}'s {a} now.",
            "Could you look up the {a} of {s}?",
        ),
    },
    answer="{s}'s {a} is {v}.",
)

RELATIVE = Family(
    "relative",
    statements={
        "train": (
            "My {s} {a} lives in {v}.",
            "My {s} is {a} and lives in {v}.",
            "Did I tell you that my {s} {a} lives in {v}?",
            "My {s}, whose name is {a}, lives in {v}.",
            "The home of my {s} {a} is in {v}.",
        ),
        "held_out": (
            "I have a {s}, {a}, who lives in {v}.",
            "You should know that my {s} {a} lives in {v}.",
        ),
    },
    corrections={
        "train": (
            "My {s} {a} has moved to {v}.",
            "Correction: my {s} {a} lives in {v} now.",
            "Actually, my {s} {a} lives in {v}.",
        ),
        "held_out": ("There was a change, my {s} {a} moved to {v}.",),
    },
    questions={
        "train": (
            "Where does my {s} live?",
            "In which city does my {s} live?",
            "Do you remember where my {s} lives?",
            "Tell me where my {s} lives.",
            "Can you tell me where my {s} lives?",
            "What is the city of my {s}?",
            "I forgot where my {s} lives.",
            "I want to know where my {s} lives.",
            "Say where my {s} lives.",
            "Which city is my {s} in?",
            "And my {s}, where?",
            "What did I tell you about my {s}?",
        ),
        "held_out": (
            "Where is the home of my {s}?",
            "Can you remind me where my {s} lives?",
        ),
    },
    answer="Your {s} {a} lives in {v}.",
)

NUMBER_ATTRIBUTES = (
    "locker code", "badge number", "room number", "account number", "ticket number",
    "phone extension", "passcode", "order number", "table number", "door code",
    "member number", "flight number", "parcel number", "desk number", "PIN", "plate number",
)  # fmt: skip
WORD_ATTRIBUTES = (
    "password", "code word", "nickname", "team name", "project", "secret word", "street",
    "boat", "horse", "dog", "cat", "ship", "street name", "school",
)  # fmt: skip
RELATIONS = (
    "sister", "brother", "mother", "father", "aunt", "uncle", "cousin", "friend", "neighbour",
    "teacher", "doctor", "boss", "grandmother", "grandfather", "nephew", "niece", "wife",
    "husband", "son", "daughter", "lawyer", "landlord", "tailor", "gardener",
)  # fmt: skip
CITIES = (
    "Porto", "Lisbon", "Madrid", "Seville", "Paris", "Lyon", "London", "Leeds", "Dublin", "Cork",
    "Berlin", "Bonn", "Hamburg", "Munich", "Vienna", "Graz", "Prague", "Brno", "Warsaw", "Gdansk",
    "Riga", "Tallinn", "Oslo", "Bergen", "Stockholm", "Uppsala", "Helsinki", "Turku", "Rome",
    "Milan", "Turin", "Naples", "Athens", "Patras", "Cairo", "Tunis", "Rabat", "Dakar", "Accra",
    "Lagos", "Nairobi", "Mombasa", "Delhi", "Mumbai", "Chennai", "Tokyo", "Osaka", "Kyoto", "Seoul",
    "Busan", "Hanoi", "Manila", "Jakarta", "Sydney", "Perth", "Hobart", "Boston", "Chicago",
    "Denver", "Dallas", "Seattle", "Portland", "Toronto", "Montreal", "Lima", "Cusco", "Quito",
    "Bogota", "Santiago", "Valparaiso", "Havana", "Kingston", "Geneva", "Basel", "Zurich", "Ghent",
)  # fmt: skip
_ONSETS = ("B", "C", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z",
           "Br", "Cl", "Dr", "Fr", "Gr", "Kr", "Pr", "St", "Tr", "Sh", "Th")  # fmt: skip
_MIDDLES = ("a", "e", "i", "o", "u", "ai", "ei", "ia", "io")
_JOINTS = ("l", "n", "r", "m", "s", "d", "v", "b", "rn", "nd", "ll", "ss", "ck", "rt")
_ENDS = ("a", "o", "i", "en", "an", "us", "is", "ette", "in", "ard", "el", "ia", "or", "y")


def side(text: str) -> Split:
    """Which side of the split a word, name or number is on: one in six is held out."""
    digest = hashlib.sha256(text.lower().encode()).digest()
    return "held_out" if digest[0] % 6 == 0 else "train"


@cache
def words(split: Split) -> tuple[str, ...]:
    """English words of 4 to 8 letters on one side of the split."""
    text = resources.files("still_agent.evaluation").joinpath("words.txt").read_text("utf-8")
    return tuple(w for w in text.split() if side(w) == split)


@cache
def cities(split: Split) -> tuple[str, ...]:
    return tuple(c for c in CITIES if side(c) == split)


def _until(split: Split, draw: Callable[[], str]) -> str:
    while side(text := draw()) != split:
        pass
    return text


def person(rng: random.Random, split: Split) -> str:
    """A made-up given name, such as "Brenda" or "Tollus"."""
    return _until(
        split,
        lambda: (
            rng.choice(_ONSETS) + rng.choice(_MIDDLES) + rng.choice(_JOINTS) + rng.choice(_ENDS)
        ),
    )


def number(rng: random.Random, split: Split, digits: int) -> str:
    return _until(split, lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)))


def word(rng: random.Random, split: Split) -> str:
    return rng.choice(words(split))


def word_pair(rng: random.Random, split: Split) -> str:
    """A RULER key: two words, hyphenated."""
    return f"{word(rng, split)}-{word(rng, split)}"


def needle(
    rng: random.Random, split: Split, *, values: int = 1, corrected: bool = False,
    kind: str | None = None,
) -> Fact:  # fmt: skip
    kind = kind or rng.choice(("number", "number", "word"))
    draw = (lambda: number(rng, split, 7)) if kind == "number" else (lambda: word(rng, split))
    count = 2 if corrected else values
    return Fact(NEEDLE, word_pair(rng, split), kind, tuple(draw() for _ in range(count)), corrected)


def personal(
    rng: random.Random, split: Split, *, corrected: bool = False, subject: str | None = None
) -> Fact:
    subject = subject or person(rng, split)
    if rng.random() < 0.6:
        digits = rng.choice((3, 4, 4, 5, 6, 7))
        attribute, draw = rng.choice(NUMBER_ATTRIBUTES), lambda: number(rng, split, digits)
    else:
        attribute, draw = rng.choice(WORD_ATTRIBUTES), lambda: word(rng, split)
    values = tuple(draw() for _ in range(1 + corrected))
    return Fact(PERSON, subject, attribute, values, corrected)


def relative(
    rng: random.Random, split: Split, *, corrected: bool = False, relation: str | None = None
) -> Fact:
    relation = relation or rng.choice(RELATIONS)
    if split == "train" and rng.random() < 0.5:  # so that any word can be a city
        values = tuple(person(rng, split) for _ in range(1 + corrected))
    else:
        values = tuple(rng.sample(cities(split), 1 + corrected))
    return Fact(RELATIVE, relation, person(rng, split), values, corrected)


def facts(
    rng: random.Random, split: Split, count: int, *,
    corrected: float = 0.2, multi: float = 0.1, shared_names: float = 0.0,
) -> list[Fact]:  # fmt: skip
    """`count` facts that do not collide: no two share a subject and an attribute.

    `corrected` and `multi` are shares of facts; `shared_names` is the share of personal
    facts that take an earlier fact's name with another attribute.
    """
    relations = rng.sample(RELATIONS, len(RELATIONS))
    found: list[Fact] = []
    taken: set[tuple[str, str]] = set()
    while len(found) < count:
        fixed = rng.random() < corrected
        draw = rng.random()
        if draw < 0.45:
            values = rng.randint(2, 4) if not fixed and rng.random() < multi * 2 else 1
            fact = needle(rng, split, values=values, corrected=fixed)
        elif draw < 0.9 or not relations:
            names = [f.subject for f in found if f.family is PERSON]
            shared = names and rng.random() < shared_names
            fact = personal(
                rng, split, corrected=fixed, subject=rng.choice(names) if shared else None
            )
            if not shared and fact.subject in names:
                continue
        else:
            fact = relative(rng, split, corrected=fixed, relation=relations.pop())
        if (fact.subject, fact.attribute) in taken or len(set(fact.values)) < len(fact.values):
            continue
        taken.add((fact.subject, fact.attribute))
        found.append(fact)
    return found
