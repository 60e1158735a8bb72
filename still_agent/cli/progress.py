"""How far a reading of old turns has come, as a bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; what it gives takes the tokens read so far, and in all (see `events.OnReplay`)."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
    ) as bars:
        bar = bars.add_task(what, total=0, visible=False)

        def show(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total, visible=True)

        yield show
