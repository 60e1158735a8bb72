"""Who made a memory: what a mismatch says, and what a new compactor may do with an old one's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from still_agent import Agent, Budget, IdentityError
from still_agent.models import FrozenModel
from still_memory.compactors import StreamingCompactor
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.test_fork import PROSE, mark, state_of


def writers(chat: Any) -> set[str | None]:
    """Who wrote the compact spans that the session holds."""
    return {e.span.compactor for e in chat._saved.entries if e.share == "memory"}


def test_a_new_compactor_goes_on_with_what_the_old_one_wrote(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    old, new = Pooling(), StreamingCompactor()
    with make_agent(tmp_path / "s.db", schedule="tiered", compactor=old) as agent:
        chat = agent.session("x", system="Brief.")
        chat.read(PROSE * 12)
        state = state_of(chat)
        assert writers(chat) == {old.identity.address}
    chat = make_agent(tmp_path / "s.db", schedule="tiered", compactor=new).session("x")
    assert state_of(chat) == state  # not a bit of it is another
    chat.send("And now?", max_tokens=2)
    seen = set()
    for _ in range(12):
        chat.read(PROSE)
        seen.add(frozenset(writers(chat)))
        assert mark(chat._store.load(chat._head)) == state_of(chat)
    # side by side at first; none claims what another wrote, and in the end all was read
    assert frozenset({old.identity.address, new.identity.address}) in seen
    assert writers(chat) <= {old.identity.address, new.identity.address}


def test_the_packaged_compactor_may_be_replaced_and_come_back(tmp_path: Path) -> None:
    path, seen = tmp_path / "s.db", []
    how: dict[str, Any] = {"store": path, "budget": Budget(slots=128), "device": "cpu"}
    for compactor in (None, "streaming", None):
        with Agent.load(compactor=compactor, **how) as agent:
            chat = agent.session("x", system="You are brief.")
            before = chat.stats.logical_tokens
            usage = chat.send("My sister Ana lives in Porto. " + PROSE * 8, max_tokens=2).usage
            assert usage.reused_tokens == before and usage.compactions
            seen.append(writers(chat))
            assert seen[-1] == {agent.compactor.identity.address}
    assert seen[0] == seen[2] != seen[1]


def test_a_mismatch_names_the_fields_and_the_command_that_rebuilds(
    tiny: FrozenModel, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my store.db"
    identity = tiny.identity.model_copy(update={"weights": "0" * 64, "dtype": "float16"})
    name = "-al's ☂"
    with Agent(tiny, StreamingCompactor(), MemoryStore(path), budget=Budget(slots=64)) as agent:
        agent.store.create(
            name, identity, checkpoint=agent._state()[0].checkpoint(), turns=[], settings={}
        )
        with pytest.raises(IdentityError, match=r"weights, dtype differ.*agent\.rebuild\(") as told:
            agent.session(name)
        assert "`" not in str(told.value)  # no command line makes an agent like this
    how: dict[str, Any] = {"store": path, "compactor": "streaming", "dtype": "float32"}
    budget = Budget(slots=96, schedule="append", horizon=500)
    with (
        Agent.load(tiny_folder, budget=budget, device="cpu", **how) as agent,
        pytest.raises(IdentityError) as told,
    ):
        agent.session(name)
    (command,) = re.findall("`(.*)`", str(told.value), re.DOTALL)
    assert shlex.split(command) == [
        "still-agent", "sessions", "rebuild", "--store", str(path), "--model", str(tiny_folder),
        "--compactor", "streaming", "--slots", "96", "--schedule", "append", "--horizon", "500",
        "--device", "cpu", "--dtype", "float32", "--", name,
    ]  # fmt: skip
    with Agent.load(tiny_folder, budget=Budget(slots=96, chunk=9), **how) as agent:
        with pytest.raises(IdentityError) as told:
            agent.session(name)
        assert "`" not in str(told.value)  # a chunk has no option
        assert agent.rebuild(name).stats.turns == 0
