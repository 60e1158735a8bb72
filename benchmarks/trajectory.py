"""Recall in the demo's conversation: how many facts, which schedule, which seed, how old.

    python benchmarks/trajectory.py [--facts 40 80 160 320] [--seeds 0 1 2] [--json FILE]
        [--plot FILE] [--budgets "schedule=rolling" "schedule=tiered" ...] [--compactor ...]

The same scripts as `still-agent demo --facts N --seed S`, in one process and without the kill
(the state is bit-equal with it). Every run of a count and a seed reads the same words and is
asked the same questions. The ruler, "facts alone", has the same model read only the statements,
newest last, with nothing compacted: what it could answer if memory lost nothing and prose cost
nothing. Where they do not fit its window, no ruler is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from still_agent import Agent, Budget
from still_agent.ephemeral import EphemeralStore
from still_agent.evaluation.exam import Exam
from still_agent.evaluation.trajectory import (
    SYSTEM,
    Answer,
    Script,
    Trajectory,
    recall,
    recall_by_age,
    trajectory,
)

Row = dict[str, Any]
RULER = "facts alone"


def budget(text: str) -> Budget:
    """`slots=1024,schedule=tiered` as a Budget."""
    given = dict(part.split("=", 1) for part in text.split(","))
    return Budget.model_validate({k: v if k == "schedule" else int(v) for k, v in given.items()})


def asked(agent: Agent, session: str, script: Trajectory) -> list[Answer]:
    exam = Exam(agent, session)
    return [Answer.to(q, exam.ask(q.question.text)) for q in script.exam]


def lived(agent: Agent, script: Trajectory) -> tuple[list[Answer], int]:
    """Read the whole conversation, then answer; and how many rounds it took."""
    with agent.session("trajectory", system=SYSTEM) as chat:
        for step in script.steps:
            if step.answered:
                chat.send(step.text, max_tokens=40)
            else:
                chat.read(step.text)
        rounds = chat.stats.rounds
    return asked(agent, "trajectory", script), rounds


def told_alone(agent: Agent, script: Trajectory) -> list[Answer] | None:
    """The same facts with nothing around them, in phrasings drawn anew; None if too long."""
    rng = random.Random(0)
    facts = [*(q.question.fact for q in script.exam if q.question.fact), *script.decoys]
    order = rng.sample(facts, len(facts))
    rounds = max(len(f.values) for f in facts)
    said = [f.state(rng, i, "held_out") for i in range(rounds) for f in order if i < len(f.values)]
    with agent.session("alone", system=SYSTEM) as chat:
        chat.read(" ".join(said))
        if chat.stats.rounds:
            return None
    return asked(agent, "alone", script)


def summary(name: str, facts: int, seed: int, answers: list[Answer]) -> Row:
    return {
        "budget": name,
        "facts": facts,
        "seed": seed,
        "recall": recall(answers),
        "corrected": recall([a for a in answers if a.corrected]),
        "by_age": [share for _, share in recall_by_age(answers)],
        "wrong": [(a.question, a.expected, a.reply) for a in answers if not a.right],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="reference")
    p.add_argument("--compactor", help="a folder or a method; default: the packaged one")
    p.add_argument("--facts", type=int, nargs="+", default=[40])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--budgets", nargs="+", default=["schedule=rolling", "schedule=tiered"])
    p.add_argument("--wrong", action="store_true", help="show the answers that were wrong")
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path, help="recall by age, a PNG")
    args = p.parse_args()
    agent = Agent.load(args.model, compactor=args.compactor)
    rows: list[Row] = []
    for count in args.facts:
        for name in (RULER, *args.budgets):
            by_seed = []
            for seed in args.seeds:
                script = trajectory(Script(facts=count, seed=seed))
                row = run(agent, name, script, count, seed)
                if row is not None:
                    by_seed.append(row)
                    print(line(f"{name}, seed {seed}", count, [row]), flush=True)
                    for question, expected, reply in row["wrong"] if args.wrong else ():
                        print(f"    {question}  {expected}  {reply!r}")
            rows += by_seed
            if len(by_seed) > 1:
                print(line(f"{name}, all {len(by_seed)} seeds", count, by_seed), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


def run(agent: Agent, name: str, script: Trajectory, facts: int, seed: int) -> Row | None:
    if name == RULER:
        window = Budget(slots=agent.model.window)
        answers = told_alone(with_budget(agent, window), script)
        return None if answers is None else summary(name, facts, seed, answers)
    begun = time.perf_counter()
    answers, rounds = lived(with_budget(agent, budget(name)), script)
    found = summary(name, facts, seed, answers)
    return {**found, "rounds": rounds, "seconds": round(time.perf_counter() - begun, 1)}


def with_budget(agent: Agent, budget: Budget) -> Agent:
    """The same model and compactor with a budget and an (empty) store of its own."""
    return Agent(agent.model, agent.compactor, EphemeralStore(), budget=budget)


def line(name: str, facts: int, rows: list[Row]) -> str:
    ages = [[r["by_age"][q] for r in rows if r["by_age"][q] is not None] for q in range(4)]
    shown = " ".join(f"{statistics.mean(a):4.0%}" if a else "   –" for a in ages)
    shares = [r["recall"] for r in rows]
    spread = f" ({min(shares):.0%} to {max(shares):.0%})" if len(rows) > 1 else ""
    mean = f"{statistics.mean(shares):.1%}{spread}"
    return f"{facts:4} facts  {name:44} {mean:22} by age, oldest first: {shown}"


def plot(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({r["facts"] for r in rows})
    figure = Figure(figsize=(4 * len(counts), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for name in dict.fromkeys(r["budget"] for r in rows if r["budget"] != RULER):
            runs = [r["by_age"] for r in rows if (r["facts"], r["budget"]) == (count, name)]
            ages = [[run[q] for run in runs if run[q] is not None] for q in range(4)]
            means = [statistics.mean(a) if a else None for a in ages]
            axes.plot(("oldest", "2nd", "3rd", "newest"), means, marker="o", label=name)
        axes.set(title=f"{count} facts", ylim=(0, 1.02), xlabel="quarter", ylabel="recall")
        axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
