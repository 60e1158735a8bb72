"""The reference encoding, for training: dialogue lines to ids and answer masks."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from still_agent.evaluation.dialogues import Line


class Tokens:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "tiktoken_config.json").read_text())
        lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)}
        self.special: dict[str, int] = self.config["special_tokens"]
        self.encoding = tiktoken.Encoding(
            "still-reference", pat_str=self.config["pattern"], mergeable_ranks=ranks,
            special_tokens=self.special,
        )  # fmt: skip
        self.pad, self.size = self.special["<|pad|>"], 4096

    def render(self, lines: Iterable[Line], start: bool = True) -> tuple[list[int], list[bool]]:
        ids = [self.special["<|bos|>"]] if start else []
        mask = [False] * len(ids)
        for line in lines:
            body = [*self.encoding.encode_ordinary(line.text), self.special["<|end|>"]]
            ids += [self.special[f"<|{line.role}|>"], *body]
            mask += [False] + [line.answer] * len(body)
        return ids, mask
