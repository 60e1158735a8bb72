"""What a check of a store has found: what is damaged, where, and whom it harms."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from still_memory.tenants import label
from still_memory.vault import Vault

Kind = Literal[
    "file", "schema", "key", "tenant", "model", "session", "turn", "checkpoint", "span",
    "reference", "words", "graph", "leftover",
]  # fmt: skip

_COPY = "restore the store from a copy"
_LEDGER = "or have its state computed anew from its text (`still-agent sessions rebuild`)"
REMEDIES: Mapping[Kind, str] = {
    "file": f"{_COPY}, or save what can be read with `sqlite3 FILE .recover`",
    "schema": f"{_COPY}; do not use this file, whose schema is not still-agent's",
    "key": f"{_COPY}: without the key no digest in the file can be checked",
    "tenant": f"{_COPY}: the tenant's digests are made with its name",
    "model": _COPY,
    "session": f"{_COPY}, or delete the session",
    "turn": f"{_COPY}, or delete the session",
    "checkpoint": f"{_COPY}, {_LEDGER}",
    "span": f"{_COPY}, {_LEDGER}",
    "reference": f"{_COPY}, {_LEDGER}",
    "words": "`still-agent store reindex` builds the index anew (empty if encrypted)",
    "graph": f"{_COPY}, or delete the thread whose graph it is of",
    "leftover": "`still-agent store prune` collects them, `store scrub` ends an erasure",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written. What does not apply is None.

    A `leftover` is no damage: what a prune or an erasure that was stopped has still to do.
    """

    kind: Kind
    how: str
    sessions: tuple[str, ...] = ()  # those that it harms; with its tenant, but for the default one
    row: int | None = None  # id in the table of its kind
    turn: int | None = None  # the number of a turn, or of a checkpoint's last, as history counts
    generation: int | None = None  # of a checkpoint
    span: str | None = None  # a span's address
    layer: int | None = None

    @property
    def remedy(self) -> str:
        return REMEDIES[self.kind]

    def __str__(self) -> str:
        place: list[str] = []
        if self.kind in ("tenant", "session", "model"):
            place += [self.kind]
        if self.generation is not None:
            place += [f"checkpoint {self.generation}"]
        if self.turn is not None:
            place += [f"after turn {self.turn}" if self.generation is not None else
                      f"turn {self.turn}"]  # fmt: skip
        if self.span is not None:
            place += [f"span {self.span[:12]}"]
        if self.layer is not None:
            place += [f"layer {self.layer}"]
        if self.row is not None:
            place += [f"(row {self.row})"]
        said = f"{' '.join(place) or self.kind}: {self.how}"
        if self.sessions:
            some = ", ".join(repr(name) for name in self.sessions[:4])
            more = len(self.sessions) - 4
            said += f" [{some}{f' and {more} more' if more > 0 else ''}]"
        return said


@dataclass(frozen=True)
class Report:
    """All that a check has found, and how much it has looked at."""

    findings: Sequence[Finding]
    sessions: int
    turns: int
    checkpoints: int
    spans: int
    span_bytes: int
    graph_states: int = 0
    complete: bool = True  # False: it found so much that it stopped looking
    # of each harmed session, the turns after which it has a kept state that is whole
    unharmed: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def damaged(self) -> bool:
        return any(finding.kind != "leftover" for finding in self.findings)


class Enough(Exception):
    """So much was found that looking for more helps nobody."""


class Noted:
    """Findings as they are made, each with the sessions that it harms."""

    def __init__(self, conn: sqlite3.Connection, most: int) -> None:
        self.findings: list[Finding] = []
        self.vault: Vault | None = None  # opens names, once there is a key
        self._conn, self._most = conn, most
        self._harmed: set[int] = set()  # rows of checkpoints

    def add(
        self,
        kind: Kind,
        how: str,
        *,
        sessions: Iterable[str] = (),
        checkpoints: Iterable[int] = (),
        row: int | None = None,
        turn: int | None = None,
        generation: int | None = None,
        span: str | None = None,
        layer: int | None = None,
    ) -> None:
        """Note a fault that harms these sessions, and those that these checkpoints belong to."""
        harmed = set(checkpoints)
        self._harmed |= harmed
        names = {shown(name) for name in sessions}
        names |= {name for row in harmed for name, _ in self._named(row)}
        self.findings.append(
            Finding(kind, shown(how), tuple(sorted(names)), row, turn, generation, span, layer)
        )
        if len(self.findings) >= self._most:
            raise Enough

    def turn(self, how: str, row: int) -> None:
        """A turn is damaged, and so is every state that it leads to."""
        led = self._conn.execute(
            "with recursive led (id) as (select ?1"
            " union select t.id from led join turns t on t.parent = led.id)"
            " select id from checkpoints where turn in (select id from led)",
            (row,),
        ).fetchall()
        (number,) = self._conn.execute(
            "with recursive way (id) as (select ?1 union select parent from way"
            " join turns using (id) where parent not null) select count(*) from way",
            (row,),
        ).fetchone()
        self.add("turn", how, checkpoints=[c for (c,) in led], row=row, turn=number)

    def checkpoint(
        self, how: str, row: int, kind: Kind = "checkpoint", span: str | None = None
    ) -> None:
        """A whole state is damaged."""
        query = "select turns, generation from checkpoints where id = ?"
        turns, generation = self._conn.execute(query, (row,)).fetchone() or (None, None)
        self.add(
            kind, how, checkpoints=[row], row=row, turn=turns, generation=generation, span=span
        )

    def span(self, how: str, row: int, address: str, layer: int | None) -> None:
        """A span is damaged, and so is every state that it stands in."""
        query = "select checkpoint from checkpoint_spans where span = ?"
        held = [c for (c,) in self._conn.execute(query, (row,))]
        self.add("span", how, checkpoints=held, row=row, span=shown(address), layer=layer)

    def graph(self, how: str, row: int | None, thread: tuple[str, str]) -> None:
        """Something of a graph is damaged, which harms no session.

        thread: the stored names of its tenant and itself; empty if that is not known.
        """
        whose = f" [thread {self.named(*thread)!r}]" if thread[1] else ""
        self.add("graph", how + whose, row=row)

    def unharmed(self) -> dict[str, list[int]]:
        """Of each harmed session, the turns after which a whole state of it is kept."""
        names = {name for finding in self.findings for name in finding.sessions}
        kept: dict[str, list[int]] = {name: [] for name in sorted(names)}
        # where nothing can be read (a damaged schema: not even told why), nothing is unharmed
        with suppress(sqlite3.Error, UnicodeDecodeError):
            rows = self._conn.execute("select id from checkpoints order by id desc").fetchall()
            for (row,) in rows:
                for name, turns in self._named(row):
                    if name in kept and row not in self._harmed:
                        kept[name].append(turns)
        return kept

    def _named(self, checkpoint: int) -> list[tuple[str, int]]:
        rows = self._conn.execute(
            "select coalesce(n.name, ''), s.name, c.turns from checkpoints c join sessions s"
            " on s.id = c.session left join tenants n on n.id = s.tenant where c.id = ?",
            (checkpoint,),
        ).fetchall()
        return [(shown(self.named(tenant, name)), turns) for tenant, name, turns in rows]

    def named(self, tenant: str, session: str) -> str:
        """A session as people know it; where its name cannot be read, as it is stored."""
        if self.vault is not None:
            tenant, session = self.vault.names(tenant, session)
        return label(tenant, session)


def shown(text: str) -> str:
    """Text that can be printed, whatever bytes it was read from."""
    return text.encode("utf-8", "replace").decode()
