"""The page, in a real browser, on a real server: what one can do there, and what it must not do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, Response, expect, sync_playwright

from still_agent.server.keys import Keys, new_key
from tests.server.conftest import ROOT, SLOTS, Process, Serve, Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BOOK = (ROOT / "still_agent/reference/books/wizard_of_oz.txt").read_text("utf-8")[3000:]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no browser: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """`visit(url)`: the page in a profile of its own. What goes wrong in it or leaves it fails."""
    contexts, wrong = [], []

    def open_page(url: str, allowed: tuple[int, ...] = (), **options: Any) -> Page:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()

        def answered(response: Response) -> None:
            if not response.url.startswith(url.split("/#")[0]):
                wrong.append(f"asked elsewhere: {response.url}")
            if response.status >= 400 and response.status not in allowed:
                wrong.append(f"{response.status} of {response.url}")

        def logged(message: Any) -> None:
            if message.type == "error" and "Failed to load resource" not in message.text:
                wrong.append(message.text)

        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", logged)
        page.on("response", answered)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def begin(page: Page, name: str, system: str = "You are brief.") -> None:
    page.get_by_role("button", name="New", exact=True).click()
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("System prompt").fill(system)
    page.get_by_role("button", name="Begin").click()
    expect(page.locator("#name")).to_have_text(name)
    expect(page.locator(".turn")).to_have_count(1)


def say(page: Page, text: str, turns: int) -> None:
    """Say something; `turns` are there after it."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(f".turn[data-number='{turns}'].assistant")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def read(page: Page, text: str) -> None:
    page.get_by_role("button", name="Read a text").click()
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("dialog").get_by_role("button", name="Read").click()


def drop(page: Page, name: str, text: str) -> None:
    """A file, as a hand lets it fall on the page."""
    held = page.evaluate_handle(
        """([name, text]) => {
          const held = new DataTransfer();
          held.items.add(new File([text], name));
          return held;
        }""",
        [name, text],
    )
    page.dispatch_event("#chat", "drop", {"dataTransfer": held})
    expect(page.get_by_role("dialog")).to_contain_text(name)
    page.get_by_role("dialog").get_by_role("button", name="Read").click()


def texts(page: Page) -> list[str]:
    return page.locator(".turn .text").all_inner_texts()


def bar(page: Page) -> list[str]:
    labels = page.locator("#bar button").evaluate_all("all => all.map(one => one.ariaLabel)")
    return [str(label) for label in labels]


def test_what_is_said_is_answered_and_its_cost_is_shown(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    begin(page, "alice / home")
    say(page, "My sister Ana lives in Porto.", 3)
    say(page, "Where does my sister Ana live?", 5)
    assert texts(page) == server.texts("alice / home") and "Porto" in texts(page)[-1]
    usage = server.agent.store.history("alice / home")[-1].usage
    facts = page.locator(".turn").last.locator(".facts").inner_text()
    shown = re.fullmatch(
        r"reused (\d+) · prefilled (\d+) · generated (\d+) · first token after [\d.]+ m?s", facts
    )
    assert shown is not None and [int(n) for n in shown.groups()] == [
        usage[key] for key in ("reused_tokens", "prefilled_tokens", "generated_tokens")
    ]
    line = page.get_by_role("list", name="Sessions").get_by_role("button", name="alice / home")
    expect(line.first).to_contain_text("slots")
    expect(page.locator("#spoken")).to_have_text(texts(page)[-1])  # for those who listen


def test_a_compaction_is_seen_as_it_happens_and_memory_as_it_is(
    server: Served, visit: Open
) -> None:
    page = visit(f"{server.url}/", reduced_motion="no-preference")
    begin(page, "watched")
    page.evaluate(
        """() => {
          globalThis.most = 0; globalThis.moved = 0; globalThis.corners = 0;
          new MutationObserver(() => {
            const all = [...document.querySelectorAll("#bar button")];
            const slots = all.reduce((sum, one) => sum + Number(one.style.flexGrow), 0);
            most = Math.max(most, slots);
            if (document.querySelector("#memory.moving #bar .fresh")) moved++;
            const line = document.querySelector("#chart .held");
            corners = line ? line.getAttribute("points").split(" ").length : 0;
          }).observe(document.getElementById("memory"), { attributes: true, subtree: true });
        }"""
    )
    read(page, BOOK[:9000])
    expect(page.locator("#log .fresh").first).to_contain_text(re.compile(r"\d+ ms.*round \d+"))
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator("#turns .turn").last).to_contain_text("compactions")
    most, moved, corners = page.evaluate("[most, moved, corners]")
    assert SLOTS - 1 <= most <= SLOTS + 0.01 and moved > 0

    history = server.agent.store.history("watched")
    steps: list[Any] = [s for turn in history for s in turn.usage.get("steps", ())]  # type: ignore[union-attr]
    logged = page.locator("#log li b").all_inner_texts()
    assert logged == [f"{s[2]} → {s[3]} slots" for s in reversed(steps)]
    assert corners >= 2 * len(steps)
    with server.http() as http:
        told = http.get("/v1/sessions/watched").json()
    shown = bar(page)
    assert len([s for s in shown if s.startswith("Compact, tier")]) == sum(
        span["share"] == "memory" for span in told["layout"]
    )
    tail = sum(span["slots"] for span in told["layout"] if span["share"] == "tail")
    assert shown[0].startswith("Pinned: ") and shown[-1].startswith(f"Raw: {tail} slots")
    expect(page.locator("#figures")).to_contain_text(f"{told['tokens']:,} tokens seen")
    page.locator("#bar button").nth(1).hover()
    expect(page.locator("#span")).to_have_text(shown[1])
    page.reload()  # what was watched is told by the turns as well
    expect(page.locator("#log li")).to_have_count(len(steps))
    assert bar(page) == shown


