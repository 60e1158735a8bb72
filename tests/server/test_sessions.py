"""The sessions of the store over HTTP: list, look, say, fork, rewind, delete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from still_memory.store import MemoryStore
from tests.server.conftest import LONG, SLOTS, Served

NAMES = ["alice", "a/b", " x ", "å b?&#%", "turns", "x/turns", "日本 語", "a\\b\n"]


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def at(name: str, *more: str) -> str:
    return "/".join(["/v1/sessions", quote(name, safe=""), *more])


def say(http: httpx.Client, name: str, text: str, **options: Any) -> Any:
    done = http.post(at(name, "turns"), json={"text": text, **options})
    assert done.status_code == 200, done.text
    return done.json()


def begin(http: httpx.Client, name: str, *texts: str, system: str | None = None) -> Any:
    done = http.post("/v1/sessions", json={"id": name, "system": system})
    assert done.status_code == 201, done.text
    for text in texts:
        say(http, name, text)
    return done.json()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_has_an_address(http: httpx.Client, name: str) -> None:
    begin(http, name, "My sister Ana lives in Porto.")
    shown = http.get(at(name)).json()
    assert shown["id"] == name and shown["turns"] == 2
    turns = http.get(at(name, "turns")).json()["data"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    told = [{"role": t["role"], "content": t["text"]} for t in turns]
    told.append({"role": "user", "content": "Where does Ana live?"})
    more = {"model": "reference", "session_id": name, "messages": told}
    answer = http.post("/v1/chat/completions", json=more)
    assert unquote(answer.headers["x-session-id"]) == name
    assert answer.json()["still"]["known"] == 2
    assert http.delete(at(name)).json() == {
        "id": name, "object": "session.deleted", "deleted": True, "sessions": [name],
    }  # fmt: skip
    assert http.get(at(name)).status_code == 404


def test_a_session_shows_what_its_slots_are(http: httpx.Client, server: Served) -> None:
    begin(http, "layout", system="You are brief.")
    for n in range(9):
        say(http, "layout", f"{n}. " + "The wind rose and the sea was grey. " * 6)
    shown = http.get(at("layout")).json()
    with server.agent.session("layout") as chat:
        stats, layout = chat.stats, chat.layout
    assert (shown["slots"], shown["tokens"], shown["rounds"]) == (
        stats.slots, stats.logical_tokens, stats.rounds,
    )  # fmt: skip
    assert (shown["pinned"], shown["memory"], shown["tail"]) == (
        stats.pinned, stats.memory, stats.tail,
    )  # fmt: skip
    assert stats.memory and shown["slots"] <= shown["budget"] == SLOTS
    assert [(e["share"], e["slots"], e["tokens_end"]) for e in shown["layout"]] == [
        (e.share, e.slots, e.tokens_end) for e in layout
    ]


def test_compactions_are_told_as_they_happen(http: httpx.Client) -> None:
    begin(http, "compacting")
    events: list[Any] = []
    for n in range(6):
        body = {"text": f"{n}. " + "The wind rose. " * 30, "stream": True}
        with http.stream("POST", at("compacting", "turns"), json=body) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        events += map(json.loads, lines[:-1])
    told = [e["still"]["compaction"] for e in events if "compaction" in e.get("still", {})]
    ends = [e for e in events if e["choices"] and e["choices"][0]["finish_reason"]]
    assert told and len(told) == sum(end["still"]["compactions"] for end in ends)
    assert all(e["slots_after"] < e["slots_before"] for e in told)


def test_lists_come_in_pages(http: httpx.Client) -> None:
    for n in range(5):
        begin(http, f"page {n}")
    first = http.get("/v1/sessions", params={"limit": 2}).json()
    assert [s["id"] for s in first["data"]] == ["page 4", "page 3"] and first["has_more"]
    rest = http.get("/v1/sessions", params={"limit": 3, "after": "page 3"}).json()
    assert [s["id"] for s in rest["data"]] == ["page 2", "page 1", "page 0"]
    assert http.get("/v1/sessions", params={"after": "nobody"}).status_code == 404
    say(http, "page 0", "One.")
    say(http, "page 0", "Two.")
    turns = http.get(at("page 0", "turns"), params={"limit": 1, "after": 2}).json()
    assert [t["text"] for t in turns["data"]] == ["Two."] and turns["has_more"]
    assert turns["data"][0]["number"] == 3


def test_forks_and_rewinds_go_on_from_any_turn(http: httpx.Client, server: Served) -> None:
    begin(http, "tree", "My sister Ana lives in Porto.", "My brother Max lives in Rome.")
    forked = http.post(at("tree", "fork"), json={"name": "tree/2", "at": 2})
    assert forked.status_code == 201 and forked.json()["turns"] == 2
    assert http.post(at("tree", "fork"), json={"name": "tree/2"}).status_code == 409
    rewound = http.post(at("tree", "rewind"), json={"at": 2}).json()
    assert rewound["turns"] == 2 and rewound["layout"] == forked.json()["layout"]
    assert server.texts("tree") == server.texts("tree/2")
    assert http.post(at("tree", "rewind"), json={"at": 9}).status_code == 400
    assert "Porto" in say(http, "tree", "Where does Ana live?")["choices"][0]["message"]["content"]


def test_words_are_found_and_erased_ones_are_not(http: httpx.Client, server: Served) -> None:
    begin(http, "words", "The kingfisher is blue.")
    found = http.get(at("words", "search"), params={"q": "kingfisher"}).json()["data"]
    assert found[0]["number"] == 1 and "kingfisher" in found[0]["excerpt"]
    assert http.get(at("words", "search"), params={"q": "!"}).status_code == 400
    begun = http.post(at("words", "fork"), json={"name": "words too"})
    assert begun.status_code == 201
    assert http.delete(at("words"), params={"erase": True}).status_code == 409
    assert http.delete(at("words too")).status_code == 200
    assert http.delete(at("words"), params={"erase": True}).status_code == 200
    files = [server.store, server.store.with_name(server.store.name + "-wal")]
    assert not any(b"kingfisher" in file.read_bytes() for file in files)


def test_a_session_that_is_deleted_ends_the_turn_that_runs(
    http: httpx.Client, server: Served
) -> None:
    body = {"model": "reference", "session_id": "gone", "stream": True, "response_format": LONG,
            "max_tokens": 2000, "messages": [{"role": "user", "content": "Count."}]}  # fmt: skip
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        with server.http() as other:
            assert other.delete(at("gone")).status_code == 200
        rest = [line for line in lines if line]
    assert "session_not_found" in rest[-1] and "data: [DONE]" not in rest
    assert http.get(at("gone")).status_code == 404


def test_what_is_not_there_is_not_found_and_not_made(http: httpx.Client) -> None:
    for method, path, body in (
        ("GET", at("nobody"), None),
        ("GET", at("nobody", "turns"), None),
        ("GET", at("nobody", "search?q=x"), None),
        ("POST", at("nobody", "turns"), {"text": "Hello."}),
        ("POST", at("nobody", "fork"), {"name": "somebody"}),
        ("POST", at("nobody", "rewind"), {"at": 0}),
        ("DELETE", at("nobody"), None),
    ):
        answer = http.request(method, path, json=body)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "session_not_found"
    ids = [s["id"] for s in http.get("/v1/sessions", params={"limit": 1000}).json()["data"]]
    assert not {"nobody", "somebody"} & {*ids}
    assert http.post("/v1/sessions", json={"id": "x" * 600}).status_code == 400
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.put("/v1/sessions").status_code == 405


def test_one_look_waits_for_no_turn(http: httpx.Client, server: Served) -> None:
    begin(http, "busy", "My sister Ana lives in Porto.")
    with server.agent.session("busy").lock:  # as a turn that runs has it
        assert http.get(at("busy")).json()["turns"] == 2
        assert len(http.get(at("busy", "turns")).json()["data"]) == 2


def test_many_sessions_are_listed_by_one_request(http: httpx.Client, server: Served) -> None:
    begin(http, "one of many")
    store = MemoryStore(server.store)
    head = store.head("one of many")
    assert head is not None
    empty = store.load(head)
    for n in range(300):
        store.fork(head, f"many {n}", empty)
    store.close()
    listed = http.get("/v1/sessions", params={"limit": 1000}).json()
    assert len({s["id"] for s in listed["data"]}) >= 300
