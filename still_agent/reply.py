"""A reply: what is shown of it, what memory keeps of it, and what it cost.

These are three different things. Reasoning (`<think>…</think>`) is generated and attended to,
but not shown, and it leaves memory when the turn ends. A stop string and what follows it are
generated, but neither shown nor remembered. `Draft` keeps them apart while a reply grows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from still_agent.messages import ToolCall
from still_agent.models.tokenizers import TextStream, Tokenizer
from still_agent.tools import ToolFormat

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one turn. Nothing is reused or recomputed unsaid."""

    reused_tokens: int = 0  # logical tokens that stood in the state when the turn began
    prefilled_tokens: int = 0  # taken in: the message, and what frames it and the reply
    generated_tokens: int = 0
    compactions: int = 0

    def __add__(self, before: Usage) -> Usage:
        """Of this and of what came just before it."""
        return Usage(
            before.reused_tokens,
            self.prefilled_tokens + before.prefilled_tokens,
            self.generated_tokens + before.generated_tokens,
            self.compactions + before.compactions,
        )

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    `finish`: "stop" (it ended, or a stop string), "length", or "tool_calls" if there are any.
    """

    text: str
    usage: Usage
    finish: Finish
    reasoning: str = ""  # what stood in <think>…</think>
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Said:
    """A whole reply: what its reader gets, and the text that the ledger keeps."""

    content: str
    calls: tuple[ToolCall, ...]
    text: str


class Shown:
    """The pieces of a reply that may call tools: what comes before the calls.

    tools: the form of calls; without it there are none, and every piece is shown as it comes.
    """

    def __init__(self, tools: ToolFormat | None) -> None:
        self._tools = tools
        self._text = ""
        self._shown = 0

    def push(self, piece: str) -> str:
        """Take a piece; what can be shown by now."""
        self._text += piece
        if self._tools is None:
            return self._show(len(self._text))
        longest = max(map(len, self._tools.marks))
        since = max(0, self._shown - longest)
        found = [at for mark in self._tools.marks if (at := self._text.find(mark, since)) >= 0]
        begun = max(_begun(self._text, mark) for mark in self._tools.marks)
        return self._show(min([*found, len(self._text) - begun]))

    def finish(self, text: str) -> tuple[Said, str]:
        """The reply is `text`: what it says, and what of that was not shown yet."""
        if self._tools is None:
            return Said(text, (), text), ""
        content, calls = self._tools.parse(text)
        said = Said(content, calls, self._tools.text(content, calls))
        return said, content[self._shown :]

    def _show(self, end: int) -> str:
        end = max(end, self._shown)
        end = len(self._text[:end].rstrip()) if self._tools is not None else end
        piece, self._shown = self._text[self._shown : end], max(end, self._shown)
        return piece


class Draft:
    """A reply as it grows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], opening: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._think = tokenizer.think or (None, None)
        self._stop = stop
        self._visible = TextStream(tokenizer)
        self._reasoning: list[int] = []
        self._kept: list[int] = []  # generated ids that memory keeps
        self._ends: list[int] = []  # length of the text after each of them
        self._cut = False  # a stop string ended it
        self._shown = 0
        self.text = ""
        self.thinking = False
        self.opening: list[int] = []  # without a reasoning block that the template may open
        for token in opening:
            if not self._thought(token):
                self.opening.append(token)

    def opens_thinking(self, token: int) -> bool:
        return token == self._think[0] and not self.thinking

    def bounded(self, token: int, most: int) -> int:
        """The next token: `token`, or what closes a reasoning block of `most` tokens."""
        closes = self._think[1]
        if not self.thinking or closes is None:
            return token
        within = sum(one not in self._think for one in self._reasoning)
        return token if within < most else closes

    def push(self, token: int) -> str:
        """Take a generated token, not the one that ends a reply; the text to show now."""
        if self._thought(token):
            self._reasoning.append(token)
            return ""
        self._kept.append(token)
        return self._show(self._visible.push(token))

    def finish(self) -> str:
        """The reply has ended: the text held back until now."""
        shown = self._shown
        if not self._cut:
            self._show(self._visible.finish())
        return self.text[shown:]

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._cut

    @property
    def reasoning(self) -> str:
        return self._tokenizer.decode(self._reasoning).strip()

    def remembered(self) -> list[int]:
        """Ids of the reply that memory keeps: opening, visible body, closing."""
        ids = [*self.opening, *self._kept]
        return [*ids, *self._tokenizer.reply_closing(ids[-1] if ids else -1)]

    @property
    def shown_tokens(self) -> int:
        """Tokens generated, reasoning left out."""
        return len(self._kept)

    def so_far(self) -> int:
        """How many of `remembered` are there by now; a stop string may yet take some."""
        return len(self.opening) + len(self._kept)

    def _thought(self, token: int) -> bool:
        """Follow the reasoning block; whether the token is part of one, its ends included."""
        opens, closes = self._think
        inside = self.thinking or token == opens
        self.thinking = inside and token != closes
        return inside

    def _show(self, text: str) -> str:
        self.text += text
        self._ends.append(len(self.text))
        found = [at for s in self._stop if (at := self.text.find(s)) >= 0]
        if found:
            self._cut_at(min(found))
            return ""
        held = max((_begun(self.text, s) for s in self._stop), default=0)
        safe = len(self.text) - held
        piece, self._shown = self.text[self._shown : safe], safe
        return piece

    def _cut_at(self, end: int) -> None:
        """End the text at `end`, and keep the tokens that make it up."""
        whole = bisect_left(self._ends, end)  # tokens before the one that reaches `end`
        if self._ends[whole] == end and end:
            whole += 1
        reached = self._ends[whole - 1] if whole else 0
        # A token may straddle the end: its visible half is encoded anew.
        self._kept = [*self._kept[:whole], *self._tokenizer.encode(self.text[reached:end])]
        self.text, self._cut = self.text[:end], True


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that may become `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
