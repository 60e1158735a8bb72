"""A session's state as it stood after an earlier turn: for a rewind, and for a fork."""

from __future__ import annotations

from dataclasses import replace

from still_agent.ephemeral import Store
from still_agent.events import OnReplay
from still_agent.replay import Restored, replay
from still_agent.rolling import RollingState
from still_agent.steps import Steps
from still_memory.checkpoint import Checkpoint
from still_memory.errors import InputError
from still_memory.records import Head


def stand_at(
    state: RollingState,
    steps: Steps,
    store: Store,
    head: Head,
    at: int,
    on_replay: OnReplay | None = None,
) -> tuple[Head, Restored]:
    """Make `state` that after turn `at` of the session at `head`; its head there, and how.

    A checkpoint that the store keeps of that turn is that state, bit for bit. Else the ledger is
    taken in again from the nearest one before it, or from the start.

    InputError for a turn that is not there. Whatever is raised leaves the state undefined.
    """
    pinned = int(head.settings.get("system") is not None)
    if not (isinstance(at, int) and pinned <= at <= head.turns):
        raise InputError(
            f"session {head.session!r} has turns {pinned} to {head.turns} to go back to, and not "
            f"{at!r}; history() numbers them"
        )
    tokenizer = state.model.tokenizer
    turns = store.history(head)[:at]
    compactions = state.compactions
    kept = next((k for k in store.kept(head) if k.turns <= at), None)
    if kept is None:
        state.restore(Checkpoint((), 0))
        state.pin([*tokenizer.start, *(t for turn in turns[:pinned] for t in turn.tokens)])
        reused, begun = 0, pinned
    else:
        state.restore(store.load(kept, device=state.model.device))
        reused, begun = kept.tokens, kept.turns
    differs = replay(state, tokenizer, turns[begun:], steps, on_replay)
    restored = Restored(reused, state.length - reused, state.compactions - compactions, differs)
    return replace(head, turn=turns[-1].id if turns else None, turns=at), restored
