"""Keys are bound to tenants, who see nothing of each other; without keys only this machine asks."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from still_agent.cli.app import app
from still_agent.server.keys import Keys, new_key
from still_memory.errors import InputError
from tests.server.conftest import Serve, Served

ALICE, BOB, OWNER = (new_key(name) for name in ("alice", "bob", ""))
SAID = [{"role": "user", "content": "My sister Ana lives in Porto."}]


@pytest.fixture(scope="module")
def keyed(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Served:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text("\n".join(line for _, line in (ALICE, BOB, OWNER)))
    return serve(Keys.read(file))


def asking(keyed: Served, key: str | None) -> httpx.Client:
    return keyed.http(headers={} if key is None else {"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize("key", [None, "x y", "still-wrong", ALICE[0] + "x", "ø", ALICE[1]])
def test_a_wrong_or_missing_key_is_refused_everywhere(keyed: Served, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    with keyed.http(headers=headers) as http:
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/sessions"),
            ("DELETE", "/v1/sessions/x"),
            ("GET", "/metrics"),
        ):
            answer = http.request(method, path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/healthz").status_code == 200


def test_the_client_gets_an_authentication_error(keyed: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        keyed.client("wrong").models.list()
    assert keyed.client(ALICE[0]).models.list().data


def test_tenants_share_the_server_and_no_session(keyed: Served) -> None:
    name = {"session_id": "ours"}
    for key in (ALICE[0], BOB[0]):
        done = keyed.client(key).chat.completions.create(
            model="reference", messages=SAID, extra_body=name
        )
        assert done.model_extra is not None and done.model_extra["still"]["known"] == 0
    with asking(keyed, ALICE[0]) as alice, asking(keyed, BOB[0]) as bob:
        assert alice.delete("/v1/sessions/ours").status_code == 200
        assert bob.get("/v1/sessions/ours").json()["turns"] == 2
        known, unknown = (alice.get(f"/v1/sessions/{id}") for id in ("ours", "nobody's"))
        assert known.status_code == 404 and known.json() == unknown.json()
        assert alice.get("/v1/sessions").json()["data"] == []


def test_figures_keep_nobody_waiting(server: Served) -> None:
    with server.http() as http, ThreadPoolExecutor() as threads:
        with server.service.agents._lock:  # as while a tenant's file is being opened
            figures = threads.submit(http.get, "/metrics")
            for _ in range(20):
                assert http.get("/healthz", timeout=10).status_code == 200
                time.sleep(0.02)
        assert figures.result().status_code == 200


def test_figures_are_the_operators(keyed: Served) -> None:
    with asking(keyed, ALICE[0]) as alice, asking(keyed, OWNER[0]) as owner:
        assert alice.get("/metrics").status_code == 403
        assert "still_requests_total" in owner.get("/metrics").text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_without_keys_no_foreign_page_is_answered(server: Served, headers: dict[str, str]) -> None:
    with server.http(headers=headers) as http:
        for path in ("/v1/sessions", "/v1/models", "/metrics"):
            assert http.get(path).status_code == 403
        assert http.post("/v1/chat/completions", json={}).status_code == 403


def test_without_keys_this_machines_own_page_is_answered(server: Served) -> None:
    host = server.url.removeprefix("http://")
    for name in (host, host.replace("127.0.0.1", "localhost")):
        with server.http(headers={"Host": name, "Origin": f"http://{name}"}) as http:
            assert http.get("/v1/sessions").status_code == 200


def test_past_loopback_keys_are_demanded(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        at = ["--host", host, "--store", str(tmp_path / "s.db")]
        done = CliRunner().invoke(app, ["serve", *at])
        assert isinstance(done.exception, InputError) and "--keys" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_new_key_is_printed_with_the_line_that_lets_it_in(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--new-key", 'al"ice\\'])
    key, line = (done.output.splitlines()[n] for n in (1, 3))
    file = tmp_path / "keys.toml"
    file.write_text(line)
    assert Keys.read(file).tenant(key) == 'al"ice\\'
    assert key not in line


@pytest.mark.parametrize(
    "text",
    ["", "alice = ['abc']", "alice = 5", "alice = [", 'a = ["%s"]\nb = ["%s"]' % (("0" * 64,) * 2)],
)
def test_a_file_of_keys_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(InputError):
        Keys.read(file)
