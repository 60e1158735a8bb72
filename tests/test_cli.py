"""The command line, as its user meets it."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from still_agent.cli.app import app, main
from still_memory.errors import InputError, TaintedError
from tests.conftest import tiny_model

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "memory")])
TINY_SLOTS = ("--slots", "128", "--compactor", "streaming")


def still_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "still_agent", *arguments], capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": PATHS},
    )  # fmt: skip


def chat(model: Path, store: Path, stdin: str | bytes, *more: str) -> Result:
    at = ("--model", str(model), "--store", str(store), "--max-tokens", "4")
    return CliRunner().invoke(app, ["chat", *at, *TINY_SLOTS, *more], input=stdin)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A store with one session, made by `still-agent chat` itself."""
    path = tmp_path_factory.mktemp("chat") / "talk.db"
    page = path.with_name("page.txt")
    page.write_text("It was a long and quiet afternoon by the river. " * 40)
    said = f"My sister Ana lives in Porto.\n\n/stats\n/read {page}\n/what\n/quit\n"
    done = chat(tiny_folder, path, said, "--session", "ålice")
    assert done.exit_code == 0, done.output
    path.with_name("chat.txt").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A model of the same tokenizer and other weights."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "other"))
    tiny_model(seed=1).save_pretrained(folder)
    return folder


