"""The model's own thread: it computes for all sessions, and the tokens they decode in one pass.

Each session runs in the thread of whoever waits for its reply. What it has to compute it hands to
the one thread of its model: a token to decode (`step`), or anything else (`forward`, `run`).

- PyTorch's OpenMP gives every thread that computes a team of workers of its own, and where there
  are more teams than cores all of them get slow. So sessions' threads compute nothing large.
- Tokens that wait are decoded in one pass (`FrozenModel.forward_rows`), so that ten replies cost
  little more than one. One alone takes the pass that it always took.
- Who was in the last pass is expected in the next, for a grace that is short against a pass and
  begins anew with each that comes: a reply that has ended, or whose reader is slow, delays the
  others once, and by no more.
- All else is done in order. While both wait, it and decoding get equal time, so that neither a
  long text nor many replies keep the rest waiting.
- A pass that fails is computed again row by row, so that an error reaches its own thread alone.
- Nothing is shared between threads but what is appended, popped or claimed at once, and a request
  made inside the model's thread is computed there and then: so a garbage collection, which may
  undo a stream anywhere, finds no lock that its own thread holds.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, finalize, ref

from torch import Tensor

from still_agent.models.cache import LiveCache
from still_agent.models.frozen import FrozenModel

GRACE = 0.25  # of the last pass: how long its rows are waited for, since the last one came,
LONGEST_GRACE = 0.004  # in seconds, at most

T = TypeVar("T")


class _Request:
    """What one thread waits for, and gets: a value, or an error."""

    __slots__ = ("_claim", "_done", "_finished", "batched", "compute", "error", "owner", "value")

    def __init__(self, compute: Callable[[], Any], owner: LiveCache | None) -> None:
        self.compute, self.owner = compute, owner
        self.value: Any = None
        self.error: BaseException | None = None
        self.batched = self._finished = False
        self._claim, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()

    def claim(self) -> bool:
        """Whether the caller has it from now on, to compute it or to take it back."""
        return self._claim.acquire(blocking=False)

    def answer(self) -> None:
        try:
            self.value = self.compute()
        except BaseException as error:  # whatever it is, it is for the thread that waits
            self.error = error

    def finish(self) -> None:
        self._finished = True
        self._done.release()

    def wait(self) -> None:
        self._done.acquire()

    def withdraw(self) -> None:
        """Whoever waited was interrupted. What is being computed is waited for all the same."""
        if not self.claim():
            while not self._finished:
                with suppress(KeyboardInterrupt):
                    self._done.acquire()


class _Step(_Request):
    """One more token for a live cache."""

    __slots__ = ("cache", "position", "token")

    def __init__(self, model: FrozenModel, token: int, cache: LiveCache, position: int) -> None:
        super().__init__(partial(model.forward, [token], cache, position), cache)
        self.token, self.cache, self.position = token, cache, position


class ModelThread:
    """Computes what other threads ask for. Started when it is first needed, and in each fork.

    A request that is interrupted before its turn is as if it had never been made. One that is
    being computed then is computed to its end, and a token is taken out of its cache again.
    """

    def __init__(self, model: FrozenModel) -> None:
        self._model = ref(model)
        self._process = self._ident = 0
        self._starting = threading.Lock()
        finalize(model, self._stop).atexit = False
        self._begin()

    # -- in the thread that asks --------------------------------------------------------------

    def run(self, function: Callable[[], T], owner: LiveCache | None = None) -> T:
        """What `function` returns or raises, with the caller's context variables.

        owner: whose cache it is for; no token of it is expected meanwhile.
        """
        value: T = self._ask(_Request(partial(copy_context().run, function), owner))
        return value

    def forward(self, ids: Sequence[int], cache: LiveCache, position: int) -> Tensor:
        """As `FrozenModel.forward`."""
        request = _Request(partial(self._held.forward, ids, cache, position), cache)
        return self._logits(request, cache, len(ids))

    def step(self, token: int, cache: LiveCache, position: int) -> tuple[Tensor, bool]:
        """As `forward` with one token, and whether other threads' were in the same pass."""
        request = _Step(self._held, token, cache, position)
        return self._logits(request, cache, 1), request.batched

    def _logits(self, request: _Request, cache: LiveCache, tokens: int) -> Tensor:
        try:
            logits: Tensor = self._ask(request)
            return logits
        except BaseException:
            if request.value is not None:  # interrupted, and computed all the same
                cache.crop(-tokens)
            raise

    def _ask(self, request: _Request) -> Any:
        # As an interpreter ends, no other thread of it runs any more.
        if threading.get_ident() == self._ident or sys.is_finalizing():
            return request.compute()
        if self._process != os.getpid():
            self._start()
        try:
            self._inbox.append(request)
            if len(self._inbox) >= self._wanted:
                self._ring()
            request.wait()
        except BaseException:
            request.withdraw()
            raise
        if request.error is not None:
            error, request.error = request.error, None  # which refers to the request
            try:
                raise error
            finally:
                del error
        return request.value

    @property
    def _held(self) -> FrozenModel:
        model = self._model()
        assert model is not None  # whoever has a live cache to compute on holds its model
        return model

    def _ring(self) -> None:
        with suppress(RuntimeError):  # it was rung, and is not heard yet
            self._bell.release()

    def _start(self) -> None:
        with self._starting:
            if self._process != os.getpid():
                self._begin()
                thread = threading.Thread(target=self._serve, name="model", daemon=True)
                thread.start()
                self._ident, self._process = thread.ident or 0, os.getpid()

    def _stop(self) -> None:
        self._stopped = True
        self._ring()

    # -- in the model's thread ----------------------------------------------------------------

    def _begin(self) -> None:
        self._inbox: deque[_Request] = deque()
        self._wanted = 1  # requests in it that are worth waking up for
        self._bell = threading.Lock()
        self._bell.acquire()
        self._steps: list[_Step] = []
        self._work: deque[_Request] = deque()
        self._expected: set[int] = set()  # ids of the caches that were in the last pass,
        self._grace = self._deadline = 0.0  # and when they are not waited for any longer
        self._ahead = 0.0  # seconds that work has had more than decoding, while both waited
        self._stopped = False

    def _serve(self) -> None:
        while not self._stopped:
            if not self._compute():
                self._sleep()

    def _sort(self) -> None:
        """Take in what has been asked for meanwhile."""
        while self._inbox:
            request = self._inbox.popleft()
            if id(request.owner) in self._expected:
                self._expected.remove(id(request.owner))
                self._deadline = perf_counter() + self._grace
            if isinstance(request, _Step):
                self._steps.append(request)
            else:
                self._work.append(request)

    def _compute(self) -> bool:
        """One pass or one piece of work; False if there is none, or it is not yet time."""
        self._sort()
        if self._expected and perf_counter() >= self._deadline:
            self._expected.clear()
        decoding = bool(self._steps or self._expected)
        if self._work and (self._ahead <= 0 or not decoding):
            self._do(self._work.popleft())
        elif self._steps and not self._expected:
            steps, self._steps = self._steps, []
            self._decode([step for step in steps if step.claim()])
        else:
            return False
        return True

    def _do(self, request: _Request) -> None:
        if request.claim():
            began = perf_counter()
            request.answer()
            request.finish()
            self._sort()
            self._ahead = self._ahead + perf_counter() - began if self._steps else 0.0

    def _decode(self, steps: list[_Step]) -> None:
        began = perf_counter()
        if len(steps) > 1:
            self._decode_together(steps)
        for step in steps:
            if not step.batched:
                step.answer()
        seconds = perf_counter() - began
        self._sort()
        self._ahead = self._ahead - seconds if self._work else 0.0
        self._expected = {id(step.owner) for step in steps}
        self._grace = min(GRACE * seconds, LONGEST_GRACE)
        self._deadline = perf_counter() + self._grace
        for step in steps:
            step.finish()

    def _decode_together(self, steps: list[_Step]) -> None:
        with suppress(BaseException):  # an error of one: each is then computed alone
            logits = self._held.forward_rows(
                [step.token for step in steps],
                [step.cache for step in steps],
                [step.position for step in steps],
            )
            for step, row in zip(steps, logits.unbind(), strict=True):
                step.value, step.batched = row, True

    def _sleep(self) -> None:
        """Until there is something to do, or those expected are not waited for any longer."""
        self._wanted = max(len(self._expected), 1)
        if len(self._inbox) < self._wanted:
            left = max(self._deadline - perf_counter(), 0.0) if self._expected else -1
            self._bell.acquire(timeout=left)
        self._wanted = sys.maxsize  # it looks by itself


_threads: WeakKeyDictionary[FrozenModel, ModelThread] = WeakKeyDictionary()
_lock = threading.Lock()


def thread_of(model: FrozenModel) -> ModelThread:
    """The one thread of this very object; it ends with the model."""
    with _lock:
        if (thread := _threads.get(model)) is None:
            thread = _threads[model] = ModelThread(model)
        return thread
