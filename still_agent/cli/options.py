"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from still_agent.evaluation.reader import ScheduleName

Model = Annotated[str, typer.Option(envvar="STILL_MODEL", help="reference, a folder, or a hub id.")]
Compactor = Annotated[
    str | None, typer.Option(help="A folder or a method (default: the model's own)")
]
Slots = Annotated[int, typer.Option(help="The budget: the most slots held.")]
Schedule = Annotated[ScheduleName, typer.Option(help="Which spans are compacted, and when.")]
Horizon = Annotated[int | None, typer.Option(help="For append: the tokens planned for.")]
StorePath = Annotated[Path, typer.Option(envvar="STILL_STORE", help="The store's file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

DEFAULT_STORE = Path("still.db")
