"""The process as its user runs it: signals, kills, logs."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.attacks.answered import Stream, lost
from tests.server.conftest import LONG, Process, until

SECRET = "My sister Ana lives in Porto."
SAID: Any = {"model": "reference", "messages": [{"role": "user", "content": SECRET}]}


def test_a_signal_lets_running_turns_end_and_undoes_those_that_do_not(tmp_path: Path) -> None:
    store = tmp_path / "s.db"
    with Process(store, "--grace-s", "3") as served:
        client = served.client()
        client.chat.completions.create(**SAID, extra_body={"session_id": "secret name"})
        long: Any = {**SAID, "stream": True, "response_format": LONG, "max_tokens": 2000}
        slow = client.chat.completions.create(**long, extra_body={"session_id": "slow"})
        next(slow)
        quick = client.chat.completions.create(
            **SAID, stream=True, extra_body={"session_id": "quick"}
        )
        next(quick)
        served.process.send_signal(signal.SIGTERM)
        assert [c.choices[0].finish_reason for c in quick if c.choices][-1] == "stop"
        try:
            rest = [c.choices[0].finish_reason for c in slow if c.choices]
            assert rest[-1] == "stop"  # it was quick enough
            ended = True
        except openai.APIError as error:
            assert "shutting down" in str(error)
            ended = False
        assert served.process.wait(20) == 0
        try:
            httpx.get(f"{served.url}/healthz")
            raise AssertionError("it answers")
        except httpx.ConnectError:
            pass
        lines = [json.loads(line) for line in served.log if line.startswith("{")]
    told = [line for line in lines if line["event"] == "request"]
    assert len(told) == 3 and {"id", "route", "status", "ms", "tokens"} <= set(told[0])
    whole = "".join(served.log)
    assert "Ana" not in whole and "Porto" not in whole and "secret name" not in whole
    from still_memory.store import MemoryStore

    memory = MemoryStore(store)
    turns = {s.name: s.turns for s in memory.sessions()}
    memory.close()
    assert turns == {"secret name": 2, "quick": 2, "slow": 2 if ended else 0}


def test_after_a_kill_no_answered_turn_is_lost_and_every_session_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "s.db"
    with Process(store) as served:
        streams = [Stream(served.url, f"user {n}") for n in range(8)]
        threads = [threading.Thread(target=stream.talk) for stream in streams]
        for thread in threads:
            thread.start()
        until(lambda: sum(len(stream.answered) for stream in streams) >= 16)
        served.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert lost(store, streams) == []
    with Process(store) as served:
        for stream in streams:
            assert stream.go_on(served.url)
