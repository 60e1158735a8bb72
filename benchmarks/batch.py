"""Tokens a second of many sessions in one batch, against the same sessions one after another.

Each session is a long conversation whose budget is full, compacted memory included, and writes
one reply of the same number of tokens; timed from its first piece to its end, with all the work
of a reply: forward passes, choice of the next token, text. In one batch: each in a thread of its
own, as a server runs them. Both take turns in the same process, and of each the fastest run is
reported, for what else a machine does only adds. Bare passes: the same without threads, sampling
and text.

The floor is what no way of decoding in one pass could beat on this machine: a pass reads all
weights and every slot held once, at the bandwidth measured here, and does its multiplications at
the rate measured here; the larger of the two times counts.

    python benchmarks/batch.py --sessions 1 4 8 16 32 --slots 1024 256 --threads 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from still_agent import Agent, Budget
from still_agent.batch import thread_of
from still_agent.decode import answer
from still_agent.evaluation.trajectory import book
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling

REPLY = 16  # slots that a reply takes beside its tokens: the message, opening and closing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="reference", help="or a folder")
    parser.add_argument("--compactor", help="a folder or a training-free method")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--tokens", type=int, default=64, help="of a reply, at most")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def seconds_of(work: Callable[[], object], runs: int = 5) -> float:
    """The fastest of several runs."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def machine() -> tuple[float, float]:
    """Bytes a second that are read from memory, and fp32 operations a second."""
    large, square = torch.ones(2**26), torch.ones(1024, 1024)
    read = large.nbytes / seconds_of(large.sum)
    return read, 2 * 1024**3 / seconds_of(lambda: square @ square)


def filled(agent: Agent, most: int, tokens: int) -> list[RollingState]:
    """States that have read the same text, with just the room for one reply."""
    states = [RollingState(agent.model, agent.compactor, agent.budget) for _ in range(most)]
    ids = agent.model.tokenizer.encode(book())
    first, left, at = states[0], tokens + REPLY, 0
    while at < 2 * agent.budget.slots or first.free < left:
        n = first.free + 1  # the last one of these makes room
        first.extend(ids[at : at + n])
        at += n
    if first.free > left:
        first.extend(ids[at : at + first.free - left])
    for state in states[1:]:
        state.restore(first.checkpoint())
    return states


def floor(state: RollingState, rows: int, rates: tuple[float, float]) -> float:
    """Seconds that a pass of so many rows takes at least."""
    model = state.model
    weights = sum(p.numel() for p in model.model.parameters())
    held = state.slots * model.bytes_per_slot
    attended = 4 * state.slots * model.layers * model.heads * model.head_dim
    read = weights * model.dtype.itemsize + rows * held
    return max(read / rates[0], rows * (2 * weights + attended) / rates[1])


def measure(states: Sequence[RollingState], tokens: int, runs: int) -> tuple[float, float]:
    """Seconds of all replies from their first piece on: one after another, together."""
    model = states[0].model
    saved = states[0].checkpoint()
    ends = torch.zeros(model.vocab_size)
    ends[list(model.tokenizer.eos_ids)] = -torch.inf
    sampling = Sampling(max_tokens=tokens)
    message = model.tokenizer.message("user", "Go on.")

    def choose(logits: Tensor) -> int:
        return int((logits + ends).argmax())  # no reply ends early

    times: dict[str, list[float]] = {"alone": [], "together": []}
    with ThreadPoolExecutor(len(states)) as pool:
        for _ in range(runs + 1):  # the first is no measurement
            for name, mapped in (("alone", map), ("together", pool.map)):
                for state in states:
                    state.restore(saved)
                replies = [answer(s, model.tokenizer, message, sampling, choose) for s in states]
                for reply in replies:
                    next(reply)
                begin = time.perf_counter()
                for _ in mapped(list, replies):  # type: ignore[operator]
                    pass
                times[name].append(time.perf_counter() - begin)
    for state in states:  # so that the next to be measured has no more to compact
        state.restore(saved)
    alone, together = (seconds[1:] for seconds in times.values())
    return min(alone), min(together)


def passes(states: Sequence[RollingState], runs: int) -> float:
    """Seconds of one token for each in a pass of its own, over those of one pass for all.

    To be called in the model's thread, as `machine`: of any other's OpenMP team all get slower.
    """
    model, token = states[0].model, 7
    caches, at = [s.cache for s in states], [s.position for s in states]
    one: list[float] = []
    many: list[float] = []
    for _ in range(5 * runs + 1):
        begin = time.perf_counter()
        for cache, position in zip(caches, at, strict=True):
            model.forward([token], cache, position)
        middle = time.perf_counter()
        for cache in caches:
            cache.crop(-1)
        again = time.perf_counter()
        model.forward_rows([token] * len(caches), caches, at)
        one.append(middle - begin)
        many.append(time.perf_counter() - again)
        for cache in caches:
            cache.crop(-1)
    return min(one) / min(many)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rates = None
    rows = []
    for slots in args.slots:
        with Agent.load(args.model, compactor=args.compactor, budget=Budget(slots=slots)) as agent:
            thread = thread_of(agent.model)
            rates = rates or thread.run(machine)
            most = min(args.tokens, agent.budget.shares(0).chunk - REPLY - 1)
            states = filled(agent, max(args.sessions), most)
            for sessions in args.sessions:
                bare = thread.run(partial(passes, states[:sessions], args.runs))
                alone, together = measure(states[:sessions], most, args.runs)
                tokens = sessions * most
                least = floor(states[0], sessions, rates) * most
                rows.append(
                    {
                        "slots": slots,
                        "sessions": sessions,
                        "alone": tokens / alone,
                        "together": tokens / together,
                        "ratio": alone / together,
                        "ratio of passes": bare,
                        "floor": tokens / least,
                        "of floor": together / least,
                    }
                )
                if not args.json:
                    print(
                        f"{sessions:3} sessions, {slots:5,} slots: {tokens / alone:6,.0f} tokens/s "
                        f"one after another, {tokens / together:6,.0f} in one batch: "
                        f"x{alone / together:.2f} (bare passes: x{bare:.2f}); "
                        f"floor {tokens / least:6,.0f} tokens/s"
                    )
    assert rates is not None  # an option that takes one or more
    about = {"threads": args.threads, "gb_per_s": rates[0] / 1e9, "gflop_per_s": rates[1] / 1e9}
    if args.json:
        print(json.dumps({**about, "rows": rows}))
    else:
        print(", ".join(f"{name} {value:,.1f}" for name, value in about.items()))


if __name__ == "__main__":
    main()
