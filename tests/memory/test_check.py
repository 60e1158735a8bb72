"""A check names what is damaged and whom it harms, reads only, and is not fooled either way."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from still_memory.check import MOST, check_store
from still_memory.checkpoint import Checkpoint
from still_memory.errors import StillError, StoreError
from still_memory.findings import Finding, Kind, Report
from still_memory.identity import ModelIdentity
from still_memory.migrations import APPLICATION_ID
from still_memory.records import NewTurn
from still_memory.span import Span
from still_memory.store import MemoryStore
from tests.memory import test_store_damage as damage

Opens = Callable[..., MemoryStore]
saved = damage.saved  # two sessions of three turns, "alice" and "bob"


def found(path: Path) -> list[Finding]:
    return list(check_store(path).findings)


def one(path: Path) -> Finding:
    (finding,) = found(path)
    return finding


def test_a_sound_store_has_no_findings(saved: damage.Saved, path: Path) -> None:
    report = check_store(path)
    assert (report.findings, report.damaged, report.complete) == ([], False, True)
    assert (report.sessions, report.turns, report.checkpoints, report.spans) == (2, 6, 2, 4)
    assert report.span_bytes > 10_000 and report.unharmed == {}


@pytest.mark.parametrize("statement", damage.DAMAGE.values(), ids=damage.DAMAGE.keys())
def test_whatever_is_damaged_is_found_and_harms_its_session_alone(
    statement: str, saved: damage.Saved, path: Path
) -> None:
    damage.change(path, statement)
    report = check_store(path)
    assert report.damaged
    assert {name for f in report.findings for name in f.sessions} == {"alice"}
    assert all(str(f) and f.remedy for f in report.findings)


HERS = damage.HER_SPANS


@pytest.mark.parametrize(
    ("statement", "kind", "how"),
    [
        ("delete from meta", "key", "lost its key"),
        ("update models set identity = replace(identity, ':\"w\"', ':\"v\"')", "model", "address"),
        ("update models set identity = '{'", "model", "cannot be read"),
        ("update sessions set created = 'once' where name = 'alice'", "session", "once"),
        ("update sessions set name = '' where name = 'alice'", "session", "512 characters"),
        (f"delete from checkpoint_spans where span in {HERS}", "reference", "is missing"),
        ("insert into checkpoint_spans select c.id, s.id from checkpoints c, spans s"
         f" where c.session = {damage.ALICE} and s.id not in {HERS}", "reference", "not name"),
        ("delete from turn_words where rowid = 2", "words", "does not hold"),
        ("insert into turn_words (rowid, text) values (2, 'more')", "words", "does not hold"),
        ("insert into turn_words (rowid, text) values (99, 'more')", "words", "not there"),
        ("update turn_words_data set block = x'00ff' where id > 10", "words|file", ""),
        ("create trigger t after insert on turns begin select 1; end", "schema", "trigger"),
        ("create view v as select 1", "schema", "view"),
        ("drop index turns_parent", "schema", "turns_parent is missing"),
        ("drop table span_layers", "schema", "span_layers is missing"),
        ("alter table spans add column more text", "schema", "columns of spans"),
        ("delete from _sqlite_migrations", "schema", "migrations"),
        ("update _sqlite_migrations set applied_at = cast(x'ff' as text)", "schema", "no text"),
        ("drop table _sqlite_migrations", "schema", "migrations"),
    ],
)  # fmt: skip
def test_what_no_resume_looks_at_is_found_too(
    statement: str, kind: str, how: str, saved: damage.Saved, path: Path
) -> None:
    conn = sqlite3.connect(path)
    conn.execute(statement)
    conn.commit()
    conn.close()
    assert any(f.kind in kind.split("|") and how in f.how for f in found(path)), found(path)


def test_the_place_of_a_damage_is_named(saved: damage.Saved, path: Path) -> None:
    damage.change(
        path,
        f"update span_layers set digest = zeroblob(32) where layer = 1 and span = (select max(span)"
        f" from checkpoint_spans where span in {HERS})",
    )
    finding = one(path)
    conn = sqlite3.connect(path)
    row, address = conn.execute(f"select id, address from spans where id in {HERS}"
                                " order by id desc limit 1").fetchone()  # fmt: skip
    conn.close()
    # its digest is part of the span's address: the layer's own bytes are not blamed
    assert (finding.kind, finding.row, finding.span) == ("span", row, address)
    assert "description" in finding.how and finding.sessions == ("alice",)


def test_each_damaged_layer_is_named(saved: damage.Saved, path: Path) -> None:
    damage.change(
        path,
        "update span_layers set data = cast(substr(data, 1, length(data) - 1) || x'a5' as blob)"
        f" where span in {HERS}",
    )
    findings = found(path)
    assert sorted((f.row, f.layer) for f in findings) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert {f.how for f in findings} == {f"layer {n} does not match its digest" for n in (0, 1)}


def test_a_damaged_turn_is_numbered_as_history_numbers_it(saved: damage.Saved, path: Path) -> None:
    damage.change(path, "update turns set text = 'changed' where text = 'bob says 1'")
    turn, words = found(path)
    assert (turn.kind, turn.turn, turn.row, turn.sessions) == ("turn", 2, 5, ("bob",))
    assert (words.kind, words.row) == ("words", 5)
    assert str(turn) == "turn 2 (row 5): it does not match its digest ['bob']"


def test_what_two_sessions_share_harms_both_and_what_is_whole_is_told(
    open_store: Opens, path: Path, model: ModelIdentity, raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> None:  # fmt: skip
    store, shared, later = open_store(), raw_span(0, 9), raw_span(9, 12, 5)
    said = [NewTurn("user", "one", [1])]
    head = store.create("alice", model, checkpoint=checkpoint_of([shared]), turns=said, settings={})
    store.fork(head, "bob", checkpoint_of([shared]))
    head = store.commit(head, checkpoint_of([shared, later]), said)
    store.close()

    start = "update span_layers set data = zeroblob(length(data)) where span = {} and layer = 0"
    damage.change(path, start.format(2))
    report = check_store(path)
    assert [f.sessions for f in report.findings] == [("alice",)]
    assert report.unharmed == {"alice": [1]}  # where a rewind may still go

    with open_store() as again:  # and it does; the damaged state is the older one then
        earlier = replace(head, turn=1, turns=1)
        (kept,) = again.kept(earlier)
        again.commit(earlier, again.load(kept), [])
    assert check_store(path).unharmed == {"alice": [1]}

    damage.change(path, start.format(1))
    report = check_store(path)
    assert [f.sessions for f in report.findings] == [("alice", "bob"), ("alice",)]
    assert report.unharmed == {"alice": [], "bob": []}


def test_what_a_stopped_prune_left_is_told_and_is_no_damage(
    saved: damage.Saved, path: Path
) -> None:
    conn = sqlite3.connect(path)
    conn.execute("pragma foreign_keys = on")
    conn.execute("delete from sessions where name = 'alice'")  # as one that is pruned begins
    conn.commit()
    conn.close()
    report = check_store(path)
    assert [f.kind for f in report.findings] == ["leftover", "leftover"] and not report.damaged
    assert "2 spans" in report.findings[0].how and "3 turns" in report.findings[1].how


def test_an_erasure_that_did_not_end_is_told_and_is_no_damage(
    saved: damage.Saved, open_store: Opens, path: Path
) -> None:
    with open_store() as store:
        store.delete("alice", erase=True)
        report = check_store(path)
        assert [f.kind for f in report.findings] == ["leftover"] and not report.damaged
        assert "erased" in report.findings[0].how and "scrub" in report.findings[0].remedy
        store.scrub()
        assert check_store(path).findings == []


def test_a_check_changes_nothing_and_waits_for_no_writer(
    saved: damage.Saved, open_store: Opens, path: Path
) -> None:
    before = hashlib.sha256(path.read_bytes()).digest()
    check_store(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert {f.name for f in path.parent.iterdir()} <= {path.name + end for end in
                                                       ("", "-wal", "-shm")}  # fmt: skip
    with open_store() as store, store._file.writing() as conn:
        conn.execute("update sessions set generation = 9")
        assert not check_store(path, timeout=0.1).damaged  # of what is committed


def test_a_session_that_goes_on_meanwhile_is_not_taken_for_damage(
    open_store: Opens, path: Path, model: ModelIdentity, raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> None:  # fmt: skip
    store = open_store()
    states = [checkpoint_of([raw_span(0, 30, seed)]) for seed in range(40)]
    said = [NewTurn("user", "hello there", [1])]
    heads = [store.create("a", model, checkpoint=states[0], turns=said, settings={})]

    def go_on(what: str, done: int, of: int) -> None:
        if states[len(heads) :]:
            heads.append(store.commit(heads[-1], states[len(heads)], said))

    report = check_store(path, on_progress=go_on)
    assert not report.findings and report.turns == 1 and len(heads) > 4
    assert not check_store(path).findings


def test_layers_are_read_one_at_a_time(
    open_store: Opens, path: Path, model: ModelIdentity, raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> None:  # fmt: skip
    with open_store(synchronous="NORMAL") as store:
        spans = [raw_span(20_000 * n, 20_000 * (n + 1), n) for n in range(6)]
        layer = spans[0].nbytes // 2
        state = checkpoint_of(spans)
        store.create("alice", model, checkpoint=state, turns=[], settings={})
    told: list[tuple[str, int, int]] = []
    tracemalloc.start()
    try:
        check_store(path, on_progress=lambda *row: told.append(row))
        assert tracemalloc.get_traced_memory()[1] < 3 * layer < 6 * spans[0].nbytes / 3
    finally:
        tracemalloc.stop()
    last = [row for row in told if row[0] == "bytes of spans"][-1]
    assert last[1] == last[2] > 12 * layer * 0.9


def test_bytes_flipped_anywhere_are_found_where_they_do_harm(
    saved: damage.Saved, open_store: Opens, path: Path,
    same: Callable[[Checkpoint, Checkpoint], bool],
) -> None:  # fmt: skip
    good = path.read_bytes()
    used = [at for at, byte in enumerate(good) if byte]
    chance = random.Random(2)
    harmful = 0
    for _ in range(80):
        bad = bytearray(good)
        bad[chance.choice(used)] ^= 1 << chance.randrange(8)
        for leftover in path.parent.iterdir():
            leftover.unlink()
        path.write_bytes(bad)
        try:
            report: Report | None = check_store(path)
        except StoreError:  # not a store any more, by its header
            report = None
        harmed = False
        for name in ("alice", "bob"):
            try:
                with open_store(timeout=0.1) as store:
                    state, turns = damage.read(store, name)
                    harmed |= not same(state, saved[0][name]) or turns != saved[1][name]
            except (StillError, AssertionError):
                harmed = True
        harmful += harmed
        assert not harmed or report is None or report.damaged
    assert harmful > 20


def test_a_store_that_is_wholly_damaged_is_not_told_without_end(
    open_store: Opens, path: Path, model: ModelIdentity, raw_span: Callable[..., Span],
    checkpoint_of: Callable[..., Checkpoint],
) -> None:  # fmt: skip
    with open_store() as store:
        turns = [NewTurn("user", "x", [n]) for n in range(MOST + 5)]
        state = checkpoint_of([raw_span(0, 3)])
        store.create("alice", model, checkpoint=state, turns=turns, settings={})
    damage.change(path, "update turns set digest = x'00'")
    report = check_store(path)
    assert len(report.findings) == MOST and not report.complete


@pytest.mark.parametrize(
    "statement",
    ["delete from turn_words_data where id > 10", "update turn_words_data set block = x'00ff'",
     "drop table turn_words"],
)  # fmt: skip
def test_a_damaged_index_is_built_anew(
    statement: str, saved: damage.Saved, open_store: Opens, path: Path
) -> None:
    conn = sqlite3.connect(path)
    conn.execute(statement)
    conn.commit()
    conn.close()
    assert check_store(path).damaged
    with open_store() as store:
        store.reindex()
        head = store.head("bob")
        assert head is not None and [m.number for m in store.search(head, "says 1")] == [2]
    assert not check_store(path).findings


@pytest.fixture
def others(path: Path) -> Iterator[dict[str, Path]]:
    """Files that are no store to check."""
    names = {name: path.with_name(name) for name in ("absent", "letter", "bookmarks", "future")}
    names["letter"].write_bytes(b"Dear Ana, " * 400)
    for name, application in (("bookmarks", 0), ("future", APPLICATION_ID)):
        conn = sqlite3.connect(names[name])
        conn.execute(f"pragma application_id = {application}")
        conn.execute("create table _sqlite_migrations (migration_set text, name text)")
        row = ("still_memory", "m999_telepathy")
        conn.execute("insert into _sqlite_migrations values (?, ?)", row)
        conn.commit()
        conn.close()
    yield names


@pytest.mark.parametrize(
    ("name", "why"),
    [("absent", "there is no store"), ("letter", "not a SQLite file"),
     ("bookmarks", "another program"), ("future", r"newer still-agent \(m999_telepathy\)")],
)  # fmt: skip
def test_what_is_no_store_is_a_typed_error(name: str, why: str, others: dict[str, Path]) -> None:
    before = others[name].read_bytes() if others[name].exists() else b""
    with pytest.raises(StoreError, match=why):
        check_store(others[name])
    assert (others[name].read_bytes() if others[name].exists() else b"") == before


def test_each_kind_of_finding_has_a_remedy() -> None:
    for kind in Kind.__args__:  # type: ignore[attr-defined]
        assert Finding(kind, "so").remedy
