"""The attacks that run at full size by command, here at a small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.vfs import library

ROOT = Path(__file__).parents[2]


def run(attack: str, *options: object) -> Any:
    """What the command found. A process of its own: it forks, and must have no other threads."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.attacks.{attack}", "--json", *map(str, options)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "memory")]),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{attack} ended with {done.returncode}"
    return json.loads(done.stdout)


def test_processes_are_killed_in_mid_turn_and_nothing_that_was_answered_is_lost() -> None:
    found = run("kills", "--kills", 12, "--processes", 3)
    assert found["kills"] == found["in_commit"] + found["in_turn"] == 12
    assert min(found["in_commit"], found["in_turn"]) > 0 and found["turns"] > 12


@pytest.mark.parametrize("log", [False, True])
def test_an_altered_byte_is_told_or_does_no_harm(log: bool) -> None:
    found = run("flips", "--count", 40 if log else 150, *(["--log"] if log else []))
    assert found["wrong"] == 0, found["wrong_ones"]
    noticed = found["older" if log else "typed"]
    assert noticed > found["alterations"] // 2 and (log or found["older"] == 0)


@pytest.mark.skipif(library() is None, reason="ctypes cannot reach the SQLite of this Python")
def test_the_power_fails_and_what_was_synced_is_there() -> None:
    full, normal = run("power", "--cuts", 40, "--verbs", 25)
    for found in (full, normal):
        assert found["wrong"] == 0, found["wrong_ones"]
        assert found["right"] == 40
    assert full["syncs"] > 25 and full["could_lose"] == 0  # a sync for each verb
    assert normal["syncs"] < full["syncs"] and normal["could_lose"] > 0


def test_many_processes_write_at_once_and_nothing_is_lost_or_mixed() -> None:
    found = run("rivals", "--processes", 4, "--sessions", 2, "--turns", 60)
    assert [found[kind]["turns"] for kind in ("own", "shared")] == [60, 60]
    assert found["own"]["sessions"] == 8 and found["own"]["conflicts"] == 0
    assert found["shared"]["sessions"] == 2 and found["shared"]["conflicts"] > 0
    assert found["shared"]["writers"] == 4
