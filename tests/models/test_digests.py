"""A digest of weights is computed once for given files, and never for others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from still_agent.models import digests, frozen, load_model
from still_memory.identity import ModelIdentity
from tests.models.test_loading import nudge_one_weight


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What was hashed, tensor by tensor; files settle at once."""
    monkeypatch.setenv("STILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED", -60.0)
    done: list[str] = []
    compute = frozen.weights_digest

    def counted(weights: dict[str, torch.Tensor]) -> str:
        done.append(compute(weights))
        return done[-1]

    monkeypatch.setattr(frozen, "weights_digest", counted)
    yield done


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def identity(folder: Path, dtype: str = "float32") -> ModelIdentity:
    return load_model(folder, device="cpu", dtype=dtype).identity


def notes(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


def test_weights_are_hashed_once(hashed: list[str], folder: Path, tmp_path: Path) -> None:
    first = identity(folder)
    assert identity(folder) == first and first.weights == hashed[0] and len(hashed) == 1
    assert identity(folder, "bfloat16").weights != first.weights and len(hashed) == 2
    assert len(json.loads(notes(tmp_path).read_text())) == 2


def test_files_that_were_touched_are_hashed_again(hashed: list[str], folder: Path) -> None:
    first, weights = identity(folder), folder / "model.safetensors"
    times = weights.stat()
    nudge_one_weight(folder)  # as many bytes
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # and it looks as old
    assert identity(folder).differences(first) == ["weights"] and len(hashed) == 2
    shutil.copy(weights, folder / "again")
    os.replace(folder / "again", weights)  # the same bytes in another inode
    assert identity(folder).weights == hashed[1] == hashed[2]


def test_a_file_written_a_moment_ago_is_not_trusted(
    hashed: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", 60.0)
    identity(folder)
    identity(folder)
    assert len(hashed) == 2 and not notes(tmp_path).exists()


def test_a_weight_that_is_changed_in_memory_shows(hashed: list[str], folder: Path) -> None:
    first = identity(folder)
    changed = load_model(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] += 1
    assert changed.identity.differences(first) == ["weights"]
    assert identity(folder) == first


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 10**5])
def test_notes_that_are_not_ours_are_as_none(
    hashed: list[str], folder: Path, tmp_path: Path, content: bytes
) -> None:
    first = identity(folder)
    notes(tmp_path).write_bytes(content)
    assert identity(folder) == first and len(hashed) == 2
    assert identity(folder) == first and len(hashed) == 2  # they are ours again


def test_without_a_place_for_notes_it_is_hashed_each_time(
    hashed: list[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert identity(folder) == identity(folder) and len(hashed) == 2


def test_notes_stay_few(hashed: list[str], folder: Path, tmp_path: Path) -> None:
    for number in range(300):
        digests.kept([folder / "config.json"], str(number), lambda: f"{1:064x}")
    assert len(json.loads(notes(tmp_path).read_text())) == 256
