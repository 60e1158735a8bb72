"""One reply, token by token: prefill, sample, and leave the state as the turn should end.

Every token of a turn has been fed when it ends, its closing included, so that a state needs
nothing beside its slots to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from still_agent.events import OnToken
from still_agent.models.tokenizers import Tokenizer
from still_agent.reply import Draft, Finish
from still_agent.rolling import RollingState
from still_agent.sampling import Sampler, Sampling

Choose = Callable[[Tensor], int]  # from logits (vocab,) to the next token

BLOCK = 2  # tokens that open and close a reasoning block


@dataclass(frozen=True)
class Answer:
    """What came out of one reply."""

    text: str
    reasoning: str
    finish: Finish
    tokens: list[int]  # as generated, reasoning included, framed by opening and closing
    prefilled: int
    generated: int


def answer(
    state: RollingState,
    tokenizer: Tokenizer,
    message: Sequence[int],
    sampling: Sampling,
    choose: Choose | None = None,
    reasoning: int | None = None,
    on_token: OnToken | None = None,
) -> Generator[str, None, Answer]:
    """Take in a message and reply to it: text pieces, then the `Answer`.

    `choose` takes logits `(vocab,)` to the next token; by default `sampling` does. `reasoning`:
    the most tokens of it, beside `sampling.max_tokens` of what is shown; at 0 the reply opens
    without, where the template knows how. By default reasoning is part of `max_tokens`. Nothing
    undoes what is abandoned half way: that is for whoever holds a checkpoint.
    """
    opening = tokenizer.reply_opening(thinking=reasoning != 0)
    draft = Draft(tokenizer, sampling.stop, opening)
    choose = choose or Sampler(sampling)
    # A place to go back to, where something of the reply may have to leave memory again.
    mark, marked = None, 0
    if sampling.stop or draft.opening != opening:
        logits = state.extend(message)
        mark = state.checkpoint()
        logits = state.extend(opening) if opening else logits
    else:
        logits = state.extend([*message, *opening])

    ids: list[int] = []
    fed = list(opening)
    finish: Finish = "length"
    most = sampling.max_tokens + (0 if reasoning is None else reasoning + BLOCK)
    while len(ids) < most and draft.shown_tokens < sampling.max_tokens:
        if ids:
            logits = state.step(ids[-1])
            fed.append(ids[-1])
        if on_token is not None:
            on_token()
        token = choose(logits)
        if reasoning is not None:
            token = draft.bounded(token, reasoning)
        ids.append(token)
        if token in tokenizer.eos_ids:
            finish = "stop"
            break
        if mark is None and draft.opens_thinking(token):
            mark, marked = state.checkpoint(), draft.so_far()
        piece = draft.push(token)
        if draft.stopped:
            finish = "stop"
            break
        if piece:
            yield piece
    if piece := draft.finish():
        yield piece

    remembered = draft.remembered()
    prefilled = len(message) + len(opening)
    if mark is not None and remembered[: len(fed)] != fed:
        state.restore(mark)
        fed = remembered[:marked]
    elif remembered[len(fed) : len(fed) + 1] == ids[-1:]:
        prefilled -= 1  # the last token is generated, and fed with the closing
    if rest := remembered[len(fed) :]:
        state.extend(rest)
    body = ids[:-1] if ids[-1] in tokenizer.eos_ids else ids
    closing = remembered[draft.so_far() :]
    return Answer(
        text=draft.text,
        reasoning=draft.reasoning,
        finish=finish,
        tokens=[*opening, *body, *closing],
        prefilled=prefilled + len(rest),
        generated=len(ids),
    )
