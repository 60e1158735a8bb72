"""Turns forgotten: taken out of the ledger, and every state computed anew without them.

Each session that was told them gets a state made of its other turns: from the newest kept state
that is older than the first of them, or from the start. These grow as drafts in the store, as a
rebuild's does, while the sessions are what they were; then one transaction puts all of them in
place and deletes what is forgotten. So whatever stops it before has changed nothing, and the next
call goes on from the drafts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from still_agent.ephemeral import Store
from still_agent.events import OnReplay
from still_agent.models.frozen import FrozenModel
from still_agent.rebuild import Draft, read_only
from still_agent.replay import Restored, generated, require_known, tokens_of
from still_agent.rolling import RollingState
from still_agent.steps import Steps
from still_memory.errors import ConflictError, TaintedError
from still_memory.records import Head, TurnRecord
from still_memory.taint import Later, Taint, check_choice

_TRIES = 3  # for sessions that are written meanwhile


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, and how the states without it were come by."""

    sessions: tuple[Taint, ...]  # as they were before; their `later` turns went, or were kept
    restored: tuple[Restored, ...]  # of each of them


def forget(
    state: RollingState,
    steps: Steps,
    store: Store,
    session: str,
    turns: Collection[int],
    later: Later,
    on_progress: OnReplay | None = None,
) -> Forgotten:
    """Take the turns with these ids out of every session; see `Session.forget`.

    state: of the model, compactor and budget that the sessions are to have; undefined afterwards.
    """
    check_choice(later, Later, "later")
    for _ in range(_TRIES):
        tainted = store.tainted(turns)
        more = any(taint.later or taint.graph_states for taint in tainted)
        if later == "refuse" and (len(tainted) > 1 or more):
            raise TaintedError(_told(session, tainted), tainted)
        try:
            return _attempt(state, steps, store, tainted, turns, later, on_progress)
        except ConflictError as conflict:
            moved_on = conflict
    raise ConflictError(
        f"sessions that share turns with {session!r} were written each time that their new states "
        "stood; the work is kept, so repeat this when they rest"
    ) from moved_on


def _attempt(
    state: RollingState,
    steps: Steps,
    store: Store,
    tainted: Sequence[Taint],
    turns: Collection[int],
    later: Later,
    on_progress: OnReplay | None,
) -> Forgotten:
    """ConflictError, and nothing is changed, if a session is not what `tainted` says."""
    plans = [_plan(state.model, store, taint, later) for taint in tainted]
    told: dict[str, JsonValue] = {"parts": steps.parts(), "without": [*sorted(turns)]}
    made, restored = [], []
    done, total = 0, sum(tokens_of(plan.turns) for plan in plans)
    for plan in plans:

        def hear(now: int, _: int, before: int = done) -> None:
            if on_progress is not None:
                on_progress(before + now, total)

        draft = Draft(store, plan.source, plan.known, state, {**told, "later": later})
        restored.append(draft.grow(plan.turns, steps, hear, plan.kept))
        made.append((plan.source, draft.save()))
        done += tokens_of(plan.turns)
    store.forget(turns, made)
    return Forgotten(tuple(tainted), tuple(restored))


@dataclass(frozen=True)
class _Plan:
    """What one session's new state is made of."""

    source: Head
    known: Sequence[TurnRecord]  # the turns that stay, as the ledger has them
    turns: Sequence[TurnRecord]  # and as they are taken in
    kept: Sequence[Head]  # states that may be gone on from, newest first


def _plan(model: FrozenModel, store: Store, taint: Taint, later: Later) -> _Plan:
    source = store.ledger(taint.session)
    if (source.session_id, source.generation) != (taint.session_id, taint.generation):
        raise ConflictError(f"session {taint.session!r} has moved on, by another writer")
    remedy = (
        "It has what is to be forgotten too: load that model, or have this one rebuild it first "
        f"(agent.rebuild({taint.session!r})), or delete it."
    )
    model.identity.require(source.model, f"session {taint.session!r}", remedy)
    history = store.history(source)
    first = taint.forgotten[0]
    stays = [
        turn
        for turn in history
        if turn.number not in taint.forgotten and (later == "keep" or turn.number < first)
    ]
    require_known(stays, model.vocab_size, model.name)
    known = [replace(turn, number=n) for n, turn in enumerate(stays, 1)]
    turns = [
        # a reply is no longer one: its text stays, as something that was read
        read_only(new, model.tokenizer.message(new.role, new.text))
        if generated(old) and old.number - 1 in taint.forgotten
        else new
        for old, new in zip(stays, known, strict=True)
    ]
    kept = [head for head in store.kept(source) if head.turns < first]
    return _Plan(source, known, turns, kept)


def _told(session: str, tainted: Sequence[Taint]) -> str:
    return (
        f"what is to be forgotten has entered more than itself: {'; '.join(map(str, tainted))}. "
        "What was computed from it goes in any case; say what becomes of the words said later: "
        "later='keep' leaves them, read without it, and later='forget' forgets them too, in every "
        "session. Or name those that are to go with it. The states of a thread's graph go with any "
        "of its turns: its engine begins that thread anew"
    )