def test_any_turn_can_be_forked_from_and_rewound_to(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    begin(page, "trunk")
    say(page, "My sister Ana lives in Porto.", 3)
    say(page, "My friend Tom works as a baker.", 5)
    page.get_by_role("button", name="Fork after turn 3").click()
    page.get_by_label("Its name").fill("branch")
    page.get_by_role("button", name="Fork", exact=True).last.click()
    expect(page.locator("#name")).to_have_text("branch")
    expect(page.locator(".turn")).to_have_count(3)
    say(page, "Where does my sister Ana live?", 5)
    assert "Porto" in texts(page)[-1]
    page.go_back()
    expect(page.locator("#name")).to_have_text("trunk")
    assert texts(page) == server.texts("trunk")
    seen = page.locator("#seen").inner_text()
    page.get_by_role("button", name="Rewind to turn 3").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".turn")).to_have_count(5)  # nothing was confirmed
    page.get_by_role("button", name="Rewind to turn 3").click()
    page.get_by_role("dialog").get_by_role("button", name="Rewind").click()
    expect(page.locator(".turn")).to_have_count(3)
    expect(page.locator("#seen")).not_to_have_text(seen)
    assert len(server.texts("trunk")) == 3 and len(server.texts("branch")) == 5


def test_what_is_deleted_is_confirmed_first(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    begin(page, "old")
    for answer, gone in (("Cancel", False), ("Delete", True)):
        page.get_by_role("button", name="Delete old").click()
        page.get_by_role("dialog").get_by_role("button", name=answer).click()
        expect(page.get_by_role("button", name="Delete old")).to_have_count(0 if gone else 1)
    expect(page.locator("body")).to_contain_class("empty")
    assert "old" not in [s.name for s in server.agent.sessions()]


def test_a_reply_that_is_stopped_is_undone(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    begin(page, "halted")
    say(page, "My sister Ana lives in Porto.", 3)
    before = bar(page)
    page.get_by_label("Message", exact=True).fill(BOOK[:60_000])
    page.keyboard.press("Enter")
    expect(page.locator(".draft .facts")).to_contain_text("a compaction")  # it is at work
    assert bar(page) != before
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#notice")).to_have_text("Stopped; the turn was undone.")
    expect(page.locator(".turn")).to_have_count(3)
    assert bar(page) == before and len(server.texts("halted")) == 3
    assert page.get_by_label("Message", exact=True).input_value().startswith(BOOK[:100])
    say(page, "Where does my sister Ana live?", 5)
    assert "Porto" in texts(page)[-1]


def test_a_turn_goes_on_while_another_session_is_looked_at(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    begin(page, "aside")
    begin(page, "long")
    read(page, BOOK[:30_000])
    expect(page.locator("#log .fresh").first).to_be_visible()
    page.get_by_role("button", name=re.compile("^aside ")).click()
    expect(page.get_by_role("button", name="Stop “long”")).to_be_visible()
    expect(page.locator(".draft")).to_have_count(0)
    page.get_by_role("button", name=re.compile("^long ")).click()
    expect(page.locator(".draft .facts")).to_contain_text("reading…")
    seen = [re.findall(r"tokens ([\d,]*\d) to ([\d,]*\d)", label)[0] for label in bar(page)]
    assert [end for _, end in seen[:-1]] == [start for start, _ in seen[1:]]  # nothing was missed
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#notice")).to_have_text("Stopped; what was saved of the text stays.")
    expect(page.locator(".draft")).to_have_count(0)
    assert page.locator(".turn").count() == len(server.texts("long"))


def test_a_session_goes_on_after_a_reload_and_after_the_server_was_killed(
    tmp_path: Path, visit: Open
) -> None:
    with Process(tmp_path / "s.db", "--schedule", "tiered") as served:
        page = visit(f"{served.url}/")
        begin(page, "kept")
        say(page, "My sister Ana lives in Porto.", 3)
        drop(page, "notes.txt", BOOK[:6000])
        expect(page.locator(".turn[data-number='4']")).to_be_visible()
        shown, said = bar(page), texts(page)
        page.reload()
        expect(page.locator("#name")).to_have_text("kept")
        assert bar(page) == shown and texts(page) == said
        port = int(served.url.rpartition(":")[2])
        read(page, BOOK[6000:30_000])
        expect(page.locator("#log .fresh").first).to_be_visible()
    expect(page.locator("#notice")).to_contain_text("The connection broke off")
    expect(page.locator(".draft")).to_have_count(0)
    assert texts(page) == said
    question = "Where does my sister Ana live?"
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("The server does not answer")
    expect(page.get_by_label("Message", exact=True)).to_have_value(question)  # not lost
    with Process(tmp_path / "s.db", "--schedule", "tiered", port=port):
        page.keyboard.press("Enter")
        expect(page.locator(".turn.assistant").last).to_contain_text("Porto")
        expect(page.locator("#notice")).to_be_empty()
        page.goto("about:blank")


def test_errors_are_told_in_words(serve: Serve, visit: Open) -> None:
    server = serve(message_chars=50)
    page = visit(f"{server.url}/#no such session", allowed=(400, 404, 409))
    expect(page.locator("#notice")).to_contain_text("There is no such session")
    begin(page, "taken")
    page.get_by_role("button", name="New", exact=True).click()
    page.get_by_label("Name", exact=True).fill("taken")
    page.get_by_role("button", name="Begin").click()
    expect(page.locator("#notice")).to_contain_text("a session of that name")
    page.get_by_label("Message", exact=True).fill("much too long " * 10)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("50 are allowed")
    expect(page.locator(".turn")).to_have_count(1)


def test_no_name_and_no_text_is_ever_markup(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/", allowed=(409,))
    begin(page, HOSTILE, system=HOSTILE)
    say(page, HOSTILE, 3)
    assert texts(page)[:2] == [HOSTILE, HOSTILE]
    page.get_by_role("button", name="Fork after turn 2").click()
    page.get_by_label("Its name").fill(HOSTILE)
    page.get_by_role("dialog").get_by_role("button", name="Fork").click()
    expect(page.locator("#notice")).not_to_be_empty()  # the name is taken, which the error quotes
    page.get_by_role("button", name=f"Delete {HOSTILE}").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    page.get_by_role("button", name="Cancel").click()
    page.reload()
    expect(page.locator("#name")).to_have_text(HOSTILE)
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.title() == f"{HOSTILE} · Still Agent"


def test_the_policy_is_strict_and_files_come_from_the_page_alone(
    server: Served, browser: Browser
) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{server.url}/")
        with pytest.raises(Error, match="TrustedHTML"):  # text cannot become markup by any mistake
            page.evaluate("text => { document.body.innerHTML = text; }", HOSTILE)
    with server.http() as http:
        index = http.get("/")
        parts = re.findall(r'(?:src|href)="(/page/[^"]+)"', index.text)
        assert len(parts) == 3
        for path in ("/", *parts):
            found = http.get(path)
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            again = http.get(path, headers={"if-none-match": found.headers["etag"]})
            assert again.status_code == 304 and not again.content
        for path in ("/page/", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/app.py"):
            assert http.get(path).status_code == 404
        assert "://" not in index.text


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(serve: Serve, visit: Open) -> None:
    key, line = new_key("alice")
    digest = line.split('"')[-2]
    server = serve(Keys({"alice": [digest]}))
    page = visit(f"{server.url}/", allowed=(401,))
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    dialog.get_by_role("button", name="Use it").click()
    expect(page.locator("#notice")).to_contain_text("No API key, or a wrong one")
    page.get_by_role("button", name="API key").click()
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use it").click()
    begin(page, "mine")
    page.reload()
    expect(page.locator("#name")).to_have_text("mine")
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"still-key": key}, {}, ""] and key not in page.url
    another = visit(f"{server.url}/", allowed=(401,))
    expect(another.get_by_role("dialog", name="API key")).to_be_visible()
    expect(another.get_by_role("button", name="mine")).to_have_count(0)


def test_everything_can_be_done_with_the_keyboard(server: Served, visit: Open) -> None:
    page = visit(f"{server.url}/")
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            focused = page.evaluate(
                "document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"
            )
            if focused == name:
                return
        raise AssertionError(f"no {name!r}")

    tab_to("New")
    keys.press("Enter")
    keys.type("by keyboard")
    keys.press("Enter")
    expect(page.locator("#name")).to_have_text("by keyboard")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    keys.type("My sister Ana lives in Porto.")
    keys.press("Shift+Enter")
    keys.type("She is a baker.")
    keys.press("Enter")
    expect(page.locator(".turn[data-number='2']")).to_be_visible()
    assert texts(page)[0] == "My sister Ana lives in Porto.\nShe is a baker."
    tab_to(bar(page)[0])  # the bar is one stop, the arrows go on
    assert page.locator("#span").inner_text() == bar(page)[0]
    page.locator("#name").click()
    tab_to("Fork after turn 2")
    keys.press("Space")
    keys.press("Enter")
    expect(page.locator("#name")).to_have_text("by keyboard @2")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    tab_to("Rewind to turn 1")
    keys.press("Enter")
    tab_to("Rewind")
    keys.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    tab_to("Find a session")
    keys.type("by keyboard")
    expect(page.locator(".session")).to_have_count(2)
    keys.press("Tab")
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(page.locator("#name")).to_have_text("by keyboard")


def test_many_sessions_come_a_page_at_a_time_and_are_found_by_name(
    serve: Serve, visit: Open
) -> None:
    server = serve()
    first = server.agent.session("first")
    saved = first._saved
    for n in range(300):
        server.agent.store.create(
            f"Session {n:03}", server.agent.model.identity, checkpoint=saved, turns=(), settings={}
        )
    page = visit(f"{server.url}/")
    lines = page.locator(".session")
    expect(lines).to_have_count(50)
    page.locator("#sessions").evaluate("list => list.scrollTo(0, list.scrollHeight)")
    expect(lines).to_have_count(100)
    assert lines.nth(99).get_attribute("data-name") == "Session 200"
    page.get_by_label("Find a session").fill("SESSION 007")
    expect(lines).to_have_count(1)
    lines.click()
    expect(page.locator("#name")).to_have_text("Session 007")


def test_earlier_turns_of_a_long_session_come_when_asked_for(server: Served, visit: Open) -> None:
    chat = server.agent.session("chapters")
    for number in range(1, 71):
        chat.read(f"Chapter {number}.")
    page = visit(f"{server.url}/#chapters")
    expect(page.locator(".turn")).to_have_count(50)
    assert texts(page)[0] == "Chapter 21." and page.locator(".turn").last.is_visible()
    page.get_by_role("button", name="Earlier turns").click()
    expect(page.locator(".turn")).to_have_count(70)
    assert texts(page) == server.texts("chapters")
    expect(page.get_by_role("button", name="Earlier turns")).to_be_hidden()


def test_a_phone_and_the_dark_have_all_of_it(server: Served, visit: Open) -> None:
    phone = {"width": 360, "height": 720}
    page = visit(f"{server.url}/", viewport=phone, has_touch=True, color_scheme="dark")
    page.get_by_role("button", name="Sessions").tap()
    expect(page.get_by_label("Find a session")).to_be_in_viewport()
    begin(page, "pocket" * 20)
    expect(page.get_by_label("Find a session")).not_to_be_in_viewport()
    say(page, "My sister Ana lives in Porto.", 3)
    assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
    for name in ("Send", "Read a text", "Rewind to turn 2"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark))) < 60
