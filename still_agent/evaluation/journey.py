"""A trajectory lived from end to end, killed on the way if asked, and what came of it.

The parent's side of the demo, without its display: benchmarks use it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from still_agent.evaluation.reader import Event, Reader, Reading
from still_agent.evaluation.sawtooth import Sample
from still_agent.evaluation.trajectory import Answer, recall, recall_by_age


@dataclass
class Journey:
    """What was observed. `resumed` and `compared` stay None where nothing was killed."""

    reading: Reading
    samples: list[Sample] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    killed_at: int | None = None  # logical tokens when the process was killed
    resumed: Event | None = None
    resumed_at: float | None = None  # seconds of reading
    compared: Event | None = None
    read: Event = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time spent reading, replies included; opening, comparing and asking are not."""
        return self.samples[-1].seconds if self.samples else 0.0

    @property
    def recomputed(self) -> int | None:
        """Tokens of the turn that the kill interrupted: the only ones read a second time."""
        if self.resumed is None or self.killed_at is None:
            return None
        return max(0, self.killed_at - int(self.resumed["tokens"]))

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON."""
        script, read = self.reading.script, self.read
        found: dict[str, Any] = {
            "facts": script.facts,
            "decoys": script.told - script.facts,
            "corrected": sum(a.corrected for a in self.answers),
            "recall": recall(self.answers),
            "recall_of_corrected": recall([a for a in self.answers if a.corrected]),
            "recall_by_age": [
                {"questions": n, "recall": share} for n, share in recall_by_age(self.answers)
            ],
            "schedule": self.reading.schedule,
            "budget": self.reading.slots,
            "most_slots": max(s.slots for s in self.samples),
            "compactions": sum(s.compaction for s in self.samples),
            "seconds_reading": self.seconds,
            **{k: read[k] for k in ("tokens", "slots", "rounds", "held_bytes", "full_bytes")},
        }
        if self.resumed is not None:
            found["killed_at_tokens"] = self.killed_at
            found["reused_tokens"] = self.resumed["tokens"]
            found["recomputed_tokens"] = self.recomputed
            found["open_seconds"] = self.resumed["open_seconds"]
        if self.compared is not None:
            found.update({k: v for k, v in self.compared.items() if k != "kind"})
        return found


def journey(
    reading: Reading,
    log: Path,
    watch: Callable[[Event], None],
    *,
    kill_at: float | None = None,
) -> Journey:
    """Live `reading` in child processes, telling `watch` every event.

    With `kill_at` the first child is killed by SIGKILL in mid-turn, at its first compaction
    past that share of the script, and a second one resumes from the store.
    """
    seen = Journey(reading)
    if kill_at is not None:
        with Reader(reading, log) as reader:
            for event in reader.events():
                _note(seen, event, watch)
                if event["kind"] == "compaction" and event["done"] >= kill_at:
                    seen.killed_at = event["tokens"]
                    watch({**event, "kind": "killed", "status": reader.kill()})
                    break
        if seen.killed_at is None:
            return seen  # it ended before a compaction gave an occasion
        seen.resumed_at = seen.seconds
        reading = replace(reading, compare=True)
    with Reader(reading, log) as reader:
        for event in reader.events():
            _note(seen, event, watch)
    return seen


def _note(seen: Journey, event: Event, watch: Callable[[Event], None]) -> None:
    kind = event["kind"]
    if kind == "answer":
        fields = {k: v for k, v in event.items() if k != "kind"}
        seen.answers.append(Answer(**{**fields, "expected": tuple(fields["expected"])}))
    elif kind == "compared":
        seen.compared = event
    elif kind == "opened":
        if event["resumed"]:
            seen.resumed = event
    else:
        at = (seen.resumed_at or 0.0) + event["seconds"]
        tokens, slots = event["tokens"], event["slots"]
        if kind == "compaction":
            peak = slots + event["before"] - event["after"]
            seen.samples.append(Sample(at, tokens, peak))
        seen.samples.append(Sample(at, tokens, slots, kind == "compaction"))
        if kind == "read":
            seen.read = event
    watch(event)
