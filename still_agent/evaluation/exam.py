"""Questions asked of what is remembered, without its noticing.

Each is asked of a checkpoint (a session's newest one, or any other), in a state of the exam's own.
So no question sees another, and nothing is written. What a model says within its reasoning is no
answer; it is asked to go without, unless tokens of it are granted beside those of the reply.
"""

from __future__ import annotations

from still_agent.agent import Agent
from still_agent.budget import Budget
from still_agent.decode import BLOCK, answer
from still_agent.models.frozen import FrozenModel
from still_agent.models.tokenizers import Tokenizer
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_memory.checkpoint import Checkpoint
from still_memory.compactors import StreamingCompactor
from still_memory.errors import UnknownSessionError

LONGEST_REPLY = 40  # tokens


class Exam:
    """A stored session's state, to be asked any number of questions."""

    def __init__(self, agent: Agent, session: str) -> None:
        head = agent.store.head(session)
        if head is None:
            raise UnknownSessionError(f"there is no session {session!r} in this store")
        self._tokenizer = agent.model.tokenizer
        self._checkpoint = agent.store.load(head, device=agent.model.device)
        self._state = RollingState(
            agent.model, agent.compactor, agent.budget, codec=agent.store.codec
        )

    def ask(self, question: str, *, max_tokens: int = LONGEST_REPLY) -> str:
        """The greedy reply."""
        self._state.restore(self._checkpoint)
        message = self._tokenizer.message("user", question)
        greedy = Sampling(max_tokens=max_tokens)
        pieces = answer(self._state, self._tokenizer, message, greedy, reasoning=0)
        return "".join(pieces).strip()


def reply(
    model: FrozenModel, remembered: Checkpoint | None, text: str, sampling: Sampling,
    reasoning: int = 0,
) -> str:  # fmt: skip
    """What `model` replies to a message on top of what is remembered, or to it alone.

    `reasoning`: the most tokens of it, none of which is in the reply, nor counts as one of its
    `max_tokens`. Raises BudgetError if the window cannot hold all of it: nothing is compacted here.
    """
    tokenizer = model.tokenizer
    message = tokenizer.message("user", text)
    room = room_for(tokenizer, text, sampling.max_tokens, reasoning)
    held = len(tokenizer.start) if remembered is None else remembered.positions
    if remembered is None:
        message = [*tokenizer.start, *message]
    state = RollingState(model, StreamingCompactor(), Budget(slots=max(16, held + room)))
    if remembered is not None:
        state.restore(remembered)
    return "".join(answer(state, tokenizer, message, sampling, reasoning=reasoning))


def room_for(tokenizer: Tokenizer, text: str, longest: int, reasoning: int = 0) -> int:
    """Slots that a message takes with a reply of `longest` tokens, and reasoning before it."""
    opening = tokenizer.reply_opening(thinking=reasoning != 0)
    return len(tokenizer.message("user", text)) + len(opening) + reasoning + BLOCK + longest
