"""The page in a real browser: it runs under its policy, submits, watches, goes on after a cut, cancels."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from browser_kit import Tab, browser
from door_kit import KEY, TASK, Doorway, doorway, json_answer

pytestmark = pytest.mark.browser


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    async with browser(tmp_path / "profile") as opened:
        yield opened


def prepare(door: Doorway) -> None:
    summary = {
        "task_id": TASK,
        "status": "running",
        "goal": "a goal",
        "progress": 10,
        "created_at": "2025-11-10T10:30:00Z",
        "updated_at": "",
    }
    door.script.answers["GET", "/tasks"] = json_answer({"tasks": [summary], "cursor": None})
    created = msgspec.to_builtins(door.script.view())
    door.script.answers["POST", "/tasks"] = json_answer(created, 201)
    door.script.answers["POST", "/files"] = json_answer({"digest": "d" * 64}, 201)


def troubles(tab: Tab) -> list[str]:
    """Return what went wrong in the page; that the other services are absent here is told by /ready as 503."""
    return [error for error in tab.errors if "503" not in error and "401" not in error]


async def plan(door: Doorway) -> None:
    steps = [
        {"step": "s1", "title": "First", "arm": "coder", "depends_on": []},
        {"step": "s2", "title": "Second", "arm": "retriever", "depends_on": ["s1"]},
    ]
    await door.script.emit("task.planned", steps=steps, progress=5)
    await door.script.emit("task.started", progress=5)
    await door.script.emit("step.started", step="s1", title="First", arm="coder", attempt=1, run=1)


async def write(door: Doorway, text: str, offset: int, *, reset: bool = False) -> None:
    await door.script.stream.append(TASK, step="s1", attempt=1, run=1, offset=offset, text=text, reset=reset)


async def test_a_goal_with_a_file_is_submitted_and_watched_to_its_end(door: Doorway, tab: Tab, tmp_path: Path) -> None:
    prepare(door)
    await door.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=door.url("/"))
    await tab.until("document.querySelector('#goal-input')", "the form is there")
    file = tmp_path / "résumé.csv"
    file.write_text("a,b\n1,2\n")
    root = (await tab.do("DOM.getDocument"))["root"]["nodeId"]
    node = (await tab.do("DOM.querySelector", nodeId=root, selector="input[type=file]"))["nodeId"]
    await tab.do("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
    await tab.until("document.querySelector('.files li')", "the file is listed")
    await tab.run("document.querySelector('#goal-input').focus()")
    await tab.do("Input.insertText", text="a goal <b>with</b> markup")
    await tab.run("document.querySelector('form button.primary').click()")
    await tab.until(f"location.hash === '#/tasks/{TASK}'", "the task is shown")

    upload = next(seen for seen in door.script.seen if seen.path == "/files")
    assert (upload.headers["x-file-name"], upload.body) == ("r%C3%A9sum%C3%A9.csv", b"a,b\n1,2\n")
    submitted = next(seen for seen in door.script.seen if (seen.method, seen.path) == ("POST", "/tasks"))
    assert json.loads(submitted.body) == {
        "goal": "a goal <b>with</b> markup",
        "context": {"files": [{"name": "résumé.csv", "digest": "d" * 64}]},
    }
    assert submitted.headers["idempotency-key"]

    await plan(door)
    await write(door, "writing <script>alert(1)</script> ", 0, reset=True)
    await tab.until("document.querySelector('.live')?.innerText.includes('<script>')", "the text streams, as text")
    assert await tab.run("document.querySelectorAll('.graph a').length") == 2
    await door.script.emit("step.failed", step="s1", attempt=1, reasons=["too short"], final=False)
    await tab.until("document.querySelector('.verdict')?.innerText.includes('too short')", "the reasons are shown")
    door.script.progress = 100
    await door.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    await tab.until("document.querySelector('.goal-text') && document.querySelector('main .chip.completed')", "the end")
    assert await tab.run("document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')") == "100"
    assert troubles(tab) == []


async def test_the_page_goes_on_where_it_was_cut_off(door: Doorway, tab: Tab) -> None:
    prepare(door)
    await door.script.emit("task.accepted", goal="a goal", progress=0)
    await plan(door)
    await write(door, "one 🐙 ", 0, reset=True)
    await tab.do("Page.navigate", url=door.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('.live')?.innerText.includes('one')", "the text is there")
    door.service.context.draining.set()
    await tab.until("document.querySelector('main').innerText.includes('reconnecting')", "the socket is closed")
    await write(door, "two ", 6)
    await door.script.emit("task.progress", progress=50)
    door.service.context.draining.clear()
    await write(door, "three", 10)
    await tab.until("document.querySelector('.live').innerText === 'one 🐙 two three'", "nothing lost or doubled")
    await tab.until(
        "document.querySelector('[role=progressbar]').getAttribute('aria-valuenow') === '50'", "the progress"
    )
    assert troubles(tab) == []


async def test_a_task_is_cancelled(door: Doorway, tab: Tab) -> None:
    prepare(door)
    await door.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=door.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('button.danger')", "the button is there")
    await tab.run("window.confirm = () => true; document.querySelector('button.danger').click()")
    await tab.until("document.querySelector('main .chip.cancelled')", "the task is cancelled")
    assert door.script.status == "cancelled"


async def test_where_nobody_is_trusted_the_page_asks_for_a_key(tmp_path: Path, tab: Tab) -> None:
    session = "octosess_" + "0" * 32 + "_secret"
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        opened = {"session": session, "expires_in": 43200, "tenant": "acme", "scope": "tasks:*"}
        door.script.answers["POST", "/sessions"] = json_answer(opened)
        door.script.answers["POST", "/sessions/end"] = json_answer({"status": "ok"})
        door.script.answers["GET", "/sessions/issuers"] = json_answer({"issuers": []})
        await door.script.emit("task.accepted", goal="a goal", progress=0)
        await plan(door)
        await tab.do("Page.navigate", url=door.url(f"/#/tasks/{TASK}"))
        await tab.until("document.querySelector('#key')", "a key is asked for")
        await tab.run("document.querySelector('#key').focus()")
        await tab.do("Input.insertText", text=KEY)
        door.script.keys[session] = "user"
        await tab.run("document.querySelector('#key').form.querySelector('button').click()")
        await tab.until("document.querySelector('.step.running')", "the task is watched")
        kept = await tab.run("document.cookie + JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
        assert kept == "{}{}", "scripts see nothing of it"
        await write(door, "streamed", 0, reset=True)
        await tab.until("document.querySelector('.live')?.innerText.includes('streamed')", "the text streams")
        assert KEY not in await tab.run("location.href")
        await door.script.emit("task.cancelled", status="cancelled", progress=5)
        await tab.until("document.querySelector('main .chip.cancelled')", "the end is told")
        await tab.until("document.querySelector('header.top > button')?.innerText === 'Log out'", "one can log out")
        await tab.run("document.querySelector('header.top > button').click()")
        await tab.until("document.querySelector('#key')", "a key is asked for again")
        assert troubles(tab) == []


async def test_everything_has_a_name_and_fits_a_phone(door: Doorway, tab: Tab) -> None:
    prepare(door)
    await door.script.emit("task.accepted", goal="a goal " * 40, progress=0)
    await plan(door)
    await tab.size(360, 740, mobile=True)
    await tab.do("Page.navigate", url=door.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('.step')", "the task is shown")
    assert await tab.run("document.documentElement.scrollWidth <= 360")
    tree = (await tab.do("Accessibility.getFullAXTree"))["nodes"]
    controls = [
        node
        for node in tree
        if not node["ignored"] and node["role"]["value"] in ("button", "link", "textbox", "progressbar", "spinbutton")
    ]
    nameless = [node["role"] for node in controls if not node.get("name", {}).get("value")]
    assert len(controls) >= 6
    assert nameless == []
    assert await tab.run("document.querySelectorAll('[aria-live=polite]').length") == 1


async def test_where_the_time_went_is_shown_as_text_and_bars(door: Doorway, tab: Tab) -> None:
    prepare(door)
    whole = {"trace_id": "t", "start": 100.0, "duration_ms": 2000.0, "code": "", "message": "", "attributes": {}}
    call = {**whole, "span_id": "b", "parent_id": "a", "service": "orchestrator", "name": "x", "kind": "client"}
    served = {**whole, "span_id": "c", "parent_id": "b", "service": "coder", "kind": "server", "code": "not_accepted"}
    spans = [
        {**whole, "span_id": "a", "parent_id": "", "service": "orchestrator", "name": "task", "kind": "internal"},
        call,
        {**served, "name": "<b>execute</b>"},
        {**served, "span_id": "d", "parent_id": "a", "code": "", "name": "kept", "attributes": {"octollm.peer": "x"}},
    ]
    door.script.answers["GET", f"/tasks/{TASK}/trace"] = json_answer({"task_id": TASK, "spans": spans})
    await door.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=door.url(f"/#/tasks/{TASK}"))
    panel = "[...document.querySelectorAll('details')].find((d) => d.textContent.includes('Where the time went'))"
    await tab.until(panel, "the panel is there")
    await tab.run(f"{panel}.open = true")
    await tab.until("document.querySelectorAll('.trace li').length === 2", "a call and its serving are one line")
    assert await tab.run("[...document.querySelectorAll('.trace .what')].map((e) => e.innerText).join('; ')") == (
        "orchestrator task; coder <b>execute</b> · not_accepted"
    )
    assert await tab.run("document.querySelector('.trace .when i').style.width") == "100%"
    assert troubles(tab) == []
