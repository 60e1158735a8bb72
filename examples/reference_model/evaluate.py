"""What the reference model can do with its full cache, on words, names, values, phrasings and
prose that it never saw in training.

    python examples/reference_model/evaluate.py [--model DIR] [--length 1800] [--json]

Each task builds a conversation of about `--length` tokens over a held-out book, and asks each
question of it anew (greedy). A reply is right if it contains every expected string.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from still_agent import Agent, Budget
from still_agent.evaluation import facts
from still_agent.evaluation.dialogues import Prose, Question, dialogue, multi_query_question
from still_agent.evaluation.exam import Exam
from still_agent.evaluation.facts import Fact
from still_agent.evaluation.phrasings import PERSON, RELATIVE, Family
from still_agent.evaluation.trajectory import Answer, Asked, book

Facts = Callable[[random.Random], list[Fact]]


def needles(count: int, kind: str | None = None, values: int = 1) -> Facts:
    return lambda rng: [
        facts.needle(rng, "held_out", kind=kind, values=values) for _ in range(count)
    ]


def only(family: Family, count: int, **how: float) -> Facts:
    def draw(rng: random.Random) -> list[Fact]:
        drawn = facts.facts(rng, "held_out", count * 4, multi=0.0, **how)
        return [f for f in drawn if f.family is family][:count]

    return draw


TASKS: dict[str, Facts] = {
    "needle, single, 7 digits": needles(1, "number"),
    "needle, single, word": needles(1, "word"),
    "needle, multi-key, 7 digits (16 keys)": needles(16, "number"),
    "needle, multi-key, word (16 keys)": needles(16, "word"),
    "needle, multi-value (4 values)": needles(1, None, values=4),
    "needle, multi-query (4 keys)": needles(4, "number"),
    "chat, attributes of people (16)": only(PERSON, 16, corrected=0.0),
    "chat, relatives (8)": only(RELATIVE, 8, corrected=0.0),
    "chat, corrected facts (8)": lambda rng: facts.facts(
        rng, "held_out", 8, corrected=1.0, multi=0.0
    ),
    "chat, several attributes of one name (16)": only(PERSON, 16, corrected=0.0, shared_names=0.7),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="reference")
    p.add_argument("--length", type=int, default=1800)
    p.add_argument("--contexts", type=int, default=6)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    agent = Agent.load(args.model, compactor="streaming", budget=Budget(slots=2048))
    prose = Prose([book()])
    found = {}
    for name, draw in TASKS.items():
        by_seed = []
        for seed in range(args.seeds):
            right = total = 0
            for n in range(args.contexts):
                rng = random.Random(10_000 * seed + n)
                told = draw(rng)
                talk = dialogue(rng, "held_out", prose, tokens=args.length, told=told,
                                asked=4, multi_query=0.0)  # fmt: skip
                asked = talk.exam
                if "multi-query" in name:
                    asked = [multi_query_question(rng, "held_out", told)]
                for question in asked:
                    right += reply(agent, f"{name} {seed} {n}", talk.context, question).right
                    total += 1
            by_seed.append(right / total)
        found[name] = by_seed
        print(
            f"{name:44} {statistics.mean(by_seed):.3f}  {[round(x, 3) for x in by_seed]}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def reply(agent: Agent, session: str, context: list, question: Question) -> Answer:
    """One question on top of a conversation, each line fed as it stands."""
    if session not in {s.name for s in agent.sessions()}:
        system = context[0].text if context[0].role == "system" else None
        chat = agent.session(session, system=system)
        for line in context:
            if line.role != "system":
                chat.read(line.text, role=line.role)
    said = Exam(agent, session).ask(question.text, max_tokens=64)
    return Answer.to(Asked(question, 0.0), said)


if __name__ == "__main__":
    main()
