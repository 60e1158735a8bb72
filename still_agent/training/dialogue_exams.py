"""Exams about generated dialogues: the reference compactor's training and test data."""

from __future__ import annotations

import random

from still_agent.evaluation import facts
from still_agent.evaluation.dialogues import Prose, Question, dialogue, render
from still_agent.evaluation.phrasings import Split
from still_agent.models.tokenizers import Tokenizer
from still_agent.training.exams import Exams, pack

QUESTIONS = 20  # most questions that one exam asks


def dialogue_exams(
    rng: random.Random, split: Split, prose: Prose, tokenizer: Tokenizer, rows: int, length: int,
    density: tuple[float, float],
) -> Exams:  # fmt: skip
    """Contexts of exactly `length` tokens, with exams on what they tell.

    `density`: facts told per 100 tokens, drawn evenly between the two.
    """
    packed: list[tuple[list[int], list[int], list[bool]]] = []
    while len(packed) < rows:
        count = max(2, round(length / 100 * rng.uniform(*density)))
        told = facts.facts(rng, split, count, shared_names=0.1 if split == "train" else 0.0)
        talk = dialogue(
            rng, split, prose, tokens=int(length * 1.05) + 20, told=told, asked=QUESTIONS
        )
        context = [*tokenizer.start, *render(tokenizer, talk.context)[0]]
        if len(context) < length:
            continue
        text = tokenizer.decode(context[:length])  # the end is cut off
        fair = [q for q in talk.exam if _told_in_full(q, text)]
        if fair:
            ids, said = render(tokenizer, [line for q in fair for line in q.lines()])
            packed.append((context[:length], ids, said))
    return pack(packed)


def _told_in_full(question: Question, text: str) -> bool:
    needed = question.expected if question.fact is None else question.fact.values
    return all(value in text for value in needed)
