"""A text that is taken in without a reply; sessions found by a part of their name."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from tests.server.conftest import ROOT, Served, until

BOOK = (ROOT / "still_agent/reference/books/wizard_of_oz.txt").read_text("utf-8")[3000:]


def events(lines: Any) -> list[Any]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_a_text_is_read_without_a_reply_and_its_compactions_are_told(server: Served) -> None:
    with server.http() as http:
        http.post("/v1/sessions", json={"id": "told / as read"}).raise_for_status()
        path = f"/v1/sessions/{quote('told / as read', safe='')}"
        whole = http.post(f"{path}/read", json={"text": "My sister Ana lives in Porto."}).json()
        assert whole["choices"][0]["message"]["content"] == ""
        assert whole["usage"]["completion_tokens"] == 0
        with http.stream("POST", f"{path}/read", json={"text": BOOK[:6000], "stream": True}) as got:
            lines = list(got.iter_lines())
        told = [
            e["still"]["compaction"] for e in events(lines) if "compaction" in e.get("still", {})
        ]
        assert "data: [DONE]" in lines
        turn = http.get(f"{path}/turns").json()["data"][-1]
        asked = {"text": "Where does my sister Ana live?"}
        reply = http.post(f"{path}/turns", json=asked).json()
    assert turn["role"] == "user" and turn["text"] == BOOK[:6000].strip()
    keys = ("tokens_start", "tokens_end", "slots_before", "slots_after", "level")
    assert told and turn["usage"]["steps"] == [[event[key] for key in keys] for event in told]
    assert reply["choices"][0]["message"]["content"]


def test_who_hangs_up_undoes_only_the_part_that_is_being_read(server: Served) -> None:
    chat = server.agent.session("half")
    begun = chat.stats.logical_tokens
    with server.http() as http:
        body = {"text": BOOK, "stream": True}
        with http.stream("POST", "/v1/sessions/half/read", json=body) as got:
            read = 0
            for line in got.iter_lines():
                for event in events([line]):
                    read = event.get("still", {}).get("compaction", {}).get("tokens_end", read)
                if read > 5000:  # the first part had 4,096 at most
                    break
        until(lambda: not server.service.metrics.in_progress._value.get())
        shown = http.get("/v1/sessions/half").json()
        turns = server.texts("half")
        assert 1 <= len(turns) <= 2 and BOOK.strip().startswith(turns[0])
        assert begun < shown["tokens"] < 9000 and shown["turns"] == len(turns)
        again = http.post("/v1/sessions/half/turns", json={"text": "Go on."})
        assert again.status_code == 200


def test_what_cannot_be_read_is_refused(server: Served) -> None:
    with server.http() as http:
        http.post("/v1/sessions", json={"id": "refused"}).raise_for_status()
        for name, body, status in (
            ("refused", {"text": " "}, 400),
            ("refused", {"text": "Hello.", "role": "assistant"}, 400),
            ("refused", {}, 400),
            ("nobody", {"text": "Hello."}, 404),
        ):
            response = http.post(f"/v1/sessions/{name}/read", json=body)
            assert response.status_code == status and response.json()["error"]["message"]
        assert http.get("/v1/sessions/refused").json()["turns"] == 0


def test_sessions_are_found_by_a_part_of_their_name(server: Served) -> None:
    with server.http() as http:
        for name in ("Needle one", "hay", "needle TWO", "NEEDLE three"):
            http.post("/v1/sessions", json={"id": name}).raise_for_status()
        first = http.get("/v1/sessions", params={"q": "needle", "limit": 2}).json()
        last = first["data"][-1]["id"]
        rest = http.get("/v1/sessions", params={"q": "needle", "after": last}).json()
    assert [s["id"] for s in first["data"]] == ["NEEDLE three", "needle TWO"] and first["has_more"]
    assert [s["id"] for s in rest["data"]] == ["Needle one"] and not rest["has_more"]
