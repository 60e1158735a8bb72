"""A session's state, computed anew from its ledger: for other parts, or where it is damaged.

The ledger's turns are taken in again (see `replay`), by this agent's model, compactor and budget. A
model with another tokenizer or template takes in their text: each turn in one run, a reply too.

Nothing of the session changes before the new state stands; then it takes the place of the old one
in one transaction, and what was kept of that goes. Until then it is a draft in the store, saved
every few seconds, and a rebuild with the same parts goes on from it. A turn that comes out as the
ledger has it stays the row that it is; from the first one that does not, the session has rows of
its own, which tell how they were taken in this time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from pydantic import JsonValue

from still_agent.ephemeral import Store
from still_agent.events import OnReplay
from still_agent.models.frozen import FrozenModel
from still_agent.replay import Restored, Retold, require_known, retell, tokens_of
from still_agent.rolling import RollingState
from still_agent.steps import KEYS, Steps
from still_memory.checkpoint import Checkpoint
from still_memory.errors import BudgetError, ConflictError, DamageError, UnknownSessionError
from still_memory.portable import UNVERIFIED
from still_memory.records import Head, NewTurn, TurnRecord

SAVE_SECONDS = 5.0  # work that an interruption may cost
_TRIES = 3  # for a session that is written meanwhile


def rebuild(
    state: RollingState,
    steps: Steps,
    store: Store,
    session: str,
    on_progress: OnReplay | None = None,
) -> tuple[Head, Restored]:
    """Compute the session's state anew and put it in the old one's place: the head, and how.

    state: empty, of the model, compactor and budget that the session is to have; it ends as the
        session's. See `Agent.rebuild` for what is raised.
    """
    for _ in range(_TRIES):
        source = store.ledger(session)
        known = store.history(source)
        turns = _in_the_words_of(state.model, source, known)
        draft = Draft(store, source, known, state, {"parts": steps.parts()})
        restored = draft.grow(turns, steps, on_progress)
        try:
            return draft.stand(), restored
        except (ConflictError, UnknownSessionError):
            draft.save()  # go on with the session's new turns; or be told that it, or this, is gone
    raise ConflictError(
        f"session {session!r} was written each time that its new state stood; the work is kept, so "
        "rebuild it again when it rests"
    )


class Draft:
    """The state on its way to a session's place: which of its turns it has, and what is saved."""

    def __init__(
        self,
        store: Store,
        source: Head,
        known: Sequence[TurnRecord],
        state: RollingState,
        settings: dict[str, JsonValue],
    ) -> None:
        self._saved = time.monotonic()
        self._store, self._source, self._known, self._state = store, source, known, state
        self._made = replace(
            source, model=state.model.identity, turn=None, turns=0, settings=settings
        )
        self._rows: list[NewTurn] = []  # that follow `_made`, and are not saved yet
        self._differs: set[str] = set()
        if any(source.model.differences(self._made.model)):
            self._differs.add("model")

    def grow(
        self,
        turns: Sequence[TurnRecord],
        steps: Steps,
        on_progress: OnReplay | None,
        kept: Sequence[Head] = (),
    ) -> Restored:
        """Take in the turns that it does not have yet; how its state was come by.

        turns: those of the ledger, in the words of the state's model.
        kept: states of the session to begin from, the first that is whole, instead of nothing.
        """
        state = self._state
        compactions = state.compactions
        begun = self._taken_up() or self._begun_from(kept)
        if not begun:
            self._begin(turns)
        reused = state.length if begun else 0
        done, total = tokens_of(turns[: self._turns]), tokens_of(turns)
        if on_progress is not None:
            on_progress(done, total)
        for retold in retell(state, state.model.tokenizer, turns[self._turns :], steps):
            self._take(retold)
            if time.monotonic() - self._saved >= SAVE_SECONDS:
                self.save()
            done += tokens_of(retold.turns)
            if on_progress is not None:
                on_progress(done, total)
        differs = tuple(sorted(self._differs))
        return Restored(reused, state.length - reused, state.compactions - compactions, differs)

    @property
    def _turns(self) -> int:
        return self._made.turns + len(self._rows)

    def _taken_up(self) -> bool:
        """Go on from a draft that was left, if it is of the same parts and the same turns."""
        try:
            left = self._store.draft(self._source)
            if left is None:
                return False
            if (left.model, left.settings) == (self._made.model, self._made.settings):
                checkpoint = self._store.load(left, device=self._state.model.device)
                of, differs = checkpoint.extra.get("of"), checkpoint.extra.get("differs")
                of_these = self._known[: left.turns][-1:]
                if [(t.number, t.id) for t in of_these] == [(left.turns, of)] and isinstance(
                    differs, list
                ):
                    self._state.restore(checkpoint)
                    self._made = left
                    self._differs.update(map(str, differs))
                    return True
        except (ConflictError, DamageError, UnknownSessionError):
            pass  # it was only there to save time
        self._store.discard_draft(self._source)
        return False

    def _begun_from(self, kept: Sequence[Head]) -> bool:
        """Begin from a state of the session itself, if one of them can be had."""
        for head in kept:
            with suppress(BudgetError, ConflictError, DamageError, UnknownSessionError):
                checkpoint = self._store.load(head, device=self._state.model.device)
                if UNVERIFIED not in checkpoint.extra:
                    self._state.restore(checkpoint)
                    self._made = replace(self._made, turn=head.turn, turns=head.turns)
                    return True
        return False

    def _begin(self, turns: Sequence[TurnRecord]) -> None:
        """Begin from nothing but the pinned prefix."""
        pinned = tuple(turns[: int(self._source.settings.get("system") is not None)])
        start = self._state.model.tokenizer.start
        self._state.restore(Checkpoint((), 0))
        self._state.pin([*start, *(t for turn in pinned for t in turn.tokens)])
        self._take(Retold(pinned, {}, frozenset()))

    def _take(self, retold: Retold) -> None:
        """Note turns that the state has taken in."""
        before = self._known[self._turns : self._turns + len(retold.turns)]
        if not before:
            return
        self._differs |= retold.differs
        if any(new.tokens != old.tokens for new, old in zip(retold.turns, before, strict=True)):
            self._differs.add("tokens")
        shared = not self._rows and self._made.turn == before[0].parent
        if shared and list(retold.turns) == before and not retold.differs & set(KEYS):
            self._made = replace(self._made, turn=before[-1].id, turns=before[-1].number)
            return
        *asked, last = retold.turns
        usage = {key: told for key, told in last.usage.items() if key not in KEYS}
        self._rows += [
            NewTurn(t.role, t.text, t.tokens, t.usage, t.created)
            for t in (*asked, replace(last, usage={**usage, **retold.log}))
        ]

    def save(self) -> Head:
        """Put what there is into the store; where it stands there."""
        told: dict[str, JsonValue] = {
            "of": self._known[self._turns - 1].id if self._turns else None,
            "differs": [*sorted(self._differs)],
        }  # fmt: skip
        checkpoint = replace(self._state.checkpoint(), extra=told)
        try:
            self._made = self._store.save_draft(self._source, self._made, checkpoint, self._rows)
        except (ConflictError, DamageError, UnknownSessionError):
            # Another rebuild has the draft, or a rewind has taken away the turns that it is of.
            if self._store.ledger(self._source.session).session_id == self._source.session_id:
                raise ConflictError(
                    f"session {self._source.session!r} is being rebuilt or rewound elsewhere: wait "
                    "for that, and rebuild it again if there is still a need"
                ) from None
            raise
        self._rows, self._saved = [], time.monotonic()
        return self._made

    def stand(self) -> Head:
        """Take the session's place."""
        return self._store.adopt(self._source, self._made, self._state.checkpoint(), self._rows)


def _in_the_words_of(
    model: FrozenModel, source: Head, turns: Sequence[TurnRecord]
) -> Sequence[TurnRecord]:
    """The turns with the ids that the model has for them.

    InputError for a role that its template does not have, DamageError for ids past its vocabulary.
    """
    theirs, ours = source.model, model.identity
    if (theirs.tokenizer, theirs.template) != (ours.tokenizer, ours.template):
        turns = [read_only(turn, model.tokenizer.message(turn.role, turn.text)) for turn in turns]
    require_known(turns, model.vocab_size, model.name)
    return turns


def read_only(turn: TurnRecord, tokens: list[int]) -> TurnRecord:
    """A turn as one that is only read, whoever said it."""
    pinned = turn.parent is None and turn.role == "system" and not turn.usage
    usage: dict[str, JsonValue] = {"prefilled_tokens": len(tokens), "generated_tokens": 0}
    return replace(turn, tokens=tokens, usage={} if pinned else usage)
