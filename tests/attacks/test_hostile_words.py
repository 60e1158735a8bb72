"""SQL in names, texts and filters, and FTS5's own language in searches: all of it is only text."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from still_agent.ephemeral import EphemeralStore
from still_memory.errors import InputError, StillError, UnknownSessionError
from still_memory.records import Head, NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, check_file, mark, state, told

SQL = [
    "' or 1=1 --", "x'; delete from sessions; --", "%", "_", "alice' union select key from meta --",
    "alice\0", "\0", "alice'--", '"; drop table turns; --', "alice/*", "?1", ":name", "$[0]",
    "alice' and (select hex(value) from meta) like '%", "*", "[alice]", "`alice`", "ALICE", "alicé",
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "s.db", synchronous="NORMAL") as made:
        begin(made, "alice", "the brass key is in Porto")
        yield made


def begin(store: MemoryStore, name: str, *texts: str) -> Head:
    turns = [NewTurn("user", text, [1]) for text in texts]
    return store.create(name, MODEL, checkpoint=state(1), turns=turns, settings={"system": name})


def schema(store: MemoryStore) -> list[Any]:
    conn = sqlite3.connect(store.path)
    try:
        return conn.execute("select * from sqlite_master order by name").fetchall()
    finally:
        conn.close()


@pytest.mark.parametrize("text", SQL)
def test_sql_is_a_name_a_role_and_a_text_like_any_other(text: str, store: MemoryStore) -> None:
    before = schema(store)
    assert store.head(text) is None
    for verb in (store.history, store.delete):
        with pytest.raises(UnknownSessionError):
            verb(text)
    made = store.create(
        text, MODEL, checkpoint=state(2), turns=[NewTurn(text, text, [1], {text: text})],
        settings={"system": text, text: text},
    )  # fmt: skip
    assert store.head(text) == made and {i.name for i in store.sessions()} == {"alice", text}
    assert told(store, text) == [(1, text, text, [1], {text: text})]
    forked = store.fork(made, text + "'", state(3))
    assert mark(store.load(forked)) == mark(state(3))
    for name in (text, text + "'"):
        store.delete(name)
    assert [i.name for i in store.sessions()] == ["alice"]
    assert [t[2] for t in told(store, "alice")] == ["the brass key is in Porto"]
    assert schema(store) == before
    check_file(store.path)


OPERATORS = st.lists(
    st.sampled_from([
        "heron", "brass", '"', '""', "'", "(", ")", "*", "^", "+", "-", ":", ",", "{", "}", "AND",
        "OR", "NOT", "NEAR", "NEAR(", "/", "\\", "text", "rank", "rowid", "turn_words", "\0", "\n",
        "--", ";", "porto", "\u202e", "ﬁ", "e\u0301",
    ]),
    max_size=12,
)  # fmt: skip


@given(parts=OPERATORS, glue=st.sampled_from(["", " "]))
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_no_search_reaches_another_session(parts: list[str], glue: str, store: MemoryStore) -> None:
    bob = store.head("bob") or begin(store, "bob", "a heron", "text rank rowid near or and not")
    try:
        found = store.search(bob, glue.join(parts))
    except InputError:
        return
    assert {match.number for match in found} <= {1, 2}
    assert not any("brass" in m.excerpt or "Porto" in m.excerpt for m in found)


@pytest.mark.parametrize("limit", [-1, 1.5, "1; drop table turns", None, True, 10**30 * 1.0])
def test_a_limit_is_a_number(limit: Any, store: MemoryStore) -> None:
    head = store.head("alice")
    assert head is not None
    with pytest.raises(InputError, match="limit"):
        store.search(head, "brass", limit)
    ephemeral = EphemeralStore()
    made = ephemeral.create("x", MODEL, checkpoint=state(1), turns=[], settings={})
    with pytest.raises(InputError, match="limit"):
        ephemeral.search(made, "brass", limit)
    assert store.search(head, "brass", 0) == [] and len(store.search(head, "brass", 10**30)) == 1


@pytest.mark.parametrize("name", [None, 7, b"alice", ["alice"], {"name": "alice"}, object()])
def test_a_name_is_a_text(name: Any, store: MemoryStore) -> None:
    head = store.head("alice")
    assert head is not None
    for verb in (store.head, store.history, store.delete):
        with pytest.raises(InputError):
            verb(name)
    with pytest.raises(InputError):
        store.fork(head, name, state(1))
    with pytest.raises(InputError):
        store.search(head, name)


@pytest.mark.parametrize(
    "query", ['" ' * 50_000 + "heron", "a" * 1_000_000, "(" * 100_000 + "x", "x-" * 100_000]
)
def test_a_long_search_ends_soon(query: str, store: MemoryStore) -> None:
    head = store.head("alice")
    assert head is not None
    began = time.process_time()
    try:
        assert store.search(head, query) == []
    except StillError as error:
        assert len(str(error)) < 500
    assert time.process_time() - began < 5
