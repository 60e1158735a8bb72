"""Sessions in threads of their own share forward passes, and notice nothing of each other."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from itertools import pairwise
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor

from still_agent import Agent, Budget
from still_agent.batch import LONGEST_GRACE, ModelThread, thread_of
from still_agent.models import FrozenModel, LiveCache
from still_agent.sampling import Sampling
from still_memory.compactors import TRAINING_FREE, StreamingCompactor
from still_memory.errors import BudgetError
from still_memory.span import Span
from tests.agent.conftest import MakeAgent

PATIENCE = 5.0  # seconds after which a thread counts as stuck


class Kept:
    """A cache that remembers the ids it was fed, all that a scheduler needs of one."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def crop(self, tokens_to_remove: int) -> None:
        del self.ids[tokens_to_remove:]


class Recorder:
    """A model that computes nothing, takes its time, and finds out whether it is run twice."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.passes: list[tuple[str, int]] = []  # kind, rows
        self.raises: Callable[[], None] = lambda: None  # in the middle of each pass
        self._running = threading.Lock()

    def forward(self, ids: Sequence[int], cache: Any, position: int) -> Tensor:
        self._run("read" if len(ids) > 1 else "one", 1)
        if min(ids) < 0:
            raise IndexError(f"{min(ids)} is no token")
        cache.ids += ids
        return torch.tensor(float(sum(cache.ids)))

    def forward_rows(
        self, tokens: Sequence[int], caches: Sequence[Any], positions: Sequence[int]
    ) -> Tensor:
        self._run("rows", len(tokens))
        if min(tokens) < 0:
            raise IndexError(f"{min(tokens)} is no token")
        for token, cache in zip(tokens, caches, strict=True):
            cache.ids.append(token)
        return torch.tensor([float(sum(cache.ids)) for cache in caches])

    def _run(self, kind: str, rows: int) -> None:
        assert self._running.acquire(blocking=False), "two passes of a model at once"
        try:
            time.sleep(self.seconds)
            self.raises()
            self.passes.append((kind, rows))
        finally:
            self._running.release()


class Gate:
    """The first pass of a model waits in here, so that the next ones are many rows."""

    def __init__(self, model: FrozenModel | Recorder) -> None:
        self.model, self.entered, self.opened = model, threading.Event(), threading.Event()

    def forward(self, ids: Sequence[int], cache: Any, position: int) -> Tensor:
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        return self.model.forward(ids, cache, position)

    def forward_rows(self, *rows: Any) -> Tensor:
        return self.model.forward_rows(*rows)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def threaded(model: Any) -> Any:
    """The thread of anything that computes like a model."""
    return ModelThread(model)


def met(model: Any, caches: Sequence[Any], ids: Sequence[int], pool: ThreadPoolExecutor) -> Any:
    """Futures of one token each, that meet in one batch behind a pass of the gate's."""
    gate = Gate(model)
    thread = threaded(gate)
    first: Any = Kept() if isinstance(model, Recorder) else model.new_cache(4)
    futures = [pool.submit(thread.step, 1, first, 0)]
    assert gate.entered.wait(PATIENCE)
    futures += [
        pool.submit(thread.step, token, cache, 0) for token, cache in zip(ids, caches, strict=True)
    ]
    until(lambda: len(thread._inbox) == len(ids))
    return gate, thread, futures


