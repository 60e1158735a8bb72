"""Turns taken in again from the ledger: where the store has no state of them, or a new one is due.

What a state is depends on how its tokens came in: a message in one run, a reply token by token,
reasoning fed and taken back. So a turn is taken in again by the steps that took it in first:
a reply by the very code that made it, its tokens chosen by the ledger, each in a pass of its own.
With the same model, compactor, budget and machine the state is the same, bit for bit; but for
what follows a reply that shared passes with others, whose last bits they shaped. With another
budget or compactor it is what this agent would have made of the same tokens; the ledger tells
(`Restored.differs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from torch import Tensor

from still_agent.decode import answer
from still_agent.events import OnReplay
from still_agent.models.tokenizers import Tokenizer
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_agent.steps import Log, Steps, differences
from still_agent.tools import FORMATS
from still_memory.errors import DamageError
from still_memory.records import TurnRecord


@dataclass(frozen=True)
class Restored:
    """How a state was come by.

    With no replayed token it is the saved state itself, bit for bit.
    """

    reused_tokens: int  # logical tokens of the state that it went on from
    replayed_tokens: int  # taken in again after it, from the ledger
    compactions: int  # of the replay
    differs: tuple[str, ...] = ()  # what went otherwise than logged, see `faithful`

    @property
    def faithful(self) -> bool:
        """Whether all went as the ledger tells: text, boundaries, compactor, budget, tokens.

        And alone: "batched" differs where a reply was decoded in one batch with others, which no
        replay can do again to the last bit. A turn without compactions logs neither compactor nor
        budget: they did not matter to it.
        """
        return not self.differs


@dataclass(frozen=True)
class Retold:
    """An exchange that was taken in again: a message and the reply to it, or a message alone."""

    turns: tuple[TurnRecord, ...]
    log: Log  # its compactions, as they came now
    differs: frozenset[str]


def replay(
    state: RollingState,
    tokenizer: Tokenizer,
    turns: Sequence[TurnRecord],
    steps: Steps,
    on_replay: OnReplay | None = None,
) -> tuple[str, ...]:
    """Take `turns` in after what `state` holds; what went otherwise than the ledger tells.

    DamageError, before anything is computed, for tokens that the model does not have. Whatever
    `on_replay` and the state's compactions raise leaves the state undefined.
    """
    require_known(turns, state.model.vocab_size, state.model.name)
    done, total = 0, tokens_of(turns)
    differs: set[str] = set()
    for retold in retell(state, tokenizer, turns, steps):
        differs |= retold.differs
        done += tokens_of(retold.turns)
        if on_replay is not None:
            on_replay(done, total)
    return tuple(sorted(differs))


def retell(
    state: RollingState, tokenizer: Tokenizer, turns: Sequence[TurnRecord], steps: Steps
) -> Iterator[Retold]:
    """Take `turns` in, exchange by exchange; after each the state is whole and sealed."""
    for asked, told in _exchanges(turns):
        steps.begin()
        differs: set[str] = set()
        if told is not None:
            text = _tell_again(state, tokenizer, asked.tokens, told)
            differs |= {"text"} if text != told.text else set()
            differs |= {"batched"} if told.usage.get("batched") else set()
        elif asked.tokens:
            state.extend(asked.tokens)
        state.checkpoint()  # the open run is sealed where it was then
        log = steps.log()
        differs |= differences((told or asked).usage, log)
        yield Retold((asked,) if told is None else (asked, told), log, frozenset(differs))


def require_known(turns: Sequence[TurnRecord], vocab_size: int, model: str) -> None:
    """DamageError for tokens that the model does not have."""
    for turn in turns:
        if not all(token < vocab_size for token in turn.tokens):
            raise DamageError(
                f"turn {turn.number} has tokens that the model {model!r} does not know: "
                "it was not made by this model; go back to another turn, or begin a new session"
            )


def tokens_of(turns: Sequence[TurnRecord]) -> int:
    return sum(len(turn.tokens) for turn in turns)


def _exchanges(turns: Sequence[TurnRecord]) -> Iterator[tuple[TurnRecord, TurnRecord | None]]:
    """Each message with the reply to it; alone, if it was only read."""
    at = 0
    while at < len(turns):
        asked, told = turns[at], turns[at + 1] if at + 1 < len(turns) else None
        told = told if told is not None and generated(told) else None
        yield asked, told
        at += 1 if told is None else 2


def generated(turn: TurnRecord) -> int:
    """How many tokens the model chose for this turn; 0 for one that was read."""
    count = turn.usage.get("generated_tokens")
    return count if isinstance(count, int) else 0


def _tell_again(
    state: RollingState, tokenizer: Tokenizer, message: Sequence[int], told: TurnRecord
) -> str:
    """A reply, chosen by the ledger; its text."""
    count = generated(told)
    said = iter(told.tokens[len(tokenizer.reply_opening()) :][:count])
    end = min(tokenizer.eos_ids)  # which one ended a reply is not kept, for none is ever fed

    def choose(_: Tensor) -> int:
        return next(said, end)

    sampling = Sampling(max_tokens=count, stop=_stop(told.usage.get("stop")))
    replying = answer(state, tokenizer, message, sampling, choose)
    state.alone = True
    try:
        while True:
            next(replying)
    except StopIteration as found:
        return _as_told(found.value.text, told.usage.get("tools"))
    finally:
        state.alone = False


def _as_told(text: str, tools: JsonValue) -> str:
    """A reply as the ledger has it: one with tool calls in the form of its model."""
    if not (isinstance(tools, str) and tools in FORMATS):
        return text
    form = FORMATS[tools]
    return form.text(*form.parse(text))


def _stop(logged: JsonValue) -> tuple[str, ...]:
    strings = logged if isinstance(logged, list) else []
    return tuple(s for s in strings if isinstance(s, str) and s)
