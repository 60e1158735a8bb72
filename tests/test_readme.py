"""The README's example and the scripts in `examples/` run as they are printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def run(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The code's output."""
    exec(code, {"__name__": "__main__"})
    return capsys.readouterr().out


def test_the_readme_has_one_example_of_about_ten_lines() -> None:
    (example,) = blocks("README.md", "python")
    assert len(example.strip().splitlines()) <= 10


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_example_of_a_page_runs_and_resumes(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    example = blocks(page, "python")[0]
    for reused in (False, True):
        out = run(example, capsys)
        assert "reused_tokens=" in out
        assert (tmp_path / "memory.db").exists()
        turns = int(re.findall(r"turns=(\d+)", out)[-1])
        assert (turns > 5) == reused


EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_and_leave_nothing_behind(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "memory")]))
    code = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    out = run(code, capsys)
    assert "tokens" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", ["docs/langchain.md"])
def test_the_examples_of_a_how_to_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for example in blocks(page, "python"):
        exec(example, names)


def test_the_example_of_langgraph_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    *replies, branches = run(blocks("docs/langgraph.md", "python")[0], capsys).splitlines()
    assert "Porto" in replies[0] and branches == "[] ['bob']"
    exec(blocks("docs/langgraph.md", "python")[1], {})


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").split("## Files")[1]
    named = {Path(line.split()[0]).name for line in tree.splitlines() if line.split()}
    folders = ("still_agent", "memory", "integrations")
    modules = [module for folder in folders for module in (ROOT / folder).rglob("*.py")]
    missing = {m.name for m in modules if not m.name.startswith("__")} - named
    assert not missing, f"the README's tree lacks {sorted(missing)}"


def test_budgets_printed_in_the_concepts_are_valid() -> None:
    example = blocks("docs/concepts.md", "python")[0]
    exec(example, {})


def test_the_example_of_a_conversation_sent_whole_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (b for b in blocks("docs/concepts.md", "python") if "agent.answer(" in b)
    out = run(example, capsys)
    assert "Porto" in out and out.rstrip().endswith("3")