def counted(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass that is made of several."""
    rows: list[int] = []
    whole = agent.model.forward_rows

    def forward_rows(tokens: Any, caches: Any, positions: Any) -> Tensor:
        rows.append(len(tokens))
        return whole(tokens, caches, positions)

    monkeypatch.setattr(agent.model, "forward_rows", forward_rows)
    return rows


# -- real sessions ----------------------------------------------------------------------------


def test_eight_sessions_reply_together_as_each_does_alone(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["My sister Ana lives in Porto. " * n for n in range(1, 9)]  # lengths of their own
    replies = []
    for together in (False, True):
        with Agent.load("reference", budget=Budget(slots=256), device="cpu") as agent:
            rows = counted(agent, monkeypatch)
            chats = [agent.session(f"chat {n}") for n in range(8)]
            for chat, text in zip(chats, told, strict=True):
                chat.read(text)
            ask = [(chat, "Where does my sister live?") for chat in chats]
            mapped = pool.map if together else map
            found = [*mapped(lambda a: a[0].send(a[1], max_tokens=32), ask)]  # type: ignore[operator]
            replies.append([(r.text, r.usage) for r in found])
            assert bool(rows) == together
    assert replies[0] == replies[1]
    assert max(rows) >= 4


def test_compactions_in_mid_reply_happen_inside_a_batch(
    make_agent: MakeAgent, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = []
    for together in (False, True):
        agent = make_agent(slots=64)
        rows = counted(agent, monkeypatch)
        chats = [agent.session(f"chat {n}") for n in range(6)]
        mapped = pool.map if together else map
        found = [
            *mapped(  # type: ignore[operator]
                lambda c: c.send("Where? " * (1 + len(c.id)), max_tokens=60), chats
            )
        ]
        replies.append([(r.text, r.usage, c.stats) for r, c in zip(found, chats, strict=True)])
        assert bool(rows) == together
        monkeypatch.undo()
    assert replies[0] == replies[1]
    assert all(usage.compactions for _, usage, _ in replies[1])
    assert max(rows) >= 3


def test_a_reader_that_stops_pulling_stalls_nobody(
    make_agent: MakeAgent, pool: ThreadPoolExecutor
) -> None:
    agent = make_agent(slots=64)
    alone = agent.session("alone").send("Hello there.", max_tokens=30).text
    slow = agent.session("slow").stream("Hello there.", max_tokens=30)
    pieces = [next(slow)]
    others = [agent.session(f"chat {n}") for n in range(4)]
    sending = [pool.submit(chat.send, "Hello there.", max_tokens=30) for chat in others]
    assert {future.result(PATIENCE).text for future in sending} == {alone}
    assert "".join([*pieces, *slow]) == alone


def test_sessions_of_all_agents_of_a_model_share_its_thread(make_agent: MakeAgent) -> None:
    one, other = make_agent(), make_agent()
    assert one.model is other.model
    thread = one.session("a")._state._thread
    assert thread is other.session("b")._state._thread is thread_of(one.model)


def test_the_thread_ends_with_its_model(tiny: FrozenModel) -> None:
    model = FrozenModel(tiny.model, tiny.tokenizer, "another")
    assert thread_of(model) is not thread_of(tiny)
    ident, gone = thread_of(model).run(threading.get_ident), weakref.ref(model)
    assert ident in [t.ident for t in threading.enumerate()]
    del model
    gc.collect()
    assert gone() is None
    until(lambda: ident not in [t.ident for t in threading.enumerate()])


def test_compactors_compute_in_the_models_thread_and_observers_hear_in_the_turns(
    make_agent: MakeAgent, pool: ThreadPoolExecutor
) -> None:
    heard: list[int] = []

    class Watched(StreamingCompactor):
        def compact(self, *args: Any, **kwargs: Any) -> Span:
            heard.append(threading.get_ident())
            assert told.get() == "here"
            return super().compact(*args, **kwargs)

    told: ContextVar[str] = ContextVar("told")
    agent = make_agent(compactor=Watched(), on_compaction=lambda _: heard.append(get_ident()))

    def send() -> int:
        told.set("here")
        agent.session("a").send("Where? " * 40, max_tokens=4)
        return get_ident()

    mine = pool.submit(send).result(PATIENCE)
    assert set(heard[::2]) == {thread_of(agent.model).run(get_ident)} and set(heard[1::2]) == {mine}


def test_compactors_that_run_the_model_do_so_among_replies(
    make_agent: MakeAgent, pool: ThreadPoolExecutor, tiny: FrozenModel
) -> None:
    agent = make_agent(compactor=TRAINING_FREE["kvzip"](tiny))
    chats = [agent.session(f"chat {n}") for n in range(4)]
    sent = [pool.submit(chat.send, "Where? " * 30, max_tokens=40) for chat in chats]
    assert all(future.result(PATIENCE).usage.compactions for future in sent)


def test_a_replay_computes_alone_and_says_what_was_not(
    make_agent: MakeAgent, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(slots=128, sampling=Sampling(max_tokens=30))
    chats = [agent.session(f"chat {n}") for n in range(3)]
    for chat in chats:
        chat.send("One.")
    list(pool.map(lambda chat: chat.send("Two."), chats))
    assert [t.usage.get("batched") for t in chats[0].history()] == [None, None, None, True]
    rows = counted(agent, monkeypatch)

    def rebuilt(at: int) -> list[tuple[str, ...]]:
        chats = [agent.session(f"chat {n}") for n in range(3)]
        found = [*pool.map(lambda c: c.fork(f"{c.id} after {at}", at=at).restored, chats)]
        return [() if how is None else how.differs for how in found]

    for chat in chats:
        chat.send("Three.")  # the store keeps two states
    assert rebuilt(2) == [()] * 3
    assert [agent.rebuild(chat.id).restored.differs for chat in chats] == [("batched",)] * 3
    assert not rows


# -- errors and interruptions -----------------------------------------------------------------


def test_a_rows_error_reaches_its_own_thread_alone(
    tiny: FrozenModel, pool: ThreadPoolExecutor
) -> None:
    full = tiny.new_cache(1)
    tiny.forward([9], full, 0)
    caches = [full, *(tiny.new_cache(4) for _ in range(4))]
    ids = [5, 6, tiny.vocab_size + 1, 7, 8]
    gate, _, (first, *others) = met(tiny, caches, ids, pool)
    gate.opened.set()
    first.result(PATIENCE)
    with pytest.raises(BudgetError, match="room for 0 slots"):
        others[0].result(PATIENCE)
    with pytest.raises(IndexError):
        others[2].result(PATIENCE)
    for n in (1, 3, 4):
        expected = tiny.forward([ids[n]], tiny.new_cache(4), 0)
        torch.testing.assert_close(others[n].result(PATIENCE)[0], expected, rtol=0, atol=2e-5)
    assert [cache.length for cache in caches] == [1, 1, 0, 1, 1]


def test_an_interrupted_pass_is_computed_again_row_by_row(pool: ThreadPoolExecutor) -> None:
    model, caches = Recorder(), [Kept() for _ in range(5)]
    gate, thread, (first, *others) = met(model, caches, range(5), pool)
    left = iter([None, KeyboardInterrupt(), None, SystemExit()])  # the gate's, all, 0, 1

    def some() -> None:
        if error := next(left, None):
            raise error

    model.raises = some
    gate.opened.set()
    first.result(PATIENCE)
    raised = [type(future.exception(PATIENCE)) for future in others]
    assert raised == [type(None), SystemExit] + [type(None)] * 3
    assert [cache.ids for cache in caches] == [[0], [], [2], [3], [4]]
    assert thread.run(lambda: "alive") == "alive"


def test_what_is_raised_reaches_who_asked(pool: ThreadPoolExecutor) -> None:
    model = Recorder()
    thread = threaded(model)

    def ask(n: int) -> int:
        def fail() -> int:
            if n % 2:
                raise KeyError(n)
            return n

        return thread.run(fail)  # type: ignore[no-any-return]

    asked = [pool.submit(ask, n) for n in range(8)]
    for n, future in enumerate(asked):
        error = future.exception(PATIENCE)
        assert (error.args == (n,)) if n % 2 else (future.result() == n)  # type: ignore[union-attr]


def test_what_asks_for_more_in_the_models_thread_gets_it_there() -> None:
    model, cache = Recorder(), Kept()
    thread = threaded(model)
    assert thread.run(lambda: thread.run(lambda: thread.step(5, cache, 0))) == (5, False)
    with pytest.raises(IndexError):
        thread.run(lambda: thread.forward([-1], cache, 1))
    assert cache.ids == [5]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of POSIX")
@pytest.mark.parametrize("computed", [False, True], ids=["while queued", "while computed"])
def test_an_interrupted_waiter_takes_its_row_with_it(
    pool: ThreadPoolExecutor, computed: bool
) -> None:
    model, mine, other = Recorder(), Kept(), Kept()
    gate, thread, (first, second) = met(model, [other], [7], pool)
    inside, main = threading.Event(), threading.get_ident()

    def slow() -> None:
        if not inside.is_set():
            inside.set()
            time.sleep(0.05)

    def interrupt() -> None:
        until(lambda: len(thread._inbox) == 2)
        if computed:
            model.raises = slow
            gate.opened.set()
            assert inside.wait(PATIENCE)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        gate.opened.set()

    interrupting = pool.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.step(5, mine, 0)
        time.sleep(PATIENCE)
    interrupting.result(PATIENCE)
    first.result(PATIENCE)
    second.result(PATIENCE)
    assert mine.ids == [] and other.ids == [7]
    assert thread.step(6, mine, 0)[0] == 6


def test_a_stream_that_is_collected_in_the_models_thread_is_undone(
    make_agent: MakeAgent, pool: ThreadPoolExecutor
) -> None:
    agent = make_agent()
    thread = thread_of(agent.model)
    for busy in (False, True):
        chat = agent.session(f"busy {busy}")
        chat.read("Hello there.")
        before = chat.stats
        circle: list[Any] = [chat.stream("What now?")]
        next(circle[0])
        circle.append(circle)
        gc.disable()
        try:
            del circle
            if busy:  # who has the session waits for the model's thread
                with chat.lock:
                    thread.run(gc.collect)
            else:
                thread.run(gc.collect)
        finally:
            gc.enable()
        until(lambda chat=chat: chat._open is None)  # type: ignore[misc]
        assert chat.stats == before


CHILDREN = """
import os, sys, threading
from still_agent import Agent, Budget
agent = Agent.load("reference", budget=Budget(slots=128), device="cpu")
chat = agent.session("a")
if sys.argv[1] == "fork":
    told = chat.send("Hello.", max_tokens=4).text
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        assert agent.session("b").send("Hello.", max_tokens=4).text == told
        os._exit(0)
elif sys.argv[1] == "open stream":
    stream = chat.stream("Tell me of Kansas.", max_tokens=200)
    next(stream)
else:
    from concurrent.futures import ThreadPoolExecutor
    def teams():
        return len(os.listdir("/proc/self/task")) - len(threading.enumerate())
    chat.send("Hello.", max_tokens=4)
    before = teams()
    with ThreadPoolExecutor(4) as pool:
        chats = [agent.session(str(n)) for n in range(4)]
        [*pool.map(lambda chat: chat.send("Hello there. " * 40, max_tokens=20), chats)]
        assert teams() == before, (teams(), before)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and /proc")
@pytest.mark.parametrize("what", ["fork", "open stream", "teams"])
def test_in_a_process_of_its_own(what: str) -> None:
    """A fork has a thread of its own; a process with an open stream ends; sessions start no team.

    A team is a thread of OpenMP's that Python does not know.
    """
    threads = {"OMP_NUM_THREADS": "2" if what == "teams" else "1"}
    run = [sys.executable, "-c", CHILDREN, what]
    done = subprocess.run(
        run, env={**os.environ, **threads}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# -- who goes when ----------------------------------------------------------------------------


def test_a_session_alone_takes_the_passes_that_it_always_took() -> None:
    model, cache = Recorder(), Kept()
    thread = threaded(model)
    for ids in ([1, 2, 3], [4], [5], [6, 7], [8]):
        if len(ids) == 1:
            assert not thread.step(ids[0], cache, 0)[1]
        else:
            thread.forward(ids, cache, 0)
    assert cache.ids == [1, 2, 3, 4, 5, 6, 7, 8]
    assert model.passes == [(kind, 1) for kind in ("read", "one", "one", "read", "one")]


def test_a_long_text_and_replies_take_turns(pool: ThreadPoolExecutor) -> None:
    model = Recorder(seconds=0.002)
    thread = threaded(model)

    def decode(cache: Kept) -> None:
        for n in range(60):
            thread.step(n, cache, 0)

    def read(cache: Kept) -> None:
        for n in range(30):
            thread.forward([n, n], cache, 0)

    decoding = [pool.submit(decode, Kept()) for _ in range(3)]
    until(lambda: len(model.passes) > 3)
    reading = pool.submit(read, Kept())
    for future in (*decoding, reading):
        future.result(PATIENCE)
    kinds = [kind for kind, _ in model.passes]
    reads = [n for n, kind in enumerate(kinds) if kind == "read"]
    between = [later - earlier - 1 for earlier, later in pairwise(reads)]
    assert sorted(between)[len(between) // 2] in (1, 2, 3)  # as much time for one as for the other
    assert max(between) < 12


def test_who_was_in_the_last_pass_is_waited_for(pool: ThreadPoolExecutor) -> None:
    model = Recorder(seconds=0.04)
    thread = threaded(model)

    def decode(late: float) -> None:
        cache = Kept()
        for n in range(12):
            thread.step(n, cache, 0)
            time.sleep(late)  # less than the grace, each later than the one before

    for future in [pool.submit(decode, n * 0.001) for n in range(5)]:
        future.result(PATIENCE)
    rows = sorted(rows for _, rows in model.passes)
    assert rows[len(rows) // 2] == 5


def test_nobody_waits_long_for_one_who_does_not_come_back(pool: ThreadPoolExecutor) -> None:
    model = Recorder(seconds=0.04)
    thread, cache = threaded(model), Kept()
    ended = pool.submit(thread.step, 1, Kept(), 0)
    time.sleep(0.01)
    together = [pool.submit(thread.step, n, c, 0) for n, c in enumerate((cache, Kept()))]
    for future in (ended, *together):
        future.result(PATIENCE)
    assert model.passes[-1] == ("rows", 2)
    took = []
    for n in range(5):
        begin = time.perf_counter()
        thread.step(n, cache, 0)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.04 + 10 * LONGEST_GRACE
    assert sorted(took)[2] < 0.04 + 10 * LONGEST_GRACE


def test_whatever_happens_every_thread_gets_its_own(pool: ThreadPoolExecutor) -> None:
    model = Recorder()
    thread = threaded(model)
    chance = random.Random(0)

    def maybe() -> None:
        if chance.random() < 0.05:
            raise KeyboardInterrupt if chance.random() < 0.5 else RuntimeError("no memory")

    model.raises = maybe

    def talk(seed: int) -> None:
        mine, cache, fed = random.Random(seed), Kept(), list[int]()
        for _ in range(150):
            ids = [mine.randrange(100) for _ in range(1 if mine.random() < 0.8 else 3)]
            if mine.random() < 0.05:
                ids[0] = -1
            try:
                if len(ids) == 1:
                    logits = thread.step(ids[0], cache, len(fed))[0]
                else:
                    logits = thread.forward(ids, cache, len(fed))
            except (IndexError, RuntimeError, KeyboardInterrupt) as error:
                assert not isinstance(error, IndexError) or ids[0] == -1
            else:
                fed += ids
                assert logits == sum(fed) and ids[0] != -1
            assert cache.ids == fed
            if mine.random() < 0.1:
                time.sleep(mine.random() * 0.003)

    for future in [pool.submit(talk, seed) for seed in range(12)]:
        future.result(PATIENCE)
    assert not thread._inbox and not thread._steps and not thread._work
    assert max(rows for _, rows in model.passes) > 6


def test_a_live_cache_is_all_that_a_thread_needs(tiny: FrozenModel) -> None:
    cache: LiveCache = tiny.new_cache(8)
    logits = thread_of(tiny).forward([5, 6], cache, 0)
    assert torch.equal(logits, tiny.forward([5, 6], tiny.new_cache(8), 0))
