"""Summaries of a user's own documents, on every method's memory of them, against references.

Reads JSON Lines as LongBench has them (arXiv 2308.14508: `context`, `input`, `answers`) and as
HELMET reads its summarisation sets (arXiv 2410.02694): InfiniteBench (`context`, `input`,
`answer`) and Multi-LexSum (`sources`, `summary/short`). The document is a message that is
remembered, and the request for its summary one that comes after.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from still_agent.evaluation.bench import Bench, Item, Report
from still_agent.evaluation.dialogues import Dialogue, Line, Question, render
from still_agent.evaluation.exam import room_for
from still_agent.evaluation.methods import Cells
from still_agent.evaluation.rouge import Rouge, rouge
from still_agent.evaluation.rows import PLACE, Row
from still_agent.text import file_text
from still_memory.errors import InputError

REQUEST = "Write a summary of the text above."
LONGEST = 256  # tokens of a summary
CONTEXTS = ("context", "sources")
REFERENCES = ("answers", "answer", "summary/short")
REQUESTS = ("input", "question")


@dataclass(frozen=True)
class Document:
    """One line of the data: a text, what is asked of it, and summaries that would do."""

    line: int  # counted from 1
    name: str  # of its data set
    text: str
    request: str
    references: tuple[str, ...]

    def talk(self) -> Dialogue:
        question = Question(self.request, self.references[0], self.references)
        return Dialogue([Line("user", self.text)], [question])


def documents(path: Path, request: str = REQUEST) -> list[Document]:
    """The documents of a file; `request` stands in where a line has none.

    Raises InputError, with the line, for what cannot be read or lacks something.
    """
    found = []
    for number, line in enumerate(file_text(path).split("\n"), start=1):
        if line.strip():
            try:
                found.append(_document(json.loads(line), number, path.stem, request))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}, is no JSON: {error}") from None
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    if not found:
        raise InputError(f"{path} is empty: give JSON Lines in LongBench's or HELMET's format")
    return found


def summarise(
    bench: Bench, cells: Cells, data: Sequence[Document], out: Path, report: Report,
    *, longest: int = LONGEST,
) -> list[Row]:  # fmt: skip
    """A row for each document, method, ratio and number of rounds, with the summary's ROUGE.

    `scores` holds ROUGE-L. Raises InputError, before anything is measured, for a document that
    does not fit the model's window or that leaves a method no slots, for a missing `rouge-score`,
    and for a file of another run.
    """
    if longest < 1:
        raise InputError(f"a summary of {longest} tokens says nothing: ask for 1 or more")
    scorer = rouge()
    for document in data:
        _require_fit(bench, cells, document, longest)

    def item(document: Document) -> Item:
        # A data set's contexts are of any length: none is named.
        place = dict(zip(PLACE, (document.name, 0, 0, document.line), strict=True))
        return Item(place, document.talk, partial(_marks, scorer), longest)

    digest = hashlib.sha256(repr(data).encode()).hexdigest()
    items = [item(document) for document in data]
    return bench.measure(cells, items, out, report, {"data": digest, "longest reply": longest})


def _document(record: Any, number: int, name: str, request: str) -> Document:
    if not isinstance(record, dict):
        raise InputError("is no object with a context and a reference")
    texts = _strings(record, CONTEXTS)
    references = _strings(record, REFERENCES)
    if not any(re.search("[a-z0-9]", text.lower()) for text in references):
        raise InputError(
            "ROUGE counts Latin letters and digits alone, and no reference has any: leave the "
            "line out"
        )
    asked = next((record[f] for f in REQUESTS if str(record.get(f) or "").strip()), request)
    return Document(
        number, str(record.get("dataset") or name), "\n\n".join(texts), str(asked), references
    )


def _strings(record: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """The text or texts of the first of `fields` that has any. InputError if none has."""
    for field in fields:
        held = record.get(field)
        found = held if isinstance(held, list) else [held]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) == len(found) and any(text.strip() for text in texts):
            return tuple(text for text in texts if text.strip())
    raise InputError(
        f"has no text in {' or '.join(fields)}: add one of them, or leave the line out"
    )


def _require_fit(bench: Bench, cells: Cells, document: Document, longest: int) -> None:
    model = bench.model
    tokenizer = model.tokenizer
    try:
        tokens = len(tokenizer.start) + len(render(tokenizer, document.talk().context)[0])
        room = model.window - room_for(tokenizer, document.request, longest, bench.reasoning)
        if tokens > room:
            raise InputError(
                f"the context takes {tokens} tokens, and the window of {model.window} leaves room "
                f"for {room} beside the request and a summary of {longest}: shorten it, leave it "
                "out, or ask for shorter summaries"
            )
        cells.require_slots(tokens)
    except InputError as error:
        raise InputError(f"line {document.line} of the data: {error}") from None


def _marks(scorer: Rouge, talk: Dialogue, replies: Sequence[str]) -> Row:
    (question,), (summary,) = talk.exam, replies
    found = scorer(summary, question.expected)
    return {"scores": [found["rouge-l"]], **found, "summary": summary}
