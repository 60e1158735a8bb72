"""The rolling state: [ pinned prefix | memory | raw tail ], never more slots than the budget.

Two views of one thing. The live cache is what the model attends to; it is allocated once, and
new tokens are computed into its end. The entries are what is remembered: spans that never
change, each with the place it stands at. The newest tokens are in the cache alone (the open
run) until they are sealed, that is, copied once into a raw span: at a compaction and at a
checkpoint.

Slot `i` of a layer's share of a span stands at position `i` behind the span's first; spans stand
one behind the other, as wide as their largest layer. When a compaction has made the state
shorter, everything behind it moves down, and the live cache is filled anew from the spans' own
bytes.
Restoring a checkpoint fills it in the same way from the same bytes (a codec rounds a span when it
is made, and not when it is saved); and how a message is cut
for prefill depends on nothing but the number of slots held. So a resumed state and one that
never stopped compute the same numbers, bit for bit.

All of it is computed in the model's own thread (see `batch`), and told of in the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from still_agent.batch import thread_of
from still_agent.budget import Budget
from still_agent.events import Compaction, OnCompaction
from still_agent.models.frozen import FrozenModel
from still_agent.schedule import Held, Plan, Rolling, schedule_for
from still_memory.checkpoint import SHARES, Checkpoint, Entry, Share
from still_memory.codec import EXACT, check_codec, settled
from still_memory.compactors.base import Compactor
from still_memory.errors import BudgetError, CompactorError, DamageError, InputError
from still_memory.rotation import free, place
from still_memory.span import Span, raw_slots

T = TypeVar("T")

PREFILL = 512  # tokens of one forward pass, so that activations stay bounded
_REMEDY = "the compactor is at fault: use another one"


@dataclass(frozen=True)
class Standing:
    """A span where it stands: the slots that tokens `[tokens_start, tokens_end)` take."""

    share: Share
    level: int  # tier, in the tiered schedule
    slots: int  # in the mean layer
    tokens_start: int
    tokens_end: int
    rounds: int


class RollingState:
    """One conversation's state.

    Any method that computes may raise, also what `on_compaction` raises; the state is then
    undefined until `restore`, which no earlier failure can keep from working.
    """

    def __init__(
        self,
        model: FrozenModel,
        compactor: Compactor,
        budget: Budget,
        on_compaction: OnCompaction | None = None,
        codec: str = EXACT,
    ) -> None:
        budget.require_window(model.window)
        self.model, self.compactor, self.budget = model, compactor, budget
        self._thread = thread_of(model)
        self.cache = self._thread.run(lambda: model.new_cache(budget.slots))
        self.alone = False  # whether steps take passes of their own, as a replay's must
        self.batched = False  # whether one has had company since this was last set
        self.length = 0  # logical tokens
        self.compactions = 0  # done by this object, also where a restore has undone them
        self._on_compaction, self._codec = on_compaction, check_codec(codec)
        self._schedule = schedule_for(budget, pinned=0)
        self._stand([])
        self._open: list[int] = []  # newest tokens, in the live cache alone

    # -- what it holds ------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Slots held, in the mean layer."""
        return self._slots + len(self._open)

    @property
    def position(self) -> int:
        """Where the next token stands: behind the slots of the largest layer."""
        return self._positions + len(self._open)

    @property
    def shares(self) -> dict[Share, int]:
        """Slots held by each share; the open run is of the tail."""
        held = {s: sum(e.slots for e in self._entries if e.share == s) for s in SHARES}
        held["tail"] += len(self._open)
        return held

    @property
    def layout(self) -> list[Standing]:
        """What the slots are, oldest first."""
        held = [
            Standing(e.share, e.level, e.slots, e.low, e.high, e.span.rounds) for e in self._entries
        ]
        n = len(self._open)
        newest = Standing("tail", 0, n, self.length - n, self.length, 0)
        return [*held, newest] if n else held

    @property
    def free(self) -> int:
        """Tokens that can be taken in before something must be compacted."""
        return min(self.budget.slots - self.slots, self.model.window - self.position)

    @property
    def rounds(self) -> int:
        """The most compactions behind any token held."""
        return max((entry.span.rounds for entry in self._entries), default=0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the live cache and of the spans it is filled from."""
        spans = {entry.span for entry in self._entries}
        return self.cache.nbytes + sum(span.nbytes for span in spans)

    # -- tokens in, logits out ----------------------------------------------------------------

    def pin(self, ids: Sequence[int]) -> None:
        """Take in a conversation's first tokens, which are never compacted.

        BudgetError, before anything is computed, if they leave no room for a conversation.
        """
        if self.length:
            raise InputError("only the first tokens can be pinned; pin before anything else")
        self._schedule = schedule_for(self.budget, len(ids), self.model.window)
        if ids:
            self.extend(ids)
            self._seal("pinned")

    def extend(self, ids: Sequence[int]) -> Tensor:
        """Take in tokens, compacting as needed; logits `(vocab,)` after the last, in fp32."""
        if not ids:
            raise InputError("no token to take in; give at least one")
        at = 0
        while at < len(ids):
            while not (free := self.free):
                self._make_room()
            n = min(free, len(ids) - at, PREFILL)
            logits = self._thread.forward(ids[at : at + n], self.cache, self.position)
            self._open += ids[at : at + n]
            self.length += n
            at += n
        return logits

    def step(self, token: int) -> Tensor:
        """As `extend` with one token; other conversations' may be computed in the same pass."""
        if self.alone:
            return self.extend([token])
        while not self.free:
            self._make_room()
        logits, batched = self._thread.step(token, self.cache, self.position)
        self._open.append(token)
        self.length += 1
        self.batched |= batched
        return logits

    def compact(self, slots: int) -> None:
        """Make everything but the pinned prefix one span of at most `slots` slots, now.

        Does nothing if no more are held. The schedule needs no such call.
        """
        self._seal("tail")
        memory, tail = ([e for e in self._entries if e.share == s] for s in SHARES[1:])
        if sum(entry.slots for entry in [*memory, *tail]) > slots:
            tokens = sum(entry.tokens for entry in tail)
            pinned = self._pinned
            longest = self.model.window - pinned - self.budget.shares(pinned).chunk
            self.carry_out(Plan(0, len(memory), tokens, slots, level=0), max(slots, longest))

    def carry_out(self, plan: Plan, longest: int) -> None:
        """Compact as planned, now; no layer may take more than `longest` positions.

        The schedule needs no such call.
        """
        event = self._run(lambda: self._compacted(plan, longest))
        self.compactions += 1
        if self._on_compaction is not None:
            self._on_compaction(event)

    @property
    def memory(self) -> list[Held]:
        """Memory's spans, oldest first, as a schedule sees them."""
        return [Held(e.slots, e.level) for e in self._entries if e.share == "memory"]

    # -- saved and restored -------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """The whole state. Seals the open run; nothing else is copied."""
        self._seal("tail")
        return Checkpoint(tuple(self._entries), self.length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that was saved, bit for bit.

        BudgetError if it does not fit the budget, DamageError if it is of another model's shape.
        """
        for entry in checkpoint.entries:
            require_fitting(entry.span, self.model)
        if checkpoint.positions > self.model.window:
            raise DamageError(
                f"the saved state takes {checkpoint.positions} positions, and {self.model.name!r} "
                f"was trained for {self.model.window}: this model cannot have written it. Restore "
                "the store from a copy, or begin a new session"
            )
        pinned = sum(e.tokens for e in checkpoint.entries if e.share == "pinned")
        if checkpoint.slots > self.budget.slots:
            least = max(checkpoint.slots, self.budget.least(pinned))
            raise BudgetError(
                f"the saved state holds {checkpoint.slots} slots and this budget "
                f"{self.budget.slots}: load the agent with Budget(slots={least}) or more"
            )
        self._schedule = schedule_for(self.budget, pinned, self.model.window)
        self._stand(checkpoint.entries)
        self._open, self.length = [], checkpoint.length
        self._run(self._fill)

    # -- inside -------------------------------------------------------------------------------

    def _run(self, function: Callable[[], T]) -> T:
        """Compute it in the model's thread; it must tell no observer."""
        return self._thread.run(function, self.cache)

    def _stand(self, entries: Sequence[Entry]) -> None:
        """Hold these from now on, their sizes counted once and not at each token."""
        self._entries = list(entries)
        self._slots = sum(entry.slots for entry in entries)
        self._positions = sum(entry.positions for entry in entries)

    def _seal(self, share: Share) -> None:
        """Copy the open run out of the live cache, once, into a raw span.

        What a codec rounds of it goes back into the cache: the model goes on from what will be
        read back.
        """
        if self._open:
            self._run(lambda: self._sealed(share))

    def _sealed(self, share: Share) -> None:
        """Do what `_seal` says, in the model's thread."""
        n = len(self._open)
        start, base = self.length - n, self.position - n
        layers = []
        for layer, held in enumerate(self.cache.lengths):
            keys, values = self.cache.raw(layer, held - n, held)  # (H_kv, n, d) views
            layers.append(raw_slots(keys.clone(), values.clone(), start))
        raw = Span(start, self.length, tuple(layers), rotated_at=base, ids=tuple(self._open))
        span = settled(raw, self._codec)
        if span.coded:
            for layer, held in enumerate(self.cache.lengths):
                slots = span.layers[layer]
                self.cache.load(layer, slots.keys, slots.values, at=held - n)
        self._stand([*self._entries, Entry(span, start, self.length, base, share)])
        self._open = []

    def _make_room(self) -> None:
        """Do what the schedule plans next; there is more room afterwards.

        A schedule counts slots. Where the window is full before the budget is (a large budget has
        taken over what a smaller one's unequal layers held), all of memory becomes one span.
        """
        shares = self.budget.shares(self._pinned)
        schedule = Rolling(shares) if self.slots < self.budget.slots else self._schedule
        plan = schedule.plan(self.memory, self.shares["tail"])
        # Memory may take the positions that nothing else needs.
        most = self.model.window - self.budget.slots + shares.memory
        self.carry_out(plan, max(plan.slots, plan.slots * most // shares.memory))

    def _compacted(self, plan: Plan, longest: int) -> Compaction:
        """Do what `carry_out` says, in the model's thread; what was done."""
        self._seal("tail")
        pinned, memory, tail = ([e for e in self._entries if e.share == s] for s in SHARES)
        raw, tail = _split(tail, plan.tokens)
        taken = [*memory[plan.low : plan.high], *raw]
        before, began = sum(entry.slots for entry in taken), time.perf_counter()
        with torch.inference_mode():
            spans = [free(_standing(entry), self.model.rope) for entry in taken]
            slots = min(plan.slots, before - 1)
            span = self.compactor.compact(spans, slots, longest)
        _require_shorter(span, spans, slots, longest)
        span = settled(span, self._codec)
        entry = Entry(span, span.start, span.end, 0, "memory", plan.level)
        self._stand([*pinned, *memory[: plan.low], entry, *memory[plan.high :], *tail])
        self._fill()
        seconds = time.perf_counter() - began
        return Compaction(
            span.start, span.end, before, span.slots, span.rounds, plan.level, seconds
        )

    @property
    def _pinned(self) -> int:
        return sum(e.tokens for e in self._entries if e.share == "pinned")

    @torch.inference_mode()
    def _fill(self) -> None:
        """Fill the live cache from the spans, each behind the one before."""
        held = [0] * self.model.layers
        for entry in self._entries:
            raw = entry.span.raw
            for n, slots in enumerate(entry.span.layers):
                held[n] += entry.tokens if raw else len(slots)
        free = self.budget.slots - self.slots
        self.cache.empty([n + free for n in held])
        base = 0
        for index, entry in enumerate(self._entries):
            self._entries[index] = entry = replace(entry, base=base)
            span = _standing(entry)
            for layer, at in enumerate(self.cache.lengths):
                slots = span.layers[layer]
                keys = place(span, layer, base, self.model.rope, self.model.dtype)
                self.cache.load(layer, keys, slots.values, slots.bias, at=at)
            base += entry.positions


def _standing(entry: Entry) -> Span:
    """The part of the entry's span that stands in the state."""
    whole = entry.tokens == entry.span.tokens
    return entry.span if whole else entry.span.cut(entry.low, entry.high)


def _split(tail: Sequence[Entry], tokens: int) -> tuple[list[Entry], list[Entry]]:
    """The oldest `tokens` of a raw tail, and the rest."""
    first: list[Entry] = []
    rest: list[Entry] = []
    for entry in tail:
        middle = min(entry.low + tokens, entry.high)
        if middle > entry.low:
            first.append(replace(entry, high=middle))
        if middle < entry.high:
            rest.append(replace(entry, low=middle))
        tokens -= middle - entry.low
    return first, rest


def require_fitting(span: Span, model: FrozenModel) -> None:
    """DamageError for a span that cannot be this model's, whatever it says of itself."""
    shape = model.kv_heads, model.head_dim
    for slots in span.layers:
        if any((t.shape[0], t.shape[2]) != shape for t in (slots.keys, slots.values)):
            break
    else:
        if len(span.layers) == model.layers:
            return
    raise DamageError(
        f"{span} is not of the shape of {model.name!r}: {model.layers} layers of {shape[0]} heads "
        f"of {shape[1]}. Restore the store from a copy, or begin a new session"
    )


def _require_shorter(span: Span, spans: Sequence[Span], slots: int, longest: int) -> None:
    """What a compactor promised; a broken promise must not become a damaged memory."""
    if (span.start, span.end) != (spans[0].start, spans[-1].end):
        raise CompactorError(
            f"asked for {spans[0].start} to {spans[-1].end}, and got {span}; {_REMEDY}"
        )
    if not 0 < span.slots <= slots or len(span) > longest:
        raise CompactorError(
            f"asked for {slots} slots, {longest} in the largest layer, and got {span}, with "
            f"{len(span)}; {_REMEDY}"
        )
    if span.raw or span.rotated_at is not None:
        raise CompactorError(f"a compact span has rounds and no rotation, unlike {span}; {_REMEDY}")
