"""What a codec costs and saves: bytes in the store, logits, and recall after a long conversation.

    python benchmarks/codecs.py --tokens 12000 --facts 40 --seeds 1

Each codec lives the same scripted conversation (a book with facts amid it, see `still-agent demo`)
from its first token to its last, rounding in every round, and is asked the same questions: its
recall. Then the state that the exact conversation has ended in is rounded once, and reads on in the
book: how far its logits are from those of the exact state, token by token. That is the rounding
alone; which words a lived conversation holds on to is in the recall. Bytes are those of the
newest state's spans in the store, a slot and a turn's raw token apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from still_agent import Agent, Budget
from still_agent.compactor import choose_compactor
from still_agent.evaluation.exam import LONGEST_REPLY, Exam
from still_agent.evaluation.trajectory import SYSTEM, Answer, Script, book, recall, trajectory
from still_agent.models import load_model
from still_agent.rolling import RollingState
from still_memory.checkpoint import Checkpoint
from still_memory.codec import CODECS, EXACT, encode, settled
from still_memory.span import Span
from still_memory.store import MemoryStore

READ_ON = 256  # tokens whose logits are compared


def lived(agent: Agent, script: Script) -> tuple[Checkpoint, list[Answer]]:
    """The last state of the whole conversation, and what was answered."""
    told = trajectory(script)
    chat = agent.session("x", system=SYSTEM)
    for step in told.steps:
        if step.answered:
            chat.send(step.text, max_tokens=LONGEST_REPLY)
        else:
            chat.read(step.text)
    head = agent.store.head("x")
    assert head is not None
    exam = Exam(agent, "x")
    return agent.store.load(head), [Answer.to(a, exam.ask(a.question.text)) for a in told.exam]


def logits_after(agent: Agent, state: Checkpoint, ids: Sequence[int], codec: str) -> Tensor:
    """`(tokens, vocab)`, read token by token after a state whose spans are settled anew."""
    live = RollingState(agent.model, agent.compactor, agent.budget, codec=codec)
    entries = tuple(replace(e, span=settled(e.span, codec)) for e in state.entries)
    live.restore(replace(state, entries=entries))
    return torch.stack([live.step(token) for token in ids])


def apart(exact: Tensor, near: Tensor) -> dict[str, float]:
    """Largest and mean difference of logits, mean divergence, share of equal greedy choices."""
    error = (exact - near).abs()
    p, q = exact.log_softmax(-1), near.log_softmax(-1)
    return {
        "logit_error_max": error.max().item(),
        "logit_error_mean": error.mean().item(),
        "kl_nats": (p.exp() * (p - q)).sum(-1).mean().item(),
        "same_choice": (exact.argmax(-1) == near.argmax(-1)).float().mean().item(),
    }


def sizes(state: Checkpoint) -> dict[str, float]:
    """Bytes of the state's spans as they are stored; of a slot of memory, of a raw token."""

    def stored(spans: Sequence[Span]) -> int:
        return sum(len(d) for s in spans for d in s.coded or map(encode, s.layers))

    spans = list({e.span: None for e in state.entries})
    raw, compact = ([s for s in spans if s.raw == kind] for kind in (True, False))
    return {
        "state_bytes": stored(spans),
        "bytes_a_slot": stored(compact) / max(1, sum(s.slots for s in compact)),
        "bytes_a_raw_token": stored(raw) / max(1, sum(s.tokens for s in raw)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--compactor", help="a folder or a training-free method")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    model = load_model(args.model)
    compactor = choose_compactor(args.compactor, args.model, model)
    ids = model.tokenizer.encode(book()[-20_000:])
    names = [EXACT, *(c for c in args.codecs if c != EXACT)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(args.seeds):
        script = Script(facts=args.facts, tokens=args.tokens, seed=seed)
        for codec in names:
            with tempfile.TemporaryDirectory() as folder:
                store = MemoryStore(Path(folder) / "x.db", codec=codec)
                budget = Budget(slots=args.slots)
                with Agent(model, compactor, store, budget=budget) as agent:
                    state, answers = lived(agent, script)
                    if codec == EXACT:
                        reference = state
                        some = ids[: min(READ_ON, agent.budget.slots - state.slots)]
                        exact = logits_after(agent, state, some, EXACT)
                    near = logits_after(agent, reference, some, codec)
            row = {"recall": recall(answers) or 0.0, **sizes(state), **apart(exact, near)}
            found[codec].append(row)
            if not args.json:
                told = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                print(f"seed {seed}, {codec}: {told}", flush=True)
    means = {
        codec: {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        for codec, rows in found.items()
    }
    if args.json:
        print(json.dumps({"tokens": args.tokens, "facts": args.facts, "codecs": means}))
        return
    for codec, row in means.items():
        print(
            f"{codec:6} recall {row['recall']:.3f}, state {row['state_bytes'] / 1e6:.3f} MB "
            f"({row['bytes_a_slot']:.0f} bytes a slot, {row['bytes_a_raw_token']:.0f} a raw "
            f"token); logits off by {row['logit_error_mean']:.4f} in the mean, "
            f"{row['logit_error_max']:.3f} at most, {row['kl_nats']:.5f} nats, same choice "
            f"{row['same_choice']:.1%}"
        )


if __name__ == "__main__":
    main()
