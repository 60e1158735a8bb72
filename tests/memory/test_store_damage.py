"""What is damaged is never used: each byte is behind a digest, and damage stays where it is."""

from __future__ import annotations

import random
import sqlite3
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from still_memory.checkpoint import Checkpoint, Entry
from still_memory.codec import encode
from still_memory.digests import digest
from still_memory.errors import DamageError, StillError, StoreError
from still_memory.identity import ModelIdentity
from still_memory.records import NewTurn, TurnRecord
from still_memory.span import Span
from still_memory.store import MemoryStore

Opens = Callable[..., MemoryStore]
Saved = tuple[dict[str, Checkpoint], dict[str, list[TurnRecord]]]


@pytest.fixture
def saved(
    open_store: Opens,
    path: Path,
    model: ModelIdentity,
    raw_span: Callable[..., Span],
    compact_span: Callable[..., Span],
) -> Saved:
    """Two sessions of three turns; what they held and said."""
    states, said = {}, {}
    with open_store() as store:
        for seed, name in enumerate(("alice", "bob")):
            compact, raw = compact_span(0, 20, 5, 50 * seed), raw_span(20, 30, 50 * seed + 9)
            states[name] = Checkpoint(
                (Entry(compact, 0, 20, 0, "memory", 1), Entry(raw, 20, 30, 5, "tail")),
                30,
                {"next": seed},
            )
            turns = [NewTurn("user", f"{name} says {n}", [n, seed], {"n": n}) for n in range(3)]
            store.create(
                name, model, checkpoint=states[name], turns=turns, settings={"system": name}
            )
            said[name] = store.history(name)
    return states, said


def read(store: MemoryStore, name: str) -> tuple[Checkpoint, list[TurnRecord]]:
    head = store.head(name)
    assert head is not None
    return store.load(head), store.history(name)


def change(path: Path, statement: str, *values: object) -> None:
    conn = sqlite3.connect(path)
    assert conn.execute(statement, values).rowcount > 0
    conn.commit()
    conn.close()


ALICE = "(select id from sessions where name = 'alice')"
HER_SPANS = (
    "(select span from checkpoint_spans join checkpoints on id = checkpoint"
    f" where session = {ALICE})"
)
FLIPPED = "cast(substr({0}, 1, {1}) || x'{2}' || substr({0}, {1} + 2) as blob)"

DAMAGE = {
    "a layer's first byte": "update span_layers set data = "
    f"{FLIPPED.format('data', 0, 'ff')} where span in {HER_SPANS}",
    "a layer's last byte": "update span_layers set data ="
    " cast(substr(data, 1, length(data) - 1) || x'a5' as blob)"
    f" where span in {HER_SPANS} and layer = 1",
    "a byte of keys": f"update span_layers set data = {FLIPPED.format('data', 500, 'a5')}"
    f" where span in {HER_SPANS}",
    "a byte of salience": "update span_layers set data ="
    f" cast(substr(data, 1, length(data) - 8) || x'a5a5a5a5' || substr(data, -4) as blob)"
    f" where layer = 0 and span in {HER_SPANS}",
    "an empty layer": f"update span_layers set data = x'' where span in {HER_SPANS}",
    "a layer's digest": "update span_layers set digest = "
    f"{FLIPPED.format('digest', 3, 'a5')} where span in {HER_SPANS}",
    "a layer lost": f"delete from span_layers where layer = 1 and span in {HER_SPANS}",
    "a layer renumbered": "update span_layers set layer = 7"
    f" where layer = 1 and span in {HER_SPANS}",
    "a span lost": f"delete from spans where id in {HER_SPANS}",
    "a span's start": f"update spans set start = start + 1 where id in {HER_SPANS}",
    "a span's end": f'update spans set "end" = "end" + 1 where id in {HER_SPANS}',
    "a span's rotation": f"update spans set rotated_at = 3 where id in {HER_SPANS}",
    "a span's rounds": f"update spans set rounds = rounds + 1 where id in {HER_SPANS}",
    "a span's compactor": f"update spans set compactor = 'other' where id in {HER_SPANS}",
    "a span's tokens": "update spans set ids = zeroblob(40)"
    f" where ids not null and id in {HER_SPANS}",
    "a span's tokens lost": f"update spans set ids = null where ids not null and id in {HER_SPANS}",
    "tokens of another length": "update spans set ids = x'00', bytes = bytes - 39"
    f" where ids not null and id in {HER_SPANS}",
    "a span's layers": f"update spans set layers = layers + 1 where id in {HER_SPANS}",
    "a span's size": f"update spans set bytes = bytes - 1 where id in {HER_SPANS}",
    "a span's address": "update spans set address = replace(address, 'a', 'b')"
    f" where id in {HER_SPANS}",
    "a position": "update checkpoints set entries = replace(entries, ',5,', ',6,')"
    f" where session = {ALICE}",
    "entries that are not JSON": f"update checkpoints set entries = '[' where session = {ALICE}",
    "entries that are not UTF-8": "update checkpoints set entries = cast(x'ff' as text)"
    f" where session = {ALICE}",
    "the extra state": f"update checkpoints set extra = '{{}}' where session = {ALICE}",
    "the length": f"update checkpoints set tokens = 29 where session = {ALICE}",
    "the number of turns": f"update checkpoints set turns = 4 where session = {ALICE}",
    "the slots": f"update checkpoints set slots = 4 where session = {ALICE}",
    "the last turn": f"update checkpoints set turn = turn - 1 where session = {ALICE}",
    "no last turn": f"update checkpoints set turn = null where session = {ALICE}",
    "the seal": f"update checkpoints set digest = x'00' where session = {ALICE}",
    "the checkpoint lost": f"delete from checkpoints where session = {ALICE}",
    "the generation": f"update sessions set generation = 2 where id = {ALICE}",
    "the settings": f"update sessions set settings = '{{}}' where id = {ALICE}",
    "settings that are not JSON": f"update sessions set settings = '' where id = {ALICE}",
    "a turn's text": "update turns set text = 'changed' where text = 'alice says 1'",
    "a turn's role": "update turns set role = 'system' where text = 'alice says 0'",
    "a turn's tokens": "update turns set tokens = x'01000000' where text = 'alice says 2'",
    "a turn's time": "update turns set created = 'now' where text = 'alice says 1'",
    "a turn's usage": "update turns set usage = '{}' where text = 'alice says 1'",
    "a turn's digest": "update turns set digest = x'' where text = 'alice says 1'",
    "a turn's parent": "update turns set parent = null where text = 'alice says 1'",
    "turns in a ring": "update turns set parent ="
    " (select id from turns where text = 'alice says 2') where text = 'alice says 0'",
    "a turn lost": "delete from turns where text = 'alice says 1'",
    "the newest turn lost": "delete from turns where text = 'alice says 2'",
}


