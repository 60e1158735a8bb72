"""Promises of a budget: what fits is laid out, what does not is refused with the fix."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from still_agent import Budget, BudgetError, InputError, Sampling
from still_memory.errors import StillError


def test_defaults_leave_room_for_a_pinned_prefix() -> None:
    shares = Budget(slots=1024).shares(pinned=40)
    assert (shares.memory, shares.chunk, shares.lookahead) == (640, 256, 64)


def test_a_long_pinned_prefix_takes_from_memory() -> None:
    assert Budget(slots=1024).shares(pinned=200).memory == 1024 - 200 - 256 - 64


@settings(deadline=None)
@given(slots=st.integers(16, 5000), pinned=st.integers(0, 5000))
def test_shares_never_pass_the_slots(slots: int, pinned: int) -> None:
    try:
        shares = Budget(slots=slots).shares(pinned)
    except BudgetError:
        assert pinned + slots // 4 + slots // 16 + 2 > slots
    else:
        assert pinned + shares.memory + shares.chunk + shares.lookahead <= slots
        assert shares.memory >= 2 and 1 <= shares.span <= shares.memory


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slots": 4}, "slots: Input should be greater"),
        ({"slots": "many"}, "slots: Input should be a valid integer"),
        ({"slots": 64, "chunk": 64}, "give slots="),
        ({"slots": 64, "memory": 60}, "give slots="),
        ({"slots": 64, "memory": 0}, "memory: Input should be greater"),
        ({"schedule": "append"}, "give horizon=<tokens>"),
        ({"schedule": "append", "slots": 64, "horizon": 9999}, "horizon=[0-9]+ or less"),
        ({"schedule": "tiered", "horizon": 9}, "horizon belongs to the schedule"),
        ({"schedule": "yearly"}, "'rolling', 'tiered' or 'append'"),
        ({"fan_in": 1}, "fan_in"),
        ({"slot": 64}, "there is no such option; there are slots"),
    ],
)
def test_a_budget_that_cannot_work_names_the_fix(options: dict[str, object], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        Budget(**options)


def test_the_slots_that_an_error_names_are_enough() -> None:
    for options in ({}, {"chunk": 64}, {"lookahead": 0}, {"memory": 100}):
        with pytest.raises(BudgetError) as refused:
            Budget(slots=256, **options).shares(pinned=250)
        named = int(str(refused.value).split("give slots=")[1].split()[0])
        for enough in range(named, named + 64):
            Budget(slots=enough, **options).shares(pinned=250)
        with pytest.raises(BudgetError):
            Budget(slots=named - 1, **options).shares(pinned=250)


@pytest.mark.parametrize("options", [{}, {"memory": 200}, {"chunk": 100, "lookahead": 0}])
def test_no_error_names_slots_beyond_the_window(options: dict[str, int]) -> None:
    for pinned in (300, 700):
        with pytest.raises(BudgetError, match=r"pin [0-9]+ tokens or fewer") as refused:
            Budget(slots=320, **{"memory": 100, **options}).shares(pinned, window=400)
        most, slots = map(int, re.findall(r"pin (\d+) .* slots=(\d+)", str(refused.value))[0])
        assert slots == 400
        Budget(slots=slots, **{"memory": 100, **options}).shares(most, window=400)
        with pytest.raises(BudgetError):
            Budget(slots=slots, **{"memory": 100, **options}).shares(most + 1, window=400)
    with pytest.raises(BudgetError, match="make one of them smaller, for the model was trained"):
        Budget(slots=2048, memory=1200, chunk=100, lookahead=0).shares(800, window=1024)


def test_a_budget_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Budget().slots = 5


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 0}, {"seed": -1}, {"max_tokens": 0}, {"stop": ("",)}, {"n": 1}],
)
def test_sampling_out_of_range_is_an_input_error(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="Sampling: "):
        Sampling().but(**options)


def test_every_error_is_a_still_error() -> None:
    import still_agent
    from still_memory import errors

    exported = {getattr(still_agent, n) for n in still_agent.__all__ if n.endswith("Error")}
    defined = {
        e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__
    }
    assert exported == defined and all(issubclass(e, StillError) for e in exported)


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, still_agent; assert 'torch' not in sys.modules; still_agent.Budget()"
    program += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": _path()})


def _path() -> str:
    return ":".join(p for p in sys.path if p)
