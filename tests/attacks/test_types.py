"""Values of another type than the schema allows, which damage to a row's header can make."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from still_memory.store import MemoryStore
from tests.attacks.flips import NAMES, TURNS, judge, truth
from tests.attacks.states import fill

TABLES = (
    "meta", "models", "sessions", "turns", "checkpoints", "spans", "span_layers",
    "_sqlite_migrations",
)  # fmt: skip
VALUES = (None, 0, 7, -1, 2.5, "", "x", b"", b"\xff" * 32)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small store whose tables take anything."""
    path = tmp_path_factory.mktemp("types") / "good.db"
    with MemoryStore(path) as store:
        fill(store, NAMES, TURNS)
    conn = sqlite3.connect(path)
    conn.execute("pragma writable_schema = on")
    for word in ("not null", "strict"):
        conn.execute(
            "update sqlite_master set sql = replace(sql, ?1, '')"
            " where name in (select value from json_each(?2))",
            [word, json.dumps(TABLES)],
        )
    conn.commit()
    conn.close()
    return path.read_bytes()


@pytest.mark.parametrize("table", TABLES)
def test_a_value_of_another_type_is_told(table: str, loose: bytes, tmp_path: Path) -> None:
    path, right, told = tmp_path / "s.db", truth(), 0
    path.write_bytes(loose)
    conn = sqlite3.connect(path)
    columns = [row[1] for row in conn.execute(f"pragma table_info({table})")]
    keys = [row[1] for row in conn.execute(f"pragma table_info({table})") if row[5]]
    conn.close()
    for column in columns:
        if (table, column) in (("sessions", "name"), ("sessions", "tenant")) or column in keys:
            continue  # another name, or another's, is another session
        for value in VALUES:
            for leftover in tmp_path.iterdir():
                leftover.unlink()
            path.write_bytes(loose)
            conn = sqlite3.connect(path)
            try:
                conn.execute(
                    f'update {table} set "{column}" = ? where {keys[-1]} ='
                    f" (select max({keys[-1]}) from {table})",
                    [value],
                )
            except sqlite3.IntegrityError:  # of two rows that would be one
                conn.close()
                continue
            conn.commit()
            conn.close()
            verdict = judge(path, right, older=False)
            assert not verdict.startswith("wrong"), f"{table}.{column} = {value!r}: {verdict}"
            told += verdict == "typed"
    assert told >= len(columns)