@pytest.mark.parametrize("statement", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_a_typed_error_and_other_sessions_are_unharmed(
    statement: str,
    saved: Saved,
    open_store: Opens,
    path: Path,
    same: Callable[[Checkpoint, Checkpoint], bool],
) -> None:
    change(path, statement)
    store = open_store()
    with pytest.raises(DamageError, match=r"damaged|lacks"):
        read(store, "alice")
    state, turns = read(store, "bob")
    assert same(state, saved[0]["bob"]) and turns == saved[1]["bob"]


@pytest.mark.parametrize(
    "statement",
    [
        "update meta set value = zeroblob(32)",
        "update models set identity = replace(identity, 'w', 'v')",
    ],
    ids=["the key", "the model's identity"],
)
def test_damage_to_what_sessions_share_is_noticed(
    statement: str, saved: Saved, open_store: Opens, path: Path
) -> None:
    change(path, statement)
    store = open_store()
    for name in ("alice", "bob"):
        with pytest.raises(DamageError):
            read(store, name)


def test_a_lost_key_is_noticed_at_once(saved: Saved, open_store: Opens, path: Path) -> None:
    change(path, "delete from meta")
    with pytest.raises(DamageError, match="lost its key"):
        open_store()


def test_a_codec_of_the_future_asks_for_an_upgrade(
    saved: Saved, open_store: Opens, path: Path
) -> None:
    change(path, f"update spans set codec = 'int2' where id in {HER_SPANS}")
    with pytest.raises(StoreError, match="'int2'; upgrade"):
        read(open_store(), "alice")


def test_a_damaged_session_can_be_deleted(saved: Saved, open_store: Opens, path: Path) -> None:
    change(path, DAMAGE["a span's size"])
    store = open_store()
    store.delete("alice")
    assert [info.name for info in store.sessions()] == ["bob"]
    assert (store.stats().spans, store.stats().turns) == (2, 3)


def test_a_swollen_layer_is_refused_before_it_is_read(
    saved: Saved, open_store: Opens, path: Path
) -> None:
    change(path, f"update span_layers set data = zeroblob(50000000) where span in {HER_SPANS}")
    store = open_store()
    head = store.head("alice")
    assert head is not None
    tracemalloc.start()
    try:
        with pytest.raises(DamageError, match="size"):
            store.load(head)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**31 - 1, 2**62])
