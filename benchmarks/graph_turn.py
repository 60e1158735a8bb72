"""What a turn of a LangGraph agent puts into the store, early and late in a long thread.

LangChain's agent with replies that are known, so that nothing but the checkpointer is measured.
Bytes put into rows, bytes that SQLite writes into its log (whole pages), and the time of a turn;
each over ten turns. Beside `langgraph-checkpoint-sqlite`, if that is installed.

    python benchmarks/graph_turn.py --turns 100
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from langchain_still import StillCheckpointer

SPAN = 10  # turns that a figure is of
KEY = bytes(32)
_PUT = (
    "select (select coalesce(sum(length(checkpoint) + length(metadata)), 0) from checkpoints)"
    " + (select coalesce(sum(length(value)), 0) from writes)"
)


def replies() -> Iterator[AIMessage]:
    number = 0
    while True:
        number += 1
        yield AIMessage(f"reply {number}: " + "lorem ipsum dolor sit amet " * 10)


def measure(saver: Any, conn: sqlite3.Connection, put: Callable[[], int], turns: int) -> Any:
    """Bytes put, bytes logged and milliseconds of a turn, of the first turns and the last."""
    agent = create_agent(GenericFakeChatModel(messages=replies()), checkpointer=saver)
    (_, _, path) = conn.execute("pragma database_list").fetchone()
    log = Path(path + "-wal")
    rows = []
    for turn in range(turns):
        conn.execute("pragma wal_autocheckpoint = 0")
        conn.execute("pragma wal_checkpoint(truncate)").fetchall()
        before, began = put(), time.perf_counter()
        question = f"question {turn}: " + "please tell me something interesting " * 4
        agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "t"}})
        rows.append((put() - before, log.stat().st_size, 1000 * (time.perf_counter() - began)))
    spans = {"early": rows[SPAN : 2 * SPAN], "late": rows[-SPAN:]}
    names = "bytes_put", "bytes_logged", "ms"
    return {
        when: {n: statistics.median(r[i] for r in some) for i, n in enumerate(names)}
        for when, some in spans.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=100, help="two messages each")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, key in (("StillCheckpointer", None), ("the same, encrypted", KEY)):
            with StillCheckpointer(Path(folder) / f"{name}.db", key=key) as saver:
                graphs, file = saver.store.graphs, saver.store._file
                with file.connection() as conn:
                    pass
                found[name] = measure(saver, conn, lambda g=graphs: g.bytes_written, args.turns)
        try:
            from langgraph.checkpoint.sqlite import SqliteSaver
        except ImportError:
            print("langgraph-checkpoint-sqlite is not installed: nothing to compare with")
        else:
            path = Path(folder) / "other.db"
            with closing(sqlite3.connect(path, check_same_thread=False)) as conn:
                saver = SqliteSaver(conn)
                saver.setup()
                found["SqliteSaver"] = measure(
                    saver, conn, lambda: conn.execute(_PUT).fetchone()[0], args.turns
                )
    if args.json:
        print(json.dumps(found))
        return
    for name, spans in found.items():
        for when, told in spans.items():
            print(
                f"{name:20} {when:5}: {told['bytes_put']:9,.0f} bytes put, "
                f"{told['bytes_logged']:11,.0f} logged, {told['ms']:6.1f} ms"
            )


if __name__ == "__main__":
    main()
