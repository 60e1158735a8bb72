"""A conversation is found by what was said in it, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from still_memory import MemoryStore
from still_memory.checkpoint import Checkpoint
from still_memory.errors import DamageError
from still_memory.identity import ModelIdentity
from still_memory.records import Head, NewTurn

Begin = Callable[..., Head]
EMPTY = Checkpoint((), 0)
TOLD = [("user", "My name is Ana."), ("assistant", "Noted."), ("user", "Who am I?")]


def found(store: MemoryStore, *asked: Any) -> tuple[str, int, bool] | None:
    """Which session, how many turns of the list it has had, and whether it ends with them."""
    known = store.recognise(*asked)
    if known is None:
        return None
    assert [t.id for t in store.history(known.session)][known.turns - 1] == known.turn
    return known.session, known.turns, known.stands


@pytest.fixture
def begin(model: ModelIdentity) -> Begin:
    def begin(store: MemoryStore, name: str, told: list[tuple[str, str]], **settings: str) -> Head:
        turns = [NewTurn(role, text, [1, 2]) for role, text in told]
        return store.create(name, model, checkpoint=EMPTY, turns=turns, settings=settings)

    return begin


def test_the_session_with_the_longest_beginning_is_found(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", TOLD[:1], thread="t")
    begin(store, "b", TOLD[:2], thread="t")
    assert found(store, TOLD, "t", model) == ("b", 2, True)
    assert found(store, TOLD[:1], "t", model) == ("a", 1, True)


def test_a_session_that_went_on_otherwise_is_known_up_to_there(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", [*TOLD[:2], ("user", "Hi."), ("assistant", "Hello.")])
    assert found(store, TOLD, "a", model) == ("a", 2, False)


def test_one_letter_more_is_another_conversation(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", TOLD)
    assert found(store, [("user", "My name is Ana!"), *TOLD[1:]], "a", model) is None
    assert found(store, [("tool", TOLD[0][1]), *TOLD[1:]], "a", model) is None


def test_only_branches_of_the_thread_are_looked_at(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", TOLD)
    begin(store, "nameless", TOLD[:2], thread="")
    assert found(store, TOLD, "b", model) is None
    assert found(store, TOLD, "", model) == ("nameless", 2, True)
    begin(store, "a~2", TOLD[:1], thread="b")
    assert found(store, TOLD, "b", model) == ("a~2", 1, True)
    assert found(store, TOLD, "a~2", model) is None  # it is b's


def test_a_state_of_another_model_is_not_gone_on_from(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", TOLD)
    other = model.model_copy(update={"weights": "0" * 64})
    assert found(store, TOLD, "a", other) is None


def test_tenants_do_not_recognise_each_others_conversations(
    path: Path, begin: Begin, model: ModelIdentity
) -> None:
    with MemoryStore(path, tenant="one") as one, MemoryStore(path, tenant="two") as two:
        begin(one, "a", TOLD)
        assert found(two, TOLD, "a", model) is None
        assert found(one, TOLD, "a", model) == ("a", 3, True)


def test_forks_by_hand_are_conversations_of_their_own_and_others_branches(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    head = begin(store, "a", TOLD)
    store.fork(head, "mine", EMPTY)
    branch = store.fork(head, "a~2", EMPTY, thread="a")
    assert branch.settings == {"thread": "a"}
    assert store.branches("a") == ["a", "a~2"] and store.branches("mine") == ["mine"]
    again = store.fork(branch, "free", EMPTY)
    assert again.settings == {} and store.branches("a") == ["a", "a~2"]


def test_a_long_conversation_is_found_among_thousands_of_turns(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    told = [("user", f"number {n}") for n in range(1_203)]
    begin(store, "long", told[:1_100])
    assert found(store, told, "long", model) == ("long", 1_100, True)
    assert found(store, told[:3], "long", model) == ("long", 3, False)


def test_turns_moved_between_conversations_are_damage_and_not_reused(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    begin(store, "a", TOLD)
    begin(store, "b", [("user", "Something else."), *TOLD[1:]])
    with store._file.connection() as conn:
        conn.execute("update turns set said = (select said from turns where id = 3) where id = 6")
        conn.execute("update turns set said = null where id = 3")
        conn.commit()
    with pytest.raises(DamageError):
        found(store, [*TOLD, ("user", "And now?")], "b", model)


def test_a_beginning_that_many_share_costs_a_conversation_nothing_of_the_others(
    store: MemoryStore, begin: Begin, model: ModelIdentity
) -> None:
    def steps(thread: str) -> int:
        counted = [0]
        with store._file.reading() as conn:
            conn.set_progress_handler(lambda: counted.__setitem__(0, counted[0] + 1), 10)
        store.recognise(TOLD, thread, model)
        with store._file.reading() as conn:
            conn.set_progress_handler(None, 0)
        return counted[0]

    def more(long: int) -> None:
        for n in range(20):
            begin(store, f"{long} {n}", [*TOLD[:1], *(("user", f"{n}.{i}") for i in range(long))])

    more(2)
    assert found(store, TOLD, "2 7", model) == ("2 7", 1, False)
    assert found(store, TOLD, "new", model) is None
    before = steps("new"), steps("2 7")
    more(100)
    assert found(store, TOLD, "100 7", model) == ("100 7", 1, False)
    assert all(
        after < 3 * few for after, few in zip((steps("new"), steps("2 7")), before, strict=True)
    )
