"""Fitting slots to a context holds little of a large vocabulary, and nothing past the window."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from still_agent.budget import Budget
from still_agent.evaluation.bench import Bench
from still_agent.evaluation.fitted import Conversation, Fit, fitted, require_window
from still_agent.evaluation.grid import Grid, measure
from still_agent.evaluation.rows import opened
from still_agent.models import FrozenModel
from still_agent.rolling import RollingState
from still_agent.training import teacher
from still_agent.training.targets import divergence, logits_at, targets
from still_agent.training.teacher import logits_of
from still_memory.compactors import StreamingCompactor
from still_memory.errors import InputError
from still_memory.rotation import free
from still_memory.span import Span
from tests.conftest import tiny_model
from tests.evaluation.test_grid import PROSE

VOCABULARY = 151_936  # Qwen3's
SAID = 80  # tokens of a conversation
CONTEXT = [random.Random(0).randrange(4000) for _ in range(40)]


@pytest.fixture(scope="module")
def large(tiny: FrozenModel) -> FrozenModel:
    return FrozenModel(tiny_model(vocab_size=VOCABULARY), tiny.tokenizer, "large")


def conversations(count: int, tokens: int) -> list[Conversation]:
    rng = random.Random(1)
    return [([rng.randrange(4000) for _ in range(tokens)], [True] * tokens) for _ in range(count)]


def first(model: FrozenModel, slots: int) -> Span:
    """The context's first slots, not rotated."""
    state = RollingState(model, StreamingCompactor(), Budget(slots=64))
    state.extend(CONTEXT)
    (entry,) = state.checkpoint().entries
    return free(entry.span.cut(0, slots), model.rope)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was computed."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else (out,):
            if isinstance(made, torch.Tensor):
                self.found = max(self.found, made.numel() * made.element_size())
        return out


def test_a_large_vocabulary_is_never_held_for_all_that_is_said(large: FrozenModel) -> None:
    talks, start = conversations(4, SAID), first(large, 8)
    rows = 4 * (SAID - 1)
    with Largest() as largest:
        fitted(large, CONTEXT, talks, start, Fit(steps=2))
    assert largest.found <= teacher.AT_ONCE * 4 < rows * VOCABULARY * 4 / 2  # 67 MB of 192


def test_what_is_kept_of_the_teacher_is_its_likeliest_tokens(large: FrozenModel) -> None:
    hidden = torch.randn(300, large.width, generator=torch.Generator().manual_seed(0))
    gold = torch.arange(300)
    kept = targets(large, hidden, gold, 200)
    whole = logits_of(large, hidden)
    assert kept.nbytes == 300 * 200 * 12 < whole.nbytes / 250
    assert (kept.tokens == gold[:, None]).any(-1).all()
    torch.testing.assert_close(kept.logits, whole.gather(-1, kept.tokens))
    likeliest = whole.topk(199, dim=-1).indices
    assert all(
        set(a) <= set(b) for a, b in zip(likeliest.tolist(), kept.tokens.tolist(), strict=True)
    )


def test_parts_give_the_loss_and_the_gradient_of_the_whole(
    tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    teachers, students = torch.randn(2, 50, tiny.width, generator=generator)
    gold = torch.arange(50)
    found = []
    for at_once in (7 * tiny.vocab_size, 50 * tiny.vocab_size):
        monkeypatch.setattr(teacher, "AT_ONCE", at_once)
        states = students.clone().requires_grad_()
        wanted = targets(tiny, teachers, gold, 200)
        loss = divergence(wanted, logits_at(tiny, states, wanted.tokens))
        found.append((loss, *torch.autograd.grad(loss, states)))
    torch.testing.assert_close(*found)
    p, q = (
        logits_of(tiny, x).gather(-1, wanted.tokens).log_softmax(-1) for x in (teachers, students)
    )
    torch.testing.assert_close(found[0][0], (p.exp() * (p - q)).sum(-1).mean())


def test_an_exam_past_the_window_is_refused_before_anything_is_measured(
    tiny: FrozenModel, tmp_path: Path
) -> None:
    grid = Grid(tasks=("bindings",), methods=("full", "told-optimised"), lengths=(160,),
                samples=1, seeds=(0,))  # fmt: skip
    file = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match=r"window of 512 .* leave told-optimised"):
        measure(
            Bench(tiny, name="tiny"),
            grid,
            PROSE,
            file,
            lambda *_: pytest.fail("a row was measured"),
        )
    assert opened(file, {"model": tiny.identity.address, "haystack": PROSE.digest}) == []


def test_conversations_past_the_window_are_refused_before_the_model_reads(
    tiny: FrozenModel,
) -> None:
    start, room = first(tiny, 8), tiny.window - len(CONTEXT)
    fitted(tiny, CONTEXT, conversations(1, room), start, Fit(steps=1))
    with Largest() as largest, pytest.raises(InputError, match="ask for contexts of 39 or fewer"):
        fitted(tiny, CONTEXT, conversations(1, room + 1), start, Fit(steps=1))
    assert largest.found == 0


def test_the_length_that_the_error_names_fits(tiny: FrozenModel) -> None:
    with pytest.raises(InputError, match="ask for contexts of 12 or fewer"):
        require_window(tiny, 13, 500)
    require_window(tiny, 12, 500)
