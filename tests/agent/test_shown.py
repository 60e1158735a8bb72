"""What is shown of a reply that may call tools: its content, piece by piece, and no call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from still_agent.reply import Shown
from still_agent.tools import GEMMA, QWEN, ToolFormat

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def pieces_of(text: str, form: ToolFormat | None, size: int = 1) -> list[str]:
    shown = Shown(form)
    pieces = [shown.push(text[at : at + size]) for at in range(0, len(text), size)]
    return [*pieces, shown.finish(text)[1]]


@given(
    st.lists(st.sampled_from([CALL, "<tool_", "a ", "\n", "{", '"name":', "```json", "}"])),
    st.sampled_from([QWEN, GEMMA, None]),
    st.integers(1, 7),
)
def test_the_pieces_joined_are_the_content(
    parts: list[str], form: ToolFormat | None, size: int
) -> None:
    text = "".join(parts)
    content = text if form is None else form.parse(text)[0]
    assert "".join(pieces_of(text, form, size)) == content


def test_text_is_shown_as_it_comes() -> None:
    assert pieces_of("Yes, it is.", QWEN) == [*"Yes,", "", " i", "t", "", " i", "s", ".", ""]


def test_of_a_call_nothing_is_shown() -> None:
    assert "".join(pieces_of(f"Sure. \n{CALL}", QWEN)) == "Sure."


@pytest.mark.parametrize("text", ["<tool_call> is what I would say", "a < b"])
def test_what_only_looks_like_a_call_is_shown_at_the_end(text: str) -> None:
    assert "".join(pieces_of(text, QWEN)) == text
