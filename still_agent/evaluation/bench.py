"""A model in front of contexts, each remembered in many ways and asked the same questions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from still_agent.budget import Budget
from still_agent.compactor import OWN, choose_compactor
from still_agent.evaluation.chunks import Chunks
from still_agent.evaluation.dialogues import Dialogue, Question, render
from still_agent.evaluation.exam import reply, room_for
from still_agent.evaluation.fitted import Conversation, Fit, Watch, fitted, require_window
from still_agent.evaluation.methods import (
    CARTRIDGES,
    SHARED,
    TOLD_OPTIMISED,
    Cells,
    blind,
    compactor_of,
    own,
    schedule_of,
    shared,
    slots_of,
    trained,
)
from still_agent.evaluation.rows import Row, key, opened
from still_agent.evaluation.self_study import Study, self_study
from still_agent.evaluation.shares import SharedOut
from still_agent.models.frozen import FrozenModel
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_memory.checkpoint import Checkpoint
from still_memory.compactors import (
    AttentionMatchingCompactor,
    Compactor,
    KVzipCompactor,
    StreamingCompactor,
)
from still_memory.compactors.still import StillCompactor
from still_memory.errors import InputError
from still_memory.rotation import free
from still_memory.shares import ByRatio, Shares

ROOM = 192  # tokens for a question and its reply
LONGEST_REPLY = 96

Report = Callable[[Row, float], None]  # gets each new row, and the share that is done


@dataclass(frozen=True)
class Item:
    """A context to be measured."""

    place: Row  # names it in its rows
    talk: Callable[[], Dialogue]
    mark: Callable[[Dialogue, Sequence[str]], Row]  # what a row says of the replies to its exam
    longest: int = LONGEST_REPLY  # tokens of a reply


@dataclass
class Bench:
    """A model, its compactors, and how cartridges are trained on it."""

    model: FrozenModel
    still: str | None = None  # its compactor's folder; None: the packaged one
    name: str = "reference"
    study: Study = field(default_factory=Study)
    watch: Watch = lambda *_: None  # while slots are fitted
    shares: (
        Shares | ByRatio
    ) = ()  # of rivals that are dealt out unequally; (): those of its compactor
    reasoning: int = 0  # tokens granted to it before each reply; they are not scored
    _made: dict[str, Compactor] = field(default_factory=dict)

    def measure(
        self, cells: Cells, items: Sequence[Item], out: Path, report: Report, about: Row
    ) -> list[Row]:
        """A row for each of `cells` and `items`, those that `out` holds already included.

        `out` may hold others, too; they are left alone. Raises InputError if it cannot be read, or
        is of another model, compactor, study or `about`, which says what else the rows depend on.
        """
        made = {OWN if own(m) else compactor_of(m) for m in cells.methods if own(m) or trained(m)}
        compactors = {method: self.compactor(method).identity.address for method in sorted(made)}
        header: Row = {"model": self.model.identity.address, **compactors, **about}
        if self.reasoning:
            header["reasoning"] = self.reasoning
        if CARTRIDGES in cells.methods:
            header[CARTRIDGES] = asdict(self.study)
        if any(shared(m) or m.startswith("told-") for m in cells.methods) and self.dealt:
            header["shares"] = json.loads(json.dumps(self.dealt))
        wanted = [(item, row) for item in items for row in _cells(cells, item)]
        held = {key(row): row for row in opened(out, header)}
        for item, row in wanted:
            if row["method"] == TOLD_OPTIMISED and key(row) not in held:
                Context(self, item).require_window()
        context: Context | None = None
        with out.open("a", encoding="utf-8") as file:
            for done, (item, cell) in enumerate(wanted):
                if key(cell) in held:
                    continue
                if context is None or context.item is not item:
                    context = Context(self, item)
                row = context.row(cell)
                file.write(json.dumps(row) + "\n")
                file.flush()
                held[key(row)] = row
                report(row, (done + 1) / len(wanted))
        return [held[key(cell)] for _, cell in wanted]

    def compactor(self, method: str) -> Compactor:
        method = compactor_of(method)
        if method not in self._made:
            choice = re.sub(SHARED, "", method)
            if self.still and own(method):
                choice = choice.replace(OWN, self.still, 1)
            made = choose_compactor(choice, self.name, self.model)
            if shared(method) and not self.dealt:
                raise InputError(
                    f"{method!r} needs shares, and {self.name!r} has no compactor that names any: "
                    "give a file of them (--shares)"
                )
            self._made[method] = SharedOut(made, self.dealt) if shared(method) else made
        return self._made[method]

    @cached_property
    def dealt(self) -> Shares | ByRatio:
        """What each layer gets where slots are dealt out unequally; () if that is not known."""
        if self.shares or not (self.still or self.name == "reference"):
            return self.shares
        made = self.compactor(OWN)
        return made.config.shares if isinstance(made, StillCompactor) else ()


@dataclass
class Context:
    """One dialogue, read once, and remembered in many ways."""

    bench: Bench
    item: Item
    _reading: float = 0.0  # seconds

    @cached_property
    def talk(self) -> Dialogue:
        return self.item.talk()

    def row(self, cell: Row) -> Row:
        """What is measured of one cell. Its `seconds` are those of compacting, not of reading."""
        slots = slots_of(len(self.ids), cell["ratio"])
        self.whole  # noqa: B018  (read before the clock starts)
        self._reading, began = 0.0, time.perf_counter()
        state = self.remembered(cell["method"], slots, cell["rounds"])
        seconds = time.perf_counter() - began - self._reading
        replies = [self.ask(state, question) for question in self.talk.exam]
        return {
            **cell, "tokens": len(self.ids), "slots": state.slots,
            "compactions": max((entry.span.rounds for entry in state.entries), default=0),
            "seconds": round(seconds, 4), **self.item.mark(self.talk, replies),
        }  # fmt: skip

    @cached_property
    def ids(self) -> list[int]:
        tokenizer = self.bench.model.tokenizer
        return [*tokenizer.start, *render(tokenizer, self.talk.context)[0]]

    @cached_property
    def whole(self) -> Checkpoint:
        return self._read(StreamingCompactor(), self.ids)

    def require_window(self) -> None:
        """InputError if the context and the longest exam on it may pass the model's window."""
        tokenizer, longest = self.bench.model.tokenizer, self.item.longest
        exam = sum(room_for(tokenizer, question.text, longest) for question in self.talk.exam)
        require_window(self.bench.model, len(self.ids), exam)

    def remembered(self, method: str, slots: int, rounds: int) -> Checkpoint:
        """The context as `method` remembers it in `slots` slots, after so many rounds."""
        model, tokenizer = self.bench.model, self.bench.model.tokenizer
        if method == "full":
            return self.whole
        if method == "none":
            return self._read(StreamingCompactor(), tokenizer.start)
        if method == "truncate":
            return self._read(StreamingCompactor(), self.ids[-slots:])
        if method == "summary":
            return self._read(StreamingCompactor(), self._summary(slots))
        if method == CARTRIDGES:
            return self._cartridge(slots)
        if blind(method):
            compactor = self.bench.compactor(method)
        else:
            kind = AttentionMatchingCompactor if "matching" in method else KVzipCompactor
            lines = [line for q in self.talk.exam for line in q.lines()]
            compactor = kind(model, questions=tuple(render(tokenizer, lines)[0]))
            if self.bench.dealt:
                compactor = SharedOut(compactor, self.bench.dealt)
        if rounds == 1:
            state = self._state(compactor)
            state.restore(self.whole)
            state.compact(slots)
            kept = state.checkpoint()
            return self._optimised(kept) if method == TOLD_OPTIMISED else kept
        state, chunks = self._state(compactor), Chunks(len(self.ids), rounds, slots)
        for chunk in chunks:
            began = time.perf_counter()
            state.extend(self.ids[chunk])
            self._reading += time.perf_counter() - began
            chunks.compact(state, schedule_of(method))
        return state.checkpoint()

    def ask(self, remembered: Checkpoint, question: Question) -> str:
        """The greedy reply on top of what is remembered, which stays as it is."""
        bench, sampling = self.bench, Sampling(max_tokens=self.item.longest)
        return reply(bench.model, remembered, question.text, sampling, bench.reasoning)

    def _state(self, compactor: Compactor) -> RollingState:
        return RollingState(self.bench.model, compactor, Budget(slots=max(16, len(self.ids))))

    def _read(self, compactor: Compactor, ids: Sequence[int]) -> Checkpoint:
        state = self._state(compactor)
        if ids:
            state.extend(ids)
        return state.checkpoint()

    def _cartridge(self, slots: int) -> Checkpoint:
        """The first `slots` tokens' own slots, trained by self-study (arXiv 2506.06266)."""
        model, study = self.bench.model, self.bench.study
        (entry,) = self.whole.entries
        first = free(entry.span.cut(0, slots), model.rope)
        start = replace(first, end=entry.span.end, ids=None, rounds=1)
        kept = Checkpoint((replace(entry, span=start, share="memory"),), self.whole.length)
        return self._fitted(kept, self_study(model, self.ids, self.whole, study), study.fit)

    def _optimised(self, kept: Checkpoint) -> Checkpoint:
        """What is kept, fitted to the exam's own questions, with the model's replies to them."""
        lines = [
            line for q in self.talk.exam
            for line in replace(q, answer=self.ask(self.whole, q)).lines()
        ]  # fmt: skip
        return self._fitted(kept, [render(self.bench.model.tokenizer, lines)], Fit())

    def _fitted(
        self, kept: Checkpoint, conversations: Sequence[Conversation], fit: Fit
    ) -> Checkpoint:
        (entry,) = kept.entries
        bench = self.bench
        span = fitted(bench.model, self.ids, conversations, entry.span, fit, bench.watch)
        return replace(kept, entries=(replace(entry, span=span),))

    def _summary(self, slots: int) -> list[int]:
        """A summary of at most `slots` tokens, by the model itself, as a message to it."""
        tokenizer = self.bench.model.tokenizer
        request = "Summarise all that was said so far. Keep every name, number and value."
        room = max(1, min(slots, self.bench.model.window - self.whole.slots - ROOM // 2))
        text = reply(self.bench.model, self.whole, request, Sampling(max_tokens=room))
        return [*tokenizer.start, *tokenizer.message("user", text)][: max(slots, 4)]


def _cells(cells: Cells, item: Item) -> Iterator[Row]:
    for method in cells.methods:
        for ratio, rounds in cells.cells(method):
            yield {**item.place, "method": method, "ratio": ratio, "rounds": rounds}