def test_an_attacker_who_has_the_key_still_gets_no_allocation(
    size: int, saved: Saved, open_store: Opens, path: Path
) -> None:
    """Digests guard against damage; sizes are checked whether or not a digest is right."""
    conn = sqlite3.connect(path)
    (key,) = conn.execute("select value from meta").fetchone()
    row, data = conn.execute(
        f"select id, data from span_layers where span in {HER_SPANS} and layer = 0"
    ).fetchone()
    grown = data.replace(b"[2,5,8]", b"[2,%d,8]" % size)
    header = int.from_bytes(data[:8], "little") + len(grown) - len(data)
    grown = header.to_bytes(8, "little") + grown[8:]
    assert grown != data
    # all that guards the row is made right again: digest, size, address, entries, seal
    (span,) = conn.execute("select span from span_layers where id = ?", [row]).fetchone()
    conn.execute(
        "update span_layers set data = ?, digest = ? where id = ?",
        [grown, digest(key, b"still layer", grown), row],
    )
    conn.execute("update spans set bytes = bytes + ? where id = ?", [len(grown) - len(data), span])
    address, start, end, rotated_at, rounds, compactor, model = conn.execute(
        'select s.address, start, "end", rotated_at, rounds, compactor, m.address'
        " from spans s join models m on m.id = s.model where s.id = ?",
        [span],
    ).fetchone()
    marks = [
        d
        for (d,) in conn.execute(
            "select digest from span_layers where span = ? order by layer", [span]
        )
    ]
    forged = digest(
        key, b"still span", model, start, end, rotated_at, rounds, compactor, "exact", *marks
    ).hex()
    conn.execute("update spans set address = ? where id = ?", [forged, span])
    entries, extra, slots, held, last = conn.execute(
        "select entries, c.extra, slots, bytes, t.digest from checkpoints c join turns t"
        f" on t.id = c.turn where session = {ALICE}"
    ).fetchone()
    entries = entries.replace(address, forged)
    (settings,) = conn.execute(f"select settings from sessions where id = {ALICE}").fetchone()
    seal = digest(
        key,
        b"still checkpoint",
        "alice",
        1,
        model,
        3,
        30,
        last,
        settings,
        slots,
        held,
        entries,
        extra,
    )
    conn.execute(
        f"update checkpoints set entries = ?, digest = ? where session = {ALICE}", [entries, seal]
    )
    conn.commit()
    conn.close()

    store = open_store()
    head = store.head("alice")
    assert head is not None
    with pytest.raises(DamageError, match="layer 0 of span"):
        store.load(head)


def test_bytes_flipped_anywhere_in_the_file_give_no_wrong_answer(
    saved: Saved,
    open_store: Opens,
    path: Path,
    same: Callable[[Checkpoint, Checkpoint], bool],
) -> None:
    """A flip is noticed, or it hit what nothing was read from; it never changes an answer."""
    good = path.read_bytes()
    used = [at for at, byte in enumerate(good) if byte]
    chance = random.Random(1)
    noticed = 0
    for _ in range(150):
        bad = bytearray(good)
        bad[chance.choice(used)] ^= 1 << chance.randrange(8)
        for leftover in path.parent.iterdir():
            leftover.unlink()
        path.write_bytes(bad)
        for name in ("alice", "bob"):
            try:
                with open_store(timeout=0.1) as store:
                    if store.head(name) is None:  # its name was hit
                        noticed += 1
                        continue
                    state, turns = read(store, name)
            except StillError:
                noticed += 1
                continue
            assert same(state, saved[0][name])
            assert turns == saved[1][name]
    assert noticed > 50


def test_a_truncated_file_is_a_typed_error(saved: Saved, open_store: Opens, path: Path) -> None:
    good = path.read_bytes()
    for size in (50, 1000, 65536, len(good) // 2, len(good) - 65536):
        for leftover in path.parent.iterdir():
            leftover.unlink()
        path.write_bytes(good[:size])
        with pytest.raises(StoreError), open_store() as store:
            for name in ("alice", "bob"):
                read(store, name)


def test_the_size_of_a_layer_is_that_of_its_tensors(
    saved: Saved, open_store: Opens, path: Path
) -> None:
    store = open_store()
    head = store.head("bob")
    assert head is not None
    spans = [entry.span for entry in store.load(head).entries]
    written = sum(len(encode(slots)) for span in spans for slots in span.layers)
    written += sum(4 * len(span.ids or ()) for span in spans)
    assert store.sessions()[0].bytes == written


def test_times_that_cannot_be_read_are_a_typed_error_of_the_list_alone(
    saved: Saved, open_store: Opens, path: Path
) -> None:
    change(path, f"update sessions set updated = 'once' where id = {ALICE}")
    store = open_store()
    with pytest.raises(DamageError, match="session 'alice' is damaged: its times"):
        store.sessions()
    read(store, "alice"), read(store, "bob")