def test_help_comes_in_under_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = still_agent("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and "sessions" in done.stdout
        # processor time, which a busy machine does not stretch as it does the clock
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("module", ["still_agent.cli.app", "still_agent.evaluation.journey"])
def test_commands_import_no_torch_until_they_run(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": PATHS}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_chat_shows_slots_and_each_compaction(store: Path) -> None:
    shown = store.with_name("chat.txt").read_text()
    assert re.search(r"\d+ of 128 slots", shown)
    assert re.search(r"compacted .* slots", shown)


def test_chat_resumes_a_session(store: Path, tiny_folder: Path) -> None:
    done = chat(tiny_folder, store, "", "--session", "ålice")
    assert "resumed 'ålice'" in done.stdout


def test_a_mistake_in_a_chat_costs_a_line_and_not_the_session(
    tmp_path: Path, tiny_folder: Path
) -> None:
    broken = tmp_path / "latin.txt"
    broken.write_bytes(b"caf\xe9")
    said = f"/read {broken}\n/read {tmp_path / 'none.txt'}\nhello\n"
    done = chat(tiny_folder, tmp_path / "s.db", said)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("error:") == 2
    assert re.search(r"\d+ of 128 slots", done.stdout)


def test_ctrl_c_in_mid_reply_undoes_the_turn_and_the_chat_goes_on(
    tmp_path: Path, tiny_folder: Path
) -> None:
    at = ["--model", str(tiny_folder), "--store", str(tmp_path / "s.db"), "--max-tokens", "100000"]
    talk = subprocess.Popen(
        [sys.executable, "-u", "-m", "still_agent", "chat", *at, *TINY_SLOTS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
        # a shell's background job, which tests may be, hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with talk:
        assert talk.stdin is not None and talk.stdout is not None
        talk.stdin.write("hello\n")
        talk.stdin.flush()
        for line in talk.stdout:
            if "compacted" in line:  # far into a reply that would have no end
                talk.send_signal(signal.SIGINT)
                break
        said, _ = talk.communicate("/stats\n/quit\n", timeout=60)
    assert talk.returncode == 0
    assert "stopped: the turn is undone" in said
    assert re.search(r"\bturns 0$", said, re.MULTILINE), said


def test_a_chat_goes_on_after_its_session_was_deleted_elsewhere(
    tmp_path: Path, tiny_folder: Path
) -> None:
    at = ["--store", str(tmp_path / "s.db")]
    model = ["--model", str(tiny_folder), "--max-tokens", "4", "--system", "Be brief."]
    talk = subprocess.Popen(
        [sys.executable, "-u", "-m", "still_agent", "chat", *at, *model, *TINY_SLOTS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    )  # fmt: skip
    with talk:
        assert talk.stdin is not None and talk.stdout is not None
        talk.stdin.write("hello\n/stats\n")
        talk.stdin.flush()
        assert any(re.search(r"\bturns 3$", line.rstrip()) for line in talk.stdout)
        assert still_agent("sessions", "delete", "default", "--yes", *at).returncode == 0
        said, _ = talk.communicate("one\ntwo\n/stats\n/quit\n", timeout=60)
    assert talk.returncode == 0
    assert said.count("opened anew") == 1  # "one" is lost, and said so; "two" is not
    assert re.search(r"\bturns 3$", said, re.MULTILINE), said


def test_bytes_that_are_no_utf8_cost_their_line(tmp_path: Path, tiny_folder: Path) -> None:
    done = chat(tiny_folder, tmp_path / "s.db", b"caf\xe9\n/read caf\xe9.txt\nhello\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("error:") == 2 and "lone surrogate" in done.stdout
    assert re.search(r"\d+ of 128 slots", done.stdout)


def test_sessions_are_listed_shown_and_deleted(store: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["--store", str(copy)]
    assert "ålice" in runner.invoke(app, ["sessions", "list", *at]).stdout
    (info,) = json.loads(runner.invoke(app, ["sessions", "list", "--json", *at]).stdout)
    assert info["name"] == "ålice" and info["tokens"] > info["slots"] > 0
    turns = json.loads(runner.invoke(app, ["sessions", "show", "ålice", "--json", *at]).stdout)
    assert "My sister Ana lives in Porto." in [t["text"] for t in turns]
    assert len(turns) == info["turns"]
    assert "Porto" in runner.invoke(app, ["sessions", "show", "ålice", *at]).stdout
    assert runner.invoke(app, ["sessions", "delete", "ålice", *at], input="n\n").exit_code == 1
    assert runner.invoke(app, ["sessions", "delete", "ålice", "--yes", *at]).exit_code == 0
    assert json.loads(runner.invoke(app, ["sessions", "list", "--json", *at]).stdout) == []


def test_turns_are_forgotten_and_sessions_erased_to_the_last_byte(
    store: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["--store", str(copy), "--json"]
    parts = ["--model", str(tiny_folder), *TINY_SLOTS]

    def told(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["sessions", *arguments, *at])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def bytes_of() -> bytes:
        return b"".join(file.read_bytes() for file in tmp_path.iterdir())

    turns = [turn["text"] for turn in told("show", "ålice")]
    said = str(turns.index("My sister Ana lives in Porto.") + 1)
    told("fork", "ålice", "b")
    (taint, fork) = told("forget", "ålice", said, "--dry-run")
    assert (taint["session"], fork["session"], taint["forgotten"]) == ("ålice", "b", [int(said)])
    assert len(taint["later"]) == len(turns) - int(said) and b"Porto" in bytes_of()
    refused = CliRunner().invoke(app, ["sessions", "forget", "ålice", said, *at, *parts])
    assert isinstance(refused.exception, TaintedError) and b"Porto" in bytes_of()
    beyond = CliRunner().invoke(app, ["sessions", "forget", "ålice", "99", *at, *parts])
    assert isinstance(beyond.exception, InputError)
    told("forget", "ålice", said, "--later", "keep", *parts)
    assert [t["text"] for t in told("show", "b")] == [
        text for text in turns if text != "My sister Ana lives in Porto."
    ]
    assert b"Porto" not in bytes_of() and b"quiet afternoon" in bytes_of()
    refused = CliRunner().invoke(app, ["sessions", "delete", "b", "--erase", *at])
    assert isinstance(refused.exception, TaintedError)
    assert told("delete", "b", "--forks", "keep")["shared"][0]["session"] == "ålice"
    assert told("delete", "ålice", "--erase")["sessions"] == ["ålice"]
    assert b"quiet afternoon" not in bytes_of()
    done = CliRunner().invoke(app, ["store", "scrub", *at])
    assert json.loads(done.stdout)["bytes"] == copy.stat().st_size


def test_a_session_is_forked_rewound_and_taken_elsewhere(
    store: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    copy, file, other = tmp_path / "copy.db", tmp_path / "alice.still", tmp_path / "other.db"
    copy.write_bytes(store.read_bytes())
    at, there = ["--store", str(copy)], ["--store", str(other)]

    def told(*arguments: str) -> dict[str, object]:
        done = CliRunner().invoke(app, ["sessions", *arguments, "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, object] = json.loads(done.stdout)
        return found

    (match,) = json.loads(
        CliRunner().invoke(app, ["sessions", "search", "ålice", "ana PORTO", "--json", *at]).stdout
    )
    assert match["excerpt"] == "My sister Ana lives in Porto." and match["role"] == "user"
    (info,) = json.loads(CliRunner().invoke(app, ["sessions", "list", "--json", *at]).stdout)
    last = info["turns"]
    assert told("fork", "ålice", "bob", *at)["turns"] == last
    assert told("rewind", "ålice", str(last), *at)["tokens"] == info["tokens"]
    refused = CliRunner().invoke(app, ["sessions", "rewind", "ålice", "0", *at])
    assert "--replay" in str(refused.exception) and "are kept" in str(refused.exception)
    with_model = ["--replay", "--model", str(tiny_folder), *TINY_SLOTS]
    answer = told("fork", "ålice", "carol", "--at", "1", *with_model, *at)
    assert answer["turns"] == 1 and answer["replayed_tokens"] and answer["faithful"]

    told("export", "ålice", str(file), *at)
    assert told("import", str(file), *there) == {
        "imported": "ålice", "turns": last, "tokens": info["tokens"], "verified": False
    }  # fmt: skip
    again = CliRunner().invoke(app, ["sessions", "import", str(file), *there])
    assert "choose another name" in str(again.exception)
    assert told("import", str(file), "--name", "dora", *there)["imported"] == "dora"
    names = json.loads(CliRunner().invoke(app, ["sessions", "list", "--json", *there]).stdout)
    assert {n["name"] for n in names} == {"ålice", "dora"}
    assert {n["model"][:11] for n in names} == {"unverified "}
    again = told("import", str(file), "--name", "emil", *with_model, *there)
    assert again["session"] == "emil" and again["faithful"] and again["tokens"] == info["tokens"]
    names = json.loads(CliRunner().invoke(app, ["sessions", "list", "--json", *there]).stdout)
    assert {n["model"] for n in names} == {tiny_folder.name}
    file.write_bytes(file.read_bytes()[:-1])
    absent = ["--store", str(tmp_path / "absent.db")]
    broken = CliRunner().invoke(app, ["sessions", "import", str(file), *absent])
    assert "damaged" in str(broken.exception) and not (tmp_path / "absent.db").exists()


def test_a_memory_is_computed_anew_by_the_command_that_the_error_gives(
    store: Path, tmp_path: Path, tiny_folder: Path, other_folder: Path
) -> None:
    copy = tmp_path / "a copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["--store", str(copy)]
    model = ["--model", str(other_folder), *TINY_SLOTS]
    refused = CliRunner().invoke(app, ["chat", "--session", "ålice", *model, *at], input="")
    assert "weights differ" in str(refused.exception)
    (command,) = re.findall(r"`still-agent (.*)`", str(refused.exception))
    words = shlex.split(command)
    assert words[:2] == ["sessions", "rebuild"] and words[-1] == "ålice"
    before = CliRunner().invoke(app, ["sessions", "show", "ålice", *at]).stdout
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "rebuilding 'ålice'" in done.stderr and "100%" in done.stderr
    assert "read again, other: model" in done.stdout
    assert CliRunner().invoke(app, ["sessions", "show", "ålice", *at]).stdout == before
    assert "resumed 'ålice'" in chat(other_folder, copy, "", "--session", "ålice").stdout
    with closing(sqlite3.connect(copy)) as db:
        db.execute("update span_layers set data = zeroblob(length(data))")
        db.commit()
    broken = chat(other_folder, copy, "", "--session", "ålice")
    assert command in str(broken.exception) and "damaged" in str(broken.exception)
    told = json.loads(CliRunner().invoke(app, [*words[:2], "--json", *words[2:]]).stdout)
    assert told["faithful"] and told["replayed_tokens"] == told["tokens"]
    assert "resumed 'ålice'" in chat(other_folder, copy, "", "--session", "ålice").stdout


def test_old_turns_are_read_again_under_a_bar(
    store: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["--replay", "--model", str(tiny_folder), *TINY_SLOTS, "--store", str(copy)]
    for verb in (["fork", "ålice", "bob", "--at", "1"], ["rewind", "ålice", "1"]):
        done = CliRunner().invoke(app, ["sessions", *verb, *at])
        assert done.exit_code == 0, done.output
        assert "100%" in done.stderr and "tokens were read again, as logged" in done.stdout


def test_a_tenant_sees_its_own_sessions_and_the_operator_all(
    store: Path, tmp_path: Path, tiny_folder: Path, other_folder: Path
) -> None:
    copy, file = tmp_path / "copy.db", tmp_path / "x.still"
    copy.write_bytes(store.read_bytes())

    def run(*arguments: str, **env: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--store", str(copy)], env=env)

    def names(tenant: str) -> list[str]:
        done = run("sessions", "list", "--json", STILL_AGENT_TENANT=tenant)
        return [s["name"] for s in json.loads(done.stdout)]

    assert run("sessions", "export", "ålice", str(file)).exit_code == 0
    assert run("sessions", "import", str(file), "--tenant", "acme").exit_code == 0
    said = chat(tiny_folder, copy, "hello\n", "--tenant", "acme", "--session", "bob")
    assert said.exit_code == 0, said.output
    assert names("") == ["ålice"] and names("acme") == ["bob", "ålice"] and names("x") == []
    for command in ("show", "delete"):
        refused = run("sessions", command, "bob", *(["--yes"] if command == "delete" else []))
        assert type(refused.exception).__name__ == "UnknownSessionError"
    forked = run("sessions", "fork", "bob", "carol", "--tenant", "acme")
    assert forked.exit_code == 0 and "carol" in forked.stdout
    assert "hello" in run("sessions", "show", "carol", "--tenant", "acme").stdout
    stats = run("store", "stats")
    assert "carol (tenant 'acme')" in stats.stdout and "\n ålice  " in stats.stdout
    other = chat(other_folder, copy, "", "--tenant", "acme", "--session", "carol")
    (command,) = re.findall(r"`still-agent (.*)`", str(other.exception))
    assert CliRunner().invoke(app, shlex.split(command)).exit_code == 0  # names the tenant too
    pruned = ["store", "prune", "--older-than", "0s", "--json"]
    found = json.loads(run(*pruned, "--tenant", "acme", "--dry-run").stdout)
    assert sorted(found["sessions"]) == [f"{n} (tenant 'acme')" for n in ("bob", "carol", "ålice")]
    assert len(json.loads(run(*pruned, "--dry-run").stdout)["sessions"]) == 4
    assert run(*pruned, "--tenant", "").exit_code == 0
    assert names("") == [] and len(names("acme")) == 3
    assert run("store", "check").exit_code == 0


def test_a_store_can_be_named_by_the_environment(store: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["sessions", "list", "--json"], env={"STILL_STORE": str(store)})
    assert len(json.loads(done.stdout)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("sessions", "list", "--store", "no-such.db"),
        ("sessions", "show", "nobody"),
        ("sessions", "delete", "nobody", "--yes"),
        ("sessions", "search", "nobody", "porto"),
        ("sessions", "search", "ålice", "?"),
        ("sessions", "fork", "nobody", "somebody"),
        ("sessions", "rewind", "ålice", "999"),
        ("sessions", "rebuild", "nobody"),
        ("sessions", "rebuild", "nobody", "--store", "no-such.db"),
        ("sessions", "export", "nobody", "no.still"),
        ("sessions", "import", "no-such.still"),
        ("store", "check", "--store", "no-such.db"),
        ("store", "reindex", "--store", "no-such.db"),
        ("store", "prune", "--older-than", "soon"),
        ("store", "prune", "--max-bytes", "2 pounds"),
        ("demo", "--facts", "many"),
        ("chat", "--slots", "3"),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_a_typed_error_is_one_line_and_status_1(
    arguments: tuple[str, ...],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STILL_STORE", str(store))
    monkeypatch.setattr(sys, "argv", ["still-agent", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_looking_into_a_store_does_not_make_one(tmp_path: Path) -> None:
    done = still_agent("sessions", "list", "--store", str(tmp_path / "new.db"))
    assert done.returncode == 1 and done.stderr.startswith("error: there is no store")
    assert not list(tmp_path.iterdir())


def test_a_store_is_checked_and_damage_is_told_with_status_1(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["store", "check", "--store", str(copy)]
    sound = CliRunner().invoke(app, at)
    assert sound.exit_code == 0 and sound.stdout.strip().endswith("no damage"), sound.output
    with sqlite3.connect(copy) as conn:
        conn.execute("update span_layers set data = x'00' where id = 1")
        conn.execute("delete from turn_words where rowid = 1")
    conn.close()
    told = CliRunner().invoke(app, at)
    assert told.exit_code == 1 and re.search(r"^span \w+ \(row 1\): its size", told.stdout)
    assert "['ålice']" in told.stdout and "What to do: restore" in told.stdout
    done = CliRunner().invoke(app, [*at, "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and report["damaged"] and "ålice" in report["unharmed"]
    span, words = report["findings"]
    assert (span["kind"], span["sessions"], span["row"]) == ("span", ["ålice"], 1)
    assert words["kind"] == "words" and "store reindex" in words["remedy"]
    assert CliRunner().invoke(app, ["store", "reindex", *at[2:]]).exit_code == 0
    report = json.loads(CliRunner().invoke(app, [*at, "--json"]).stdout)
    assert [f["kind"] for f in report["findings"]] == ["span"]


def test_a_store_is_measured_and_pruned(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    at = ["--store", str(copy)]

    def run(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(app, ["store", *arguments, *at], input=stdin)

    space = json.loads(run("stats", "--json").stdout)
    assert space["sessions"][0]["name"] == "ålice" and space["gives_back"]
    assert f"{space['span_bytes']:,}" in run("stats").stdout
    kept = run("prune", "--keep-last", "1", "--json")
    assert json.loads(kept.stdout)["drops"][0]["checkpoints"] == 1, kept.output
    assert json.loads(run("stats", "--json").stdout)["checkpoints"] == 1
    fork = ["sessions", "fork", "ålice", "bob", *at]
    assert CliRunner().invoke(app, fork).exit_code == 0
    with sqlite3.connect(copy) as conn:
        conn.execute("update sessions set updated = '2020-01-01T00:00:00+00:00' where name='bob'")
    conn.close()

    def names() -> list[str]:
        listed = CliRunner().invoke(app, ["sessions", "list", "--json", *at]).stdout
        return [s["name"] for s in json.loads(listed)]

    told = run("prune", "--older-than", "30d", "--dry-run")
    assert "session 'bob'" in told.stdout and "would go" in told.stdout
    assert run("prune", "--older-than", "30d", stdin="n\n").exit_code == 1
    assert sorted(names()) == ["bob", "ålice"]
    assert run("prune", "--older-than", "30d", "--yes").exit_code == 0 and names() == ["ålice"]
    assert run("prune", "--max-bytes", "1kB", "--yes").exit_code == 0 and names() == ["ålice"]
    assert "no damage" in run("check").stdout


def test_an_encrypted_store_from_the_command_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by importing a plain session while a key is set; then checked, and given another key."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments)])

    monkeypatch.delenv("STILL_AGENT_KEY", raising=False)
    plain, sealed, file = tmp_path / "plain.still", tmp_path / "sealed.db", tmp_path / "s.still"
    assert run("sessions", "export", "ålice", plain, "--store", store).exit_code == 0
    monkeypatch.setenv("STILL_AGENT_KEY", "ab" * 32)
    assert run("sessions", "import", plain, "--store", sealed).exit_code == 0
    assert b"Porto" in plain.read_bytes() and b"Porto" not in sealed.read_bytes()
    assert run("store", "check", "--store", sealed).exit_code == 0
    assert "Porto" in run("sessions", "search", "ålice", "porto", "--store", sealed).stdout
    assert "has no index" in " ".join(run("store", "reindex", "--store", sealed).stdout.split())
    assert run("sessions", "export", "ålice", file, "--store", sealed).exit_code == 0
    assert file.read_bytes().startswith(b"still sealed")
    assert run("store", "rekey", "--store", sealed).exit_code == 1  # no new key
    monkeypatch.setenv("STILL_AGENT_NEW_KEY", "cd" * 32)
    assert run("store", "rekey", "--store", sealed).exit_code == 0
    refused = run("sessions", "list", "--store", sealed)
    assert refused.exit_code == 1 and "does not open with this key" in str(refused.exception)
    monkeypatch.setenv("STILL_AGENT_KEY", "cd" * 32)
    assert "ålice" in run("sessions", "list", "--store", sealed).stdout
    out = tmp_path / "out.still"
    assert run("sessions", "export", "ålice", out, "--plain", "--store", sealed).exit_code == 0
    assert b"Porto" in out.read_bytes()
    monkeypatch.delenv("STILL_AGENT_KEY")
    refused = run("store", "check", "--store", sealed)
    assert refused.exit_code == 1 and "STILL_AGENT_KEY" in str(refused.exception)


def test_a_codec_is_an_option_of_chat(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.db"
    assert chat(tiny_folder, path, "Hello there.\n", "--codec", "int4").exit_code == 0
    assert chat(tiny_folder, path, "And again.\n").exit_code == 0
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("select distinct codec from spans").fetchall() == [("int4",)]
    refused = chat(tiny_folder, path, "", "--codec", "zip")
    assert refused.exit_code == 1 and "exact, int8, int4" in str(refused.exception)
