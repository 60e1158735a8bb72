"""One batch for all sessions of a model: where threads meet for the next forward pass.

Each session runs in the thread of whoever waits for its reply, and asks for one pass after the
other. Here these become passes of many rows (`FrozenModel.forward_rows`), one at a time, so
that ten replies cost little more than one, and no two passes fight for the same cores.

- There is no thread of its own: the one that completes the batch runs the pass for all, and
  wakes them. One session alone runs its own pass, the one it always ran.
- Who was in the last pass is expected in the next, for a grace that is short against a pass and
  begins anew with each that comes: a reply that has ended, or whose reader is slow, delays the
  others once, and by no more.
- Texts are read alone, a chunk a pass, in turns with each other. While both wait, reading and
  decoding get equal time, so that neither a long text nor many replies keep the rest waiting.
- A batch that fails is computed again row by row, so that an error reaches its own thread alone.
- A thread that is interrupted takes its row with it, and leaves the pass to another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from still_agent.models.cache import LiveCache

GRACE = 0.25  # of the last pass: how long its rows are waited for, since the last one came,
LONGEST_GRACE = 0.004  # in seconds, at most


class Model(Protocol):
    """What a batch runs; see `FrozenModel`. A cache is unchanged when anything is raised."""

    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor: ...

    def forward_rows(
        self, tokens: Sequence[int], caches: Sequence[LiveCache], positions: Sequence[int]
    ) -> Tensor: ...


class _Turn:
    """What one thread asks for, and gets."""

    def __init__(self, ids: Sequence[int], cache: LiveCache, position: int) -> None:
        self.ids, self.cache, self.position = ids, cache, position
        self.logits: Tensor | None = None
        self.error: Exception | None = None
        self._sleep = threading.Lock()
        self._sleep.acquire()

    @property
    def done(self) -> bool:
        return self.logits is not None or self.error is not None

    def wait(self, seconds: float | None) -> None:
        """Until `wake`, which may have come before, or for so long."""
        self._sleep.acquire(timeout=-1 if seconds is None else seconds)

    def wake(self) -> None:
        if self._sleep.locked():
            self._sleep.release()


class Batch:
    """The forward passes of one model, one at a time. Safe with threads."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()  # for all below; never held during a pass
        self._rows: list[_Turn] = []  # want one token decoded; those of a running pass too,
        self._chunks: list[_Turn] = []  # or want several read
        self._running: list[_Turn] = []
        self._leader: _Turn | None = None  # whose thread runs them
        self._began = 0.0
        self._expected: set[int] = set()  # ids of the caches that were in the last batch
        self._grace = self._deadline = 0.0  # when they are not waited for any longer
        self._ahead = 0.0  # seconds that reading has had more than decoding, while both waited

    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor:
        """As `FrozenModel.forward`; one token may be computed together with other threads'."""
        turn = _Turn(ids, cache, position)
        try:
            self._join(turn)
            while not turn.done:
                leads, seconds = self._lead(turn)
                if leads:
                    self._compute(self._running)
                    self._end()
                else:
                    turn.wait(seconds)
        except BaseException:
            self._withdraw(turn)
            raise
        if turn.error is not None:
            raise turn.error
        assert turn.logits is not None
        return turn.logits

    def _join(self, turn: _Turn) -> None:
        with self._lock:
            if id(turn.cache) in self._expected:
                self._expected.remove(id(turn.cache))
                self._deadline = perf_counter() + self._grace
            (self._rows if len(turn.ids) == 1 else self._chunks).append(turn)

    def _lead(self, turn: _Turn) -> tuple[bool, float | None]:
        """Whether this thread is to run a pass now; if not, how long to wait (None: until woken).

        Whoever asks while no pass runs sees to it that someone runs the next one.
        """
        with self._lock:
            if self._running or turn.done:
                return False, 0.0 if turn.done else None
            party, seconds = self._next()
            if turn not in party:
                if party:
                    party[0].wake()
                return False, seconds
            self._running, self._leader, self._began = party, turn, perf_counter()
            return True, None

    def _next(self) -> tuple[list[_Turn], float | None]:
        """Who is to be computed now, or in how many seconds to ask again."""
        left = self._deadline - perf_counter()
        if left <= 0:
            self._expected.clear()
        decoding = bool(self._rows or self._expected)
        if self._chunks and (self._ahead <= 0 or not decoding):
            return self._chunks[:1], None
        if self._expected:
            return [], left
        return self._rows[:], None

    def _compute(self, party: Sequence[_Turn]) -> None:
        """Give each its logits or its error; whatever else is raised leaves it with neither."""
        try:
            if len(party) == 1:
                [turn] = party
                turn.logits = self._model.forward(turn.ids, turn.cache, turn.position)
                return
            logits = self._model.forward_rows(
                [turn.ids[0] for turn in party],
                [turn.cache for turn in party],
                [turn.position for turn in party],
            )
            for turn, row in zip(party, logits, strict=True):
                turn.logits = row
        except Exception as error:
            if len(party) == 1:
                party[0].error = error
                return
            for turn in party:
                self._compute([turn])

    def _end(self) -> None:
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        """The pass is over; those not computed, because its leader was interrupted, wait on.

        Where it is interrupted itself, `_withdraw` does it again, as long as there is a leader.
        """
        party, now = self._running, perf_counter()
        seconds = now - self._began
        done = [turn for turn in party if turn.done]
        if len(party[0].ids) == 1:
            self._rows = [turn for turn in self._rows if not turn.done]
            self._ahead = self._ahead - seconds if self._chunks else 0.0
            back = {id(turn.cache) for turn in self._rows}
            self._expected = {id(turn.cache) for turn in done} - back
            self._grace = min(GRACE * seconds, LONGEST_GRACE)
            self._deadline = now + self._grace
        else:
            self._chunks = [turn for turn in self._chunks if not turn.done]
            self._ahead = self._ahead + seconds if self._rows else 0.0
        for turn in done:
            turn.wake()
        self._running, self._leader = [], None
        self._hand_on()

    def _hand_on(self) -> None:
        """Have someone who waits see to the next pass, if anyone does."""
        if not self._running and (waiting := self._next()[0] or self._rows or self._chunks):
            waiting[0].wake()

    def _withdraw(self, turn: _Turn) -> None:
        """Take back what an interrupted thread asked for; its cache is then as it was."""
        while True:
            with suppress(KeyboardInterrupt):  # one more must not leave the others waiting
                with self._lock:
                    if self._leader is turn:
                        self._finish()
                    if turn not in self._running:
                        for waiting in (self._rows, self._chunks):
                            if turn in waiting:
                                waiting.remove(turn)
                        self._expected.discard(id(turn.cache))
                        self._hand_on()
                        break
                turn.wait(None)  # another thread computes it just now
        if turn.logits is not None:
            turn.cache.crop(-len(turn.ids))


_batches: WeakValueDictionary[int, Batch] = WeakValueDictionary()
_lock = threading.Lock()


def batch_of(model: Model) -> Batch:
    """The one batch of this very object, for as long as anyone holds it."""
    with _lock:
        batch = _batches.get(id(model))  # the batch holds the model, so its id is not used again
        if batch is None:
            _batches[id(model)] = batch = Batch(model)
        return batch
