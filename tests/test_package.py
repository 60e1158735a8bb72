"""What is installed: three packages, their data, and nothing with a borrowed name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(built)


def test_a_wheel_holds_the_packages_and_no_other_top_level_name(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    packages = {"still_agent", "still_memory", "langchain_still"}
    assert {n for n in names if not n.endswith(".dist-info")} == packages


def test_nothing_called_memory_or_integrations_is_installed(wheel: zipfile.ZipFile) -> None:
    parts = {part for name in wheel.namelist() for part in Path(name).parts}
    assert not parts & {"memory", "integrations", "tests", "examples", "benchmarks", "__pycache__"}


@pytest.mark.parametrize(
    "path",
    [
        "still_agent/py.typed",
        "still_memory/py.typed",
        "langchain_still/py.typed",
        "still_agent/evaluation/words.txt",
        "still_agent/reference/books/wizard_of_oz.txt",
        "still_agent/reference/model/tokenizer.tiktoken",
        "still_agent/reference/model/tiktoken_config.json",
        "still_agent/reference/model/config.json",
        "still_agent/reference/model/model.safetensors",
        "still_agent/reference/still/config.json",
        "still_agent/reference/still/model.safetensors",
        *sorted(
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "still_agent/server/page").iterdir()
        ),
    ],
)
def test_package_data_is_in_the_wheel(wheel: zipfile.ZipFile, path: str) -> None:
    assert wheel.getinfo(path).file_size == (ROOT / source(path)).stat().st_size


FOLDERS = {"still_memory": "memory", "langchain_still": "integrations"}


def source(path: str) -> str:
    folder = FOLDERS.get(path.split("/")[0])
    return path if folder is None else f"{folder}/{path}"


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "still_agent").rglob("*.py")}
    for folder in (ROOT / name for name in FOLDERS.values()):
        modules |= {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}
    assert modules <= set(wheel.namelist())


def test_the_console_script_and_the_licence_are_declared(wheel: zipfile.ZipFile) -> None:
    info = {Path(n).name: n for n in wheel.namelist() if ".dist-info/" in n}
    assert b"still-agent = still_agent.cli.app:main" in wheel.read(info["entry_points.txt"])
    assert b"Apache License" in wheel.read(info["LICENSE"])
