"""The web page against whole installations, in Debian's Chromium by Playwright: every view, hostile text, an outage."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from browser_kit import chromium
from command_line import CommandLine
from scripts import SALES, default_reply

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:  # pragma: no cover
    if os.environ.get("CI"):
        raise
    pytest.skip("Playwright is not installed.", allow_module_level=True)

pytestmark = [pytest.mark.browser, pytest.mark.sandbox]

AXE = (Path(__file__).parents[1] / "support" / "vendor" / "axe.min.js").read_text()
AXE_RUN = "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 860}
GOAL = "Write a Python function double(number) with tests"


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-quic"])
        yield browser
        browser.close()


@pytest.fixture
def page(opened: Browser) -> Iterator[Page]:
    context = opened.new_context(viewport={"width": 1280, "height": 860})
    found = context.new_page()
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    found.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    yield found
    context.close()
    # What a gateway answers, or does not, while it is killed and starts again.
    starting = ("503", "ERR_CONNECTION")
    assert [error for error in errors if not any(reason in error for reason in starting)] == []


def find_barriers(page: Page) -> list[tuple[object, ...]]:
    """Return what axe finds in light and dark, and whether the page is wider than a phone."""
    found: list[tuple[object, ...]] = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        violations: list[dict[str, Any]] = page.evaluate(AXE_RUN)
        found += [(page.url, scheme, each["id"], [node["html"][:160] for node in each["nodes"]]) for each in violations]
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
    return found if width <= PHONE["width"] else [*found, (page.url, "is wider than a phone", width)]


def test_a_person_visits_every_view_and_does_what_it_offers(shared_installation: Any, page: Page) -> None:
    shared_installation.script.reply = default_reply
    url = shared_installation.system.gateway_url
    barriers: list[tuple[object, ...]] = []
    page.on("dialog", lambda dialog: dialog.accept())
    page.add_init_script(AXE)
    page.goto(url)
    page.get_by_label("What should be done?").fill(GOAL)
    page.get_by_role("button", name="Start task").click()
    expect(page.locator("main .chip.completed").first).to_be_visible(timeout=60_000)
    expect(page.get_by_label("Plan")).to_contain_text("Accepted")
    expect(page.locator(".code").first).to_contain_text("def double")
    expect(page.get_by_role("meter", name="Tokens used")).to_be_visible()
    barriers += find_barriers(page)
    first = page.url.rpartition("/")[2]

    page.get_by_role("button", name="Look at").first.click()
    expect(page.locator(".code pre").first).to_be_visible()
    page.get_by_role("link", name="Trace").click()
    expect(page.locator(".waterfall li").nth(3)).to_be_visible()
    page.locator(".waterfall .name").first.click()
    expect(page.locator(".details")).to_be_visible()
    barriers += find_barriers(page)

    page.get_by_role("link", name="← Task").click()
    page.get_by_role("button", name="Run again").click()
    page.get_by_role("link", name="Compare with the run before").click()
    expect(page.get_by_role("heading", name="Two runs")).to_be_visible()
    expect(page.locator("table .chip.completed")).to_have_count(4, timeout=60_000)
    barriers += find_barriers(page)

    page.get_by_role("link", name="Tasks", exact=True).click()
    expect(page.locator(".task-rows li")).to_have_count(2)
    page.get_by_label("Search in goals").fill("no such goal")
    expect(page.get_by_text("No task matches.")).to_be_visible()
    page.get_by_label("Search in goals").fill("DOUBLE")
    expect(page.locator(".task-rows li")).to_have_count(2)
    page.get_by_label("Status").select_option("failed")
    expect(page.get_by_text("No task matches.")).to_be_visible()
    page.get_by_label("Status").select_option("completed")
    expect(page.locator(".task-rows li")).to_have_count(2)
    for box in page.get_by_role("checkbox").all():
        box.check()
    expect(page.get_by_role("link", name="Compare 2 of 2")).to_be_visible()
    assert "status=completed" in page.url, "the filter is in the address"
    barriers += find_barriers(page)

    with httpx.Client(base_url=url) as client:
        client.put("/subscriptions/billing", json={"patterns": ["events:task:*"], "start": "earliest"})
        client.post("/webhooks", json={"url": "https://receiver.example/x", "patterns": ["events:task:*"]})
    page.keyboard.press("Escape")
    page.locator("h1").first.click()
    page.keyboard.press("e")
    expect(page.locator(".feed li", has_text="task.completed").first).to_be_visible()
    barriers += find_barriers(page)
    page.get_by_role("link", name="Consumers").click()
    expect(page.get_by_role("cell", name="billing")).to_be_visible()
    page.get_by_role("link", name="Dead letters").click()
    expect(page.get_by_text("No dead letter")).to_be_visible()
    page.get_by_role("link", name="Webhooks").click()
    page.get_by_role("button", name="Send a test").click()
    expect(page.get_by_text("Not delivered")).to_be_visible()
    page.get_by_role("button", name="Deliveries").click()
    barriers += find_barriers(page)

    page.keyboard.press("c")
    page.get_by_role("button", name="Model", exact=True).click()
    expect(page.get_by_role("cell", name="openai:scripted")).to_be_visible()
    page.get_by_role("button", name="Arm", exact=True).click()
    expect(page.get_by_role("cell", name="coder")).to_be_visible()
    barriers += find_barriers(page)

    page.keyboard.press("k")
    page.get_by_placeholder("Name of a person or program").fill("build <b>server</b>")
    page.get_by_role("button", name="Create key").click()
    expect(page.get_by_text("it is not shown again")).to_be_visible()
    page.get_by_role("button", name="Revoke build <b>server</b>").click()
    expect(page.locator("tr.gone")).to_have_count(1)
    page.get_by_label("Name of the arm").fill("translator")
    page.get_by_role("button", name="Create token").click()
    expect(page.get_by_role("cell", name="translator", exact=True)).to_be_visible()
    barriers += find_barriers(page)

    page.keyboard.press("a")
    expect(page.locator(".feed li", has_text="key.revoked")).to_be_visible()
    barriers += find_barriers(page)
    page.get_by_role("link", name="Authority").click()
    expect(page.locator(".letters", has_text="key.added")).to_contain_text("join.made")
    barriers += find_barriers(page)

    page.get_by_role("link", name="Services", exact=True).click()
    expect(page.get_by_role("heading", name="Services")).to_be_visible()
    expect(page.get_by_role("list", name="Services").get_by_role("button")).to_have_count(10)
    barriers += find_barriers(page)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("New task")
    page.keyboard.press("Escape")
    page.goto(f"{url}/#/tasks/{first}")
    expect(page.locator("main .chip.completed").first).to_be_visible()
    assert barriers == []


HOSTILE = {
    "script": "<script>window.broken = 1</script>",
    "handler": "<img src=x onerror='window.broken = 2'>",
    "svg": "<svg onload='window.broken = 3'><a href='javascript:window.broken = 4'>x</a></svg>",
    "link": "[click](javascript:window.broken=5) <javascript:window.broken=6>",
    "template": "${window.broken = 7} {{constructor.constructor('window.broken = 8')()}} <%= 1 %>",
    "bidi": "invoice\u202efdp.exe \u2066hidden\u2069",
    "controls": "\u001b[31mred\u001b[0m \u001b]0;title\u0007 \u0008\u009b",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 e\u0301 \u0628\u0650\u0633\u0652\u0645",
    "line": "x" * 200_000,
    "markup": "</title></textarea></pre><style>body { display: none }</style><base href=//evil.example>",
}


def test_hostile_text_in_goals_names_and_output_stays_text(shared_installation: Any, page: Page) -> None:
    whole = "\n\n".join(HOSTILE.values())

    def reply(asked: ScriptedRequest) -> str | ScriptedReply:
        found = default_reply(asked)
        return whole if found == "The service retries a failed call three times." else found

    shared_installation.script.reply = reply
    url = shared_installation.system.gateway_url
    short = " ".join(text for name, text in HOSTILE.items() if name != "line")
    files = [{"name": f"{text[:60].replace('/', ' ')}.csv", "text": SALES} for text in ("<b>bold</b>", HOSTILE["bidi"])]
    with httpx.Client(base_url=url, timeout=30) as client:
        made = client.post("/tasks", json={"goal": "Write a text: " + short, "context": {"files": files[:1]}})
        assert made.status_code == 201, made.text
        task_id = made.json()["task_id"]
        page.goto(f"{url}/#/tasks/{task_id}")
        expect(page.locator("main .chip.completed, main .chip.failed").first).to_be_visible(timeout=60_000)
        shown = page.locator(".goal-text").inner_text()
    assert HOSTILE["script"] in shown
    assert "invoice⟨U+202E⟩fdp.exe" in shown, "what turns the direction is shown as its code point"
    assert "⟨U+001B⟩[31mred" in shown
    assert HOSTILE["emoji"][:11] in shown, "joined emoji stay joined"
    page.get_by_text("What happened").click()
    for address in (f"#/tasks/{task_id}/trace", "#/tasks", "#/events", f"#/compare/{task_id}/{task_id}", "#/audit"):
        page.goto(f"{url}/{address}")
        expect(page.locator("main h1").first).to_be_visible()
        assert page.evaluate("window.broken") is None
        assert page.evaluate("document.querySelectorAll('main img, main base, main style, main script').length") == 0
        assert page.evaluate("[...document.querySelectorAll('a[href]')].every((a) => /^http/.test(a.protocol))")
        assert "\u202e" not in page.locator("main").inner_text()


def test_the_page_goes_on_when_the_gateway_was_killed(tmp_path: Path, page: Page) -> None:
    model = scripted_model(default_reply)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(model) as replies:
        line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": replies.url})
        process = portal.call(line.up)
        try:
            page.goto(line.gateway_url + "/#/tasks")
            expect(page.get_by_text("There is no task yet.")).to_be_visible()
            os.kill(process.pid, signal.SIGKILL)
            portal.call(process.wait)
            expect(page.get_by_text("The server cannot be reached.").first).to_be_visible(timeout=30_000)
            process = portal.call(line.up)
            expect(page.locator(".offline")).to_have_count(0, timeout=30_000)
            expect(page.get_by_text("There is no task yet.")).to_be_visible()
        finally:
            if process.returncode is None:
                portal.call(line.interrupt, process)
