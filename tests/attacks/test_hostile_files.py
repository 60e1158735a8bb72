"""Files to import whose digest is right and whose content is not, and names that want to be paths.

test_portable.py forges what a file says; here the tensors, the numbers and the logs are hostile.
Each is refused by a typed error, or does no harm: the session answers, or says why it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from still_agent.agent import Agent
from still_agent.budget import Budget
from still_agent.models import FrozenModel
from still_agent.sampling import Sampling
from still_memory.checkpoint import Checkpoint, Entry
from still_memory.compactors import StreamingCompactor
from still_memory.errors import DamageError, InputError, StillError
from still_memory.portable import Portable
from still_memory.records import NewTurn
from still_memory.span import Slots, Span
from still_memory.store import MemoryStore
from tests.attacks.states import compact_span, raw_span

Change = Callable[[Slots], Slots]


@pytest.fixture
def agent(tiny: FrozenModel, tmp_path: Path) -> Iterator[Agent]:
    with Agent(
        tiny,
        StreamingCompactor(),
        MemoryStore(tmp_path / "s.db", synchronous="NORMAL"),
        budget=Budget(slots=64),
        sampling=Sampling(max_tokens=3),
    ) as made:
        yield made


def spans(tiny: FrozenModel) -> list[Span]:
    shape = {"layers": tiny.layers, "heads": tiny.kv_heads, "width": tiny.head_dim}
    return [
        raw_span(0, 4, 1, **shape),
        compact_span(4, 20, 5, 1, **shape),
        raw_span(20, 30, 2, **shape),
    ]


def portable(
    tiny: FrozenModel, parts: list[Span], usage: dict[str, object] | None = None
) -> Portable:
    shares = ("pinned", "memory", "tail")
    entries = tuple(
        Entry(s, s.start, s.end, 0, share)  # type: ignore[arg-type]
        for s, share in zip(parts, shares, strict=True)
    )
    turns = [NewTurn("user", "hello", [1, 2]), NewTurn("assistant", "yes", [3, 4], usage or {})]
    checkpoint = Checkpoint(entries, parts[-1].end, {})
    return Portable("x", tiny.identity, {"system": None}, checkpoint, turns * 2)


def changed(which: int, change: Change) -> Callable[[list[Span]], list[Span]]:
    """One span with its layers changed."""

    def work(parts: list[Span]) -> list[Span]:
        layers = tuple(map(change, parts[which].layers))
        return [*parts[:which], replace(parts[which], layers=layers), *parts[which + 1 :]]

    return work


def filled(name: str, value: float) -> Change:
    """One number of a tensor is `value`."""

    def change(slots: Slots) -> Slots:
        tensor: Tensor = getattr(slots, name).clone()
        tensor[0, 0] = value
        return replace(slots, **{name: tensor})

    return change


REFUSED = {
    "keys that are no numbers": changed(0, filled("keys", float("nan"))),
    "endless keys": changed(1, filled("keys", float("inf"))),
    "endless values": changed(2, filled("values", float("-inf"))),
    "values that are no numbers": changed(1, filled("values", float("nan"))),
    "positions nowhere": changed(1, filled("positions", float("nan"))),
    "an endless bias": changed(1, filled("bias", float("inf"))),
    "a bias that is no number": changed(1, filled("bias", float("nan"))),
    "a head fewer": changed(1, lambda s: Slots(**{n: t[:1] for n, t in s.tensors().items()})),
    "narrow keys": changed(0, lambda s: replace(s, keys=s.keys[..., :8])),
    "narrow values": changed(2, lambda s: replace(s, values=s.values[..., :8])),
    "one layer": lambda parts: [replace(s, layers=s.layers[:1]) for s in parts],
    "a layer more": lambda parts: [replace(s, layers=(*s.layers, s.layers[0])) for s in parts],
    "ids past the vocabulary": lambda parts: [replace(parts[0], ids=(2**32 - 1,) * 4), *parts[1:]],
}

HARMLESS = {
    "nothing changed": lambda parts: parts,
    "salience that is no number": changed(1, filled("salience", float("nan"))),
    "endless salience": changed(1, filled("salience", float("inf"))),
    "every slot empty": changed(
        1, lambda s: replace(s, bias=torch.full_like(s.positions, -torch.inf))
    ),
    "keys of another dtype": changed(0, lambda s: replace(s, keys=s.keys.to(torch.bfloat16))),
    "values in double": changed(2, lambda s: replace(s, values=s.values.double())),
    "positions far away": changed(1, lambda s: replace(s, positions=s.positions + 1e30)),
    "a bias on raw slots": changed(0, lambda s: replace(s, bias=torch.full_like(s.positions, 9.0))),
    "a rotation far away": lambda parts: [replace(parts[0], rotated_at=2**31 - 1), *parts[1:]],
    "a rotation on compact slots": lambda parts: [
        parts[0], replace(parts[1], rotated_at=7), parts[2]
    ],
    "rounds without end": lambda parts: [parts[0], replace(parts[1], rounds=2**52), parts[2]],
}  # fmt: skip


@pytest.mark.parametrize("hostile", REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_no_model_could_have_made_are_refused(
    hostile: Callable[[list[Span]], list[Span]], agent: Agent, tiny: FrozenModel, tmp_path: Path
) -> None:
    portable(tiny, hostile(spans(tiny))).write(tmp_path / "x.still")
    with pytest.raises(DamageError):
        agent.import_session(tmp_path / "x.still")
    assert agent.sessions() == []


@pytest.mark.parametrize("strange", HARMLESS.values(), ids=HARMLESS.keys())
def test_strange_tensors_do_no_harm(
    strange: Callable[[list[Span]], list[Span]], agent: Agent, tiny: FrozenModel, tmp_path: Path
) -> None:
    """The session answers, is compacted, saved and resumed."""
    portable(tiny, strange(spans(tiny))).write(tmp_path / "x.still")
    chat = agent.import_session(tmp_path / "x.still")
    for _ in range(2):
        chat.send("The wind rose, the sea was grey and long, and nobody spoke.", temperature=1.0)
    assert chat.stats.rounds > 1 and chat.stats.slots <= 64
    chat.close()
    assert len(agent.session("x").history()) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_state_that_gives_no_numbers_is_told_and_no_reply_is_made_of_it(
    temperature: float, agent: Agent, tiny: FrozenModel, tmp_path: Path
) -> None:
    """Finite, and too large to compute with: only the model can find out."""
    large = changed(1, lambda s: replace(s, values=torch.full_like(s.values, 3e38)))
    portable(tiny, large(spans(tiny))).write(tmp_path / "x.still")
    chat = agent.import_session(tmp_path / "x.still")
    with pytest.raises(DamageError, match="rewind"):
        chat.send("Hello?", temperature=temperature)
    assert len(chat.history()) == 4


USAGE: dict[str, dict[str, object]] = {
    "endless": {"generated_tokens": 10**18, "compactions": 10**18},
    "negative": {"generated_tokens": -5, "compactions": -1},
    "more than there are": {"generated_tokens": 3},
    "of other types": {"generated_tokens": "2", "compactions": [], "stop": "x"},
    "true": {"generated_tokens": True, "stop": [1, None, ""]},
    "endless stops": {"generated_tokens": 2, "stop": ["yes"] * 1000},
}


@pytest.mark.parametrize("usage", USAGE.values(), ids=USAGE.keys())
def test_a_hostile_log_is_replayed_or_refused(
    usage: dict[str, object], agent: Agent, tiny: FrozenModel, tmp_path: Path
) -> None:
    portable(tiny, spans(tiny), usage).write(tmp_path / "x.still")
    chat = agent.import_session(tmp_path / "x.still")
    try:
        chat.rewind(2)
    except StillError:
        assert len(chat.history()) == 4
    else:
        assert len(chat.history()) == 2 and chat.send("Hello?").usage.prefilled_tokens


PATHS = ["../outside", "/tmp/outside", "a/../../outside", "..", "-rf", "a\nb", "CON", "x" * 512]


@pytest.mark.parametrize("name", PATHS)
def test_a_name_is_no_path(name: str, agent: Agent, tiny: FrozenModel, tmp_path: Path) -> None:
    """Not when it is exported, and not when it comes with an import."""
    before = {*tmp_path.iterdir()}, {*tmp_path.parent.iterdir()}
    file = tmp_path / "x.still"
    replace(portable(tiny, spans(tiny)), name=name).write(file)
    agent.import_session(file)
    agent.export(name, tmp_path / "again.still")
    assert [info.name for info in agent.sessions()] == [name]
    after = {*tmp_path.iterdir()} - {file, tmp_path / "again.still"}, {*tmp_path.parent.iterdir()}
    assert after == before
    assert file.read_bytes() == (tmp_path / "again.still").read_bytes()


def test_an_export_follows_no_link(agent: Agent, tmp_path: Path) -> None:
    agent.session("x").send("Hello.")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for target in (precious, tmp_path / "not there"):
        link = tmp_path / "link.still"
        link.symlink_to(target)
        with pytest.raises(InputError, match="there already"):
            agent.export("x", link)
        link.unlink()
    assert precious.read_text() == "mine" and not (tmp_path / "not there").exists()
    hard = tmp_path / "hard.still"
    os.link(precious, hard)
    with pytest.raises(InputError, match="there already"):
        agent.export("x", hard)
    assert precious.read_text() == "mine"
