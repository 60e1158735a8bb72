"""An agent with a key: the same conversation, and a file that does not tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from still_agent import Agent, Budget, EncryptionError, Sampling
from still_memory.store import MemoryStore
from tests.agent.conftest import MakeAgent, Pooling
from tests.agent.test_fork import PROSE, state_of, talk
from tests.agent.test_rebuild import lived, said

KEY, OTHER = bytes(32), bytes(range(32))


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILL_AGENT_KEY", raising=False)


def test_a_conversation_is_the_same_and_the_file_does_not_tell_it(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    """Forks, rewinds, replays and a rebuild among it."""
    plain, sealed = (
        lived(make_agent(MemoryStore(tmp_path / name, key=key), compactor=Pooling()))
        for name, key in (("plain.db", None), ("sealed.db", KEY))
    )
    assert said(plain) == said(sealed) and state_of(plain) == state_of(sealed)
    agent = make_agent(MemoryStore(tmp_path / "sealed.db", key=KEY), compactor=Pooling())
    again = agent.session("x")
    assert said(again) == said(plain) and state_of(again) == state_of(plain)
    state = state_of(agent.session("y"))
    rebuilt = agent.rebuild("y")
    assert state_of(rebuilt) == state
    assert rebuilt.restored is not None and rebuilt.restored.faithful
    assert [m.number for m in again.search("sea grey")] == [
        m.number for m in plain.search("sea grey")
    ]
    files = [tmp_path / f"sealed.db{end}" for end in ("", "-wal")]
    data = b"".join(file.read_bytes() for file in files if file.exists())
    assert len(data) > 65536
    for word in (b"The wind", b"Nobody", b"Brief."):
        assert word not in data and word.lower() not in data


def test_a_key_is_given_to_an_agent_and_goes_with_its_exports(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def load(name: str, key: object, **more: object) -> Agent:
        return Agent.load(
            tiny_folder, store=tmp_path / name, compactor="streaming", key=key,
            budget=Budget(slots=64), sampling=Sampling(max_tokens=4), **more,
        )  # fmt: skip

    with load("a.db", lambda: KEY.hex(), codec="int8") as agent:
        chat = agent.session("x")
        talk(chat, 2)
        state = state_of(chat)
        agent.export("x", tmp_path / "x.still")
        agent.export("x", tmp_path / "plain.still", plain=True)
    prose = PROSE[:20].encode()
    assert prose not in (tmp_path / "x.still").read_bytes()
    assert prose in (tmp_path / "plain.still").read_bytes()
    with pytest.raises(EncryptionError, match="does not open with this key"):
        load("a.db", OTHER)
    with load("a.db", KEY) as agent:
        assert state_of(agent.session("x")) == state
    with load("b.db", OTHER) as agent:
        with pytest.raises(EncryptionError, match="does not open with this key"):
            agent.import_session(tmp_path / "x.still")
        assert state_of(agent.import_session(tmp_path / "x.still", key=KEY)) == state
        assert state_of(agent.import_session(tmp_path / "plain.still", "y")) == state
