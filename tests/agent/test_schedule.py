"""Promises of the schedules, over long trajectories of lengths alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from still_agent.budget import Budget
from still_agent.schedule import Held, schedule_for
from still_memory.errors import BudgetError


@dataclass
class Simulated:
    """A state without tensors: (start, end, slots, level, rounds) of each span of memory."""

    budget: Budget
    pinned: int

    def __post_init__(self) -> None:
        self.schedule = schedule_for(self.budget, self.pinned)
        self.memory: list[tuple[int, int, int, int, int]] = []
        self.length, self.tail, self.most, self.in_place = self.pinned, 0, self.pinned, 0

    @property
    def slots(self) -> int:
        return self.pinned + sum(m[2] for m in self.memory) + self.tail

    def add(self, tokens: int) -> None:
        while tokens:
            if self.slots == self.budget.slots:
                self.compact()
            n = min(tokens, self.budget.slots - self.slots)
            assert n > 0, "a compaction must free a slot"
            self.tail, self.length, tokens = self.tail + n, self.length + n, tokens - n
            self.most = max(self.most, self.slots)

    def compact(self) -> None:
        shares = self.budget.shares(self.pinned)
        plan = self.schedule.plan([Held(m[2], m[3]) for m in self.memory], self.tail)
        taken = self.memory[plan.low : plan.high]
        assert 0 <= plan.tokens <= self.tail - shares.lookahead, "the look-ahead stays raw"
        assert plan.tokens == 0 or plan.high == len(self.memory), "spans stay contiguous"
        before = sum(m[2] for m in taken) + plan.tokens
        assert plan.slots < before
        first_raw = self.length - self.tail
        start = taken[0][0] if taken else first_raw
        end = first_raw + plan.tokens if plan.tokens else taken[-1][1]
        rounds = 1 + max((m[4] for m in taken), default=0)
        self.in_place += bool(taken) and plan.level == max(m[3] for m in taken)
        self.memory[plan.low : plan.high] = [(start, end, plan.slots, plan.level, rounds)]
        self.tail -= plan.tokens
        assert sum(m[2] for m in self.memory) <= shares.memory

    def check(self) -> None:
        at = self.pinned
        for start, end, *_ in self.memory:
            assert start == at and end > start, "memory covers its tokens without a gap"
            at = end
        assert at + self.tail == self.length
        assert self.most <= self.budget.slots


messages = st.lists(st.integers(1, 700), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(16, 600),
    pinned=st.integers(0, 8),
    fan_in=st.integers(2, 6),
    schedule=st.sampled_from(["rolling", "tiered"]),
    messages=messages,
)
def test_the_budget_holds_and_no_token_is_lost(
    slots: int, pinned: int, fan_in: int, schedule: str, messages: list[int]
) -> None:
    state = Simulated(Budget(slots=slots, schedule=schedule, fan_in=fan_in), pinned)
    for tokens in messages:
        state.add(tokens)
        state.check()


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(32, 400),
    chunk=st.integers(2, 16),
    lookahead=st.integers(0, 8),
    memory=st.integers(2, 8),
    fan_in=st.integers(2, 4),
    schedule=st.sampled_from(["rolling", "tiered"]),
)
def test_odd_shares_hold_too(
    slots: int, chunk: int, lookahead: int, memory: int, fan_in: int, schedule: str
) -> None:
    budget = Budget(
        slots=slots, chunk=chunk, lookahead=lookahead, memory=memory, fan_in=fan_in,
        schedule=schedule,
    )  # fmt: skip
    state = Simulated(budget, pinned=0)
    state.add(3000)
    state.check()


def test_nothing_is_compacted_while_everything_fits() -> None:
    for schedule in ("rolling", "tiered"):
        state = Simulated(Budget(slots=1024, schedule=schedule), pinned=10)
        state.add(1014)
        assert state.memory == [] and state.slots == 1024


def test_rolling_keeps_one_span_of_memorys_size() -> None:
    state = Simulated(Budget(slots=1024), pinned=10)
    state.add(50_000)
    ((_, _, slots, _, rounds),) = state.memory
    assert slots == 640
    assert rounds == pytest.approx(50_000 / 256, rel=0.05)


@pytest.mark.parametrize("fan_in", [2, 4, 8])
@pytest.mark.parametrize("tokens", [5_000, 50_000, 200_000])
def test_tiered_takes_about_log_rounds(fan_in: int, tokens: int) -> None:
    budget = Budget(slots=1024, schedule="tiered", fan_in=fan_in)
    state = Simulated(budget, pinned=10)
    state.add(tokens)
    state.check()
    chunks = tokens / budget.shares(10).chunk
    rounds = max(m[4] for m in state.memory)
    assert rounds <= math.log(chunks, fan_in) + 1 + state.in_place
    assert state.in_place <= math.log(chunks, fan_in)


def test_tiered_never_ends_and_stays_even() -> None:
    state = Simulated(Budget(slots=1024, schedule="tiered"), pinned=10)
    state.add(5_000_000)
    state.check()
    assert max(m[4] for m in state.memory) < 60  # rolling: 19,000
    levels = [m[3] for m in state.memory]
    assert levels == sorted(levels, reverse=True)  # older memory is coarser


def test_append_reaches_its_horizon_in_one_round_and_says_when_it_is_past() -> None:
    state = Simulated(Budget(slots=1024, schedule="append", horizon=20_000), pinned=10)
    state.add(20_000 - state.length)
    state.check()
    assert {m[4] for m in state.memory} == {1}
    with pytest.raises(BudgetError, match="larger horizon"):
        state.add(20_000)


@pytest.mark.parametrize("horizon", [1, 500, 1024, 1500, 4000, 60_000])
def test_append_reaches_any_horizon_it_accepts(horizon: int) -> None:
    state = Simulated(Budget(slots=1024, schedule="append", horizon=horizon), pinned=10)
    state.add(max(1, horizon - state.length))
    state.check()


@pytest.mark.parametrize("memory", [[640], [320, 320], [4] * 100, [1, 1], [630, 2, 2, 2, 2]])
def test_tiered_goes_on_from_another_schedules_memory(memory: list[int]) -> None:
    state = Simulated(Budget(slots=1024, schedule="tiered"), pinned=10)
    for slots in memory:
        state.memory.append((state.length, state.length + 1000, slots, 0, 1))
        state.length += 1000
    state.add(20_000)
    state.check()
