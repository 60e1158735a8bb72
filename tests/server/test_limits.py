"""Whatever a client sends, or does not: the right status, and a server that goes on."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import httpx
import openai
import pytest

from still_agent.server import serving
from still_agent.server.limits import Limits
from tests.server.conftest import LONG, ROOT, Serve, Served, connected, counting, until

SAID: dict[str, Any] = {
    "model": "reference",
    "messages": [{"role": "user", "content": "Ana lives in Porto."}],
}
LONG_TURN = {**SAID, "stream": True, "response_format": LONG, "max_tokens": 2000}
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(serve: Serve) -> Served:
    return serve(
        body_bytes=20_000, message_chars=1000, max_tokens=2000, concurrency=2, waiting=1,
        header_s=0.5, body_s=0.5, turn_s=20.0,
    )  # fmt: skip


@pytest.fixture
def http(strict: Served) -> Iterator[httpx.Client]:
    with strict.http() as client:
        yield client
        assert client.get("/healthz").json() == {"status": "ok"}
        idle(strict)
        assert client.post(COMPLETIONS, json=SAID).status_code == 200


def running(served: Served) -> int:
    return int(served.service.metrics.in_progress._value.get())


def idle(served: Served) -> None:
    until(lambda: running(served) == 0)


def error(answer: httpx.Response) -> dict[str, Any]:
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "Traceback" not in found["message"] and "/tmp" not in found["message"]
    return dict(found)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b"[" * 19_000, 400),
        (b'{"model": 1e999}', 400),
        (b'{"n": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "reference", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "reference", "messages": "hello"}', 400),
        (b'{"model": "reference", "messages": [{"role": "user", "content": {"a": 1}}]}', 400),
    ],
)
def test_malformed_bodies_are_refused(http: httpx.Client, body: bytes, status: int) -> None:
    answer = http.post(COMPLETIONS, content=body)
    assert answer.status_code == status, answer.text
    error(answer)


def test_a_body_past_its_limit_is_not_read(http: httpx.Client, strict: Served) -> None:
    answer = http.post(COMPLETIONS, content=b"x" * 20_001)
    assert answer.status_code == 413 and error(answer)["code"] == "request_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    assert http.post(COMPLETIONS, content=chunks()).status_code == 413
    with connected(strict.url) as line:  # one that claims more than it will ever send
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        line.sendall(b"Content-Length: 99999999999999999999\r\n\r\nx")
        assert b" 413 " in line.recv(1000)
        assert b"" in iter(lambda: line.recv(1000), None)  # and it is closed soon


def test_a_large_body_gets_its_413_although_it_is_still_being_sent(strict: Served) -> None:
    with strict.http() as client:
        assert client.post(COMPLETIONS, content=b"x" * 5_000_000).status_code == 413


def test_messages_and_tokens_have_their_limits(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "x" * 1001}]
    answer = http.post(COMPLETIONS, json={**SAID, "messages": long})
    assert answer.status_code == 400
    assert error(answer)["param"] == "messages[0].content"
    answer = http.post(COMPLETIONS, json={**SAID, "max_tokens": 2001})
    assert answer.status_code == 400 and error(answer)["param"] == "max_tokens"
    pinned = [{"role": "system", "content": "ß ☃ " * 240}, *SAID["messages"]]
    answer = http.post(COMPLETIONS, json={**SAID, "messages": pinned})
    assert answer.status_code == 400 and error(answer)["code"] == "context_length_exceeded"


@pytest.fixture(scope="module")
def narrow(serve: Serve) -> Served:
    return serve(concurrency=1, waiting=1, waiting_s=2.0)


@contextmanager
def occupied(served: Served) -> Iterator[None]:
    """In here the only place is taken: by a turn of a session that does not come free."""
    served.agent.session("held").close()
    with served.agent.session("held") as chat, ThreadPoolExecutor() as pool, served.http() as http:
        with chat.lock:
            first = pool.submit(http.post, "/v1/sessions/held/turns", json={"text": "Hello."})
            until(lambda: running(served) == 1)
            yield
        assert first.result().status_code == 200
    idle(served)


def test_more_than_can_be_computed_waits_and_more_than_may_wait_is_refused(narrow: Served) -> None:
    with occupied(narrow), narrow.http() as http, ThreadPoolExecutor() as pool:
        waiting = pool.submit(httpx.post, narrow.url + COMPLETIONS, json=SAID, timeout=60)
        until(lambda: len(narrow.service.turns._line) == 1)
        refused = http.post(COMPLETIONS, json=SAID)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert error(refused)["type"] == "rate_limit_error"
        assert waiting.result().status_code == 503
        assert error(waiting.result())["code"] == "busy"
    with narrow.http() as http:
        assert http.post(COMPLETIONS, json=SAID).status_code == 200


def test_one_that_waits_is_answered_when_a_place_comes_free(narrow: Served) -> None:
    with ThreadPoolExecutor() as pool:
        with occupied(narrow):
            waiting = pool.submit(httpx.post, narrow.url + COMPLETIONS, json=SAID, timeout=60)
            until(lambda: len(narrow.service.turns._line) == 1)
        assert waiting.result().status_code == 200


def test_one_that_hangs_up_in_the_line_leaves_it(narrow: Served) -> None:
    with occupied(narrow):
        with pytest.raises(openai.APITimeoutError):
            narrow.client(max_retries=0).with_options(timeout=0.5).chat.completions.create(**SAID)
        until(lambda: not narrow.service.turns._line)


def test_a_turn_that_takes_too_long_is_undone(serve: Serve) -> None:
    served = serve(turn_s=0.3)
    with served.http() as client:
        body = {**LONG_TURN, "session_id": "slow"}
        answer = client.post(COMPLETIONS, json={**body, "stream": False})
        assert answer.status_code == 504 and error(answer)["code"] == "turn_timeout"
        assert answer.headers["x-should-retry"] == "false"
        told = client.post(COMPLETIONS, json=body).text
        assert '"code":"turn_timeout"' in told and "[DONE]" not in told
        assert client.get("/v1/sessions/slow").json()["turns"] == 0
        assert client.post(COMPLETIONS, json={**SAID, "session_id": "slow"}).status_code == 200
    with pytest.raises(openai.APIError, match="took too long"):
        for _ in served.client(max_retries=0).chat.completions.create(**LONG_TURN):
            pass


def test_headers_and_bodies_that_do_not_come_are_not_waited_for(
    http: httpx.Client, strict: Served
) -> None:
    for sent in (b"", b"GET /healthz HTTP/1.1\r\nHo"):
        with connected(strict.url) as line:
            line.sendall(sent)
            assert line.recv(1000) == b""
    with connected(strict.url) as line:  # a byte now and then does not help
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100:
                line.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - began < 2
    with connected(strict.url) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        line.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in line.recv(1000)


def test_a_reader_that_does_not_read_loses_its_turn_and_the_session_stays_whole(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SEND_BUFFER", 2048)  # so that a reply of this size fills it
    served = serve(reader_s=0.5)
    with served.http() as http:
        assert http.post(COMPLETIONS, json={**SAID, "session_id": "unread"}).status_code == 200
    before = served.texts("unread")
    told = [*SAID["messages"], {"role": "assistant", "content": before[1]}]
    told.append({"role": "user", "content": "Count."})
    body = json.dumps({**LONG_TURN, "messages": told, "session_id": "unread"}).encode()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, _, port = served.url.removeprefix("http://").partition(":")
        line.connect((host, int(port)))
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        until(lambda: running(served) == 1)
        idle(served)  # long before the turn's own limit, and it has not come to its end
    assert served.texts("unread") == before
    with served.http() as http:
        again = http.post(COMPLETIONS, json={**SAID, "messages": told, "session_id": "unread"})
        assert again.json()["still"]["session"] == "unread"


def test_a_second_turn_of_a_session_waits_for_the_first(http: httpx.Client, strict: Served) -> None:
    client = strict.client(max_retries=0)
    body: Any = {**LONG_TURN, "response_format": counting(40)}
    body["extra_body"] = {"session_id": "one by one"}
    stream = client.chat.completions.create(**body)
    next(stream)
    second = http.post("/v1/sessions/one%20by%20one/turns", json={"text": "And Max?"})
    assert second.status_code == 200
    assert "[" in "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert len(strict.texts("one by one")) == 4


def test_damage_and_other_models_are_told_without_the_stores_path(serve: Serve) -> None:
    served = serve()
    with served.http() as client:
        named = {**SAID, "session_id": "damaged"}
        assert client.post(COMPLETIONS, json=named).status_code == 200
        store = served.agent.store
        head = store.head("damaged")
        assert head is not None
        other = head.model.model_copy(update={"weights": "0" * 64})
        store.create("other", other, checkpoint=store.load(head), turns=[], settings={})
        for path, body in (
            ("/v1/sessions/other/turns", {"text": "Hello."}),
            (COMPLETIONS, {**SAID, "session_id": "other"}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 409 and error(answer)["code"] == "other_model"
            assert answer.headers["x-should-retry"] == "false"
        with sqlite3.connect(served.store) as conn:
            conn.execute("update checkpoints set tokens = tokens + 1")
        answer = client.get("/v1/sessions/damaged")
        assert answer.status_code == 500 and error(answer)["code"] == "store_damaged"
        answer = client.post("/v1/sessions/damaged/turns", json={"text": "Hello."})
        assert answer.status_code == 500
        assert str(served.store) not in answer.text


def test_every_limit_is_documented_with_its_default() -> None:
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (`--.*?) \| (.*?) \|", page, re.MULTILINE))
    told = {
        name: value
        for names, values in rows.items()
        for name, value in zip(names.split(", "), re.findall(r"[\d,.]+\d|\d", values), strict=False)
    }
    for field in fields(Limits):
        shown = told[f"`--{field.name.replace('_', '-')}`"]
        default = 8 if field.name == "body_bytes" else field.default
        assert float(shown.replace(",", "")) == default, field.name
