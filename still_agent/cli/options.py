"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from still_agent.schedule import ScheduleName

if TYPE_CHECKING:
    from still_agent.agent import Agent

Model = Annotated[str, typer.Option(envvar="STILL_MODEL", help="reference, a folder, or a hub id.")]
Compactor = Annotated[
    str | None, typer.Option(help="A folder or a method (default: the model's own)")
]
Slots = Annotated[int, typer.Option(help="The budget: the most slots held.")]
Schedule = Annotated[ScheduleName, typer.Option(help="Which spans are compacted, and when.")]
Horizon = Annotated[int | None, typer.Option(help="For append: the tokens planned for.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...")]
StorePath = Annotated[Path, typer.Option(envvar="STILL_STORE", help="The store's file.")]
Codec = Annotated[
    str | None, typer.Option(help="Of new memory: exact, int8, int4 (default: the store's).")
]
Tenant = Annotated[
    str, typer.Option(envvar="STILL_AGENT_TENANT", help="Whose sessions (default: of no name).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

DEFAULT_STORE = Path("still.db")


@dataclass(frozen=True)
class Parts:
    """What an agent is made of, as options."""

    model: Model = "reference"
    compactor: Compactor = None
    slots: Slots = 1024
    schedule: Schedule = "rolling"
    horizon: Horizon = None
    device: Device = None
    dtype: Dtype = None
    codec: Codec = None

    def load(self, store: Path, **more: Any) -> Agent:
        """The agent. Raises what `Agent.load` raises; `more` goes to it."""
        with Console(stderr=True).status("loading"):
            from still_agent.agent import Agent
            from still_agent.budget import Budget

            return Agent.load(
                self.model, store=store, compactor=self.compactor,
                device=self.device, dtype=self.dtype, codec=self.codec,
                budget=Budget(slots=self.slots, schedule=self.schedule, horizon=self.horizon),
                **more,
            )  # fmt: skip


Command = Callable[..., None]


def with_options(group: type, name: str) -> Callable[[Command], Command]:
    """For commands whose parameter `name` is given by options, one for each field of `group`."""

    def wrapped(command: Command) -> Command:
        fields = inspect.signature(group, eval_str=True).parameters
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own[name]

        @wraps(command)
        def run(**options: Any) -> None:
            made = group(**{field: options.pop(field) for field in fields})
            command(**options, **{name: made})

        told = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own.values(), *fields.values())]
        run.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in told}
        return run

    return wrapped


with_parts = with_options(Parts, "parts")
