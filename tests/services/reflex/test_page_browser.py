"""The page in a real browser: it runs under its policy, submits, watches, goes on after a cut, cancels."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser_kit import Tab, open_tab, running_chromium
from gateway_kit import KEY, LOCAL_KEY, TASK, GatewayHarness, json_answer, start_gateway
from starlette.requests import Request
from starlette.responses import Response

from octollm.contracts.api import EventList, StepView
from octollm.contracts.approvals import ApprovalView
from octollm.contracts.dashboard import Changes, DashboardTask
from octollm.contracts.events import Event
from octollm.contracts.operations import Passage, SearchResult
from octollm.contracts.task import Assumption, Citation, Evidence, FileRef, TaskStatus
from octollm.storage import RedisKeys
from octollm.testing import wait_until

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_chromium(tmp_path_factory.mktemp("chromium") / "profile") as address:
        yield address


@pytest.fixture
async def tab(devtools: str) -> AsyncIterator[Tab]:
    async with open_tab(devtools) as opened:
        yield opened


def prepare(gateway: GatewayHarness) -> None:
    summary = {
        "task_id": TASK,
        "status": "running",
        "goal": "a goal",
        "progress": 10,
        "created_at": "2025-11-10T10:30:00Z",
        "updated_at": "",
    }
    gateway.script.answers["GET", "/tasks"] = json_answer({"tasks": [summary], "cursor": None})
    created = msgspec.to_builtins(gateway.script.view())
    gateway.script.answers["POST", "/tasks"] = json_answer(created, 201)
    gateway.script.answers["POST", "/files"] = json_answer({"digest": "d" * 64}, 201)


def troubles(tab: Tab) -> list[str]:
    """Return what went wrong in the page; that the other services are absent here is told by /ready as 503."""
    return [error for error in tab.errors if "503" not in error]


async def plan(gateway: GatewayHarness) -> None:
    steps = [
        {"step": "s1", "title": "First", "arm": "coder", "depends_on": []},
        {"step": "s2", "title": "Second", "arm": "retriever", "depends_on": ["s1"]},
    ]
    await gateway.script.emit("task.planned", steps=steps, progress=5)
    await gateway.script.emit("task.started", progress=5)
    await gateway.script.emit("step.started", step="s1", title="First", arm="coder", attempt=1, run=1)


async def write(gateway: GatewayHarness, text: str, offset: int, *, reset: bool = False) -> None:
    await gateway.script.stream.append(TASK, step="s1", attempt=1, run=1, offset=offset, text=text, reset=reset)


async def test_a_goal_with_a_file_is_submitted_and_watched_to_its_end(
    gateway: GatewayHarness, tab: Tab, tmp_path: Path
) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=gateway.url("/"))
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

    upload = next(seen for seen in gateway.script.seen if seen.path == "/files")
    assert (upload.headers["x-file-name"], upload.body) == ("r%C3%A9sum%C3%A9.csv", b"a,b\n1,2\n")
    submitted = next(seen for seen in gateway.script.seen if (seen.method, seen.path) == ("POST", "/tasks"))
    assert json.loads(submitted.body) == {
        "goal": "a goal <b>with</b> markup",
        "context": {"files": [{"name": "résumé.csv", "digest": "d" * 64}]},
    }
    assert submitted.headers["idempotency-key"]

    await plan(gateway)
    await write(gateway, "writing <script>alert(1)</script> ", 0, reset=True)
    await tab.until("document.querySelector('.live')?.innerText.includes('<script>')", "the text streams, as text")
    assert await tab.run("document.querySelectorAll('.graph a').length") == 2
    await gateway.script.emit("step.failed", step="s1", attempt=1, reasons=["too short"], final=False)
    await tab.until("document.querySelector('.verdict')?.innerText.includes('too short')", "the reasons are shown")
    gateway.script.progress = 100
    await gateway.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    await tab.until("document.querySelector('.goal-text') && document.querySelector('main .chip.completed')", "the end")
    assert await tab.run("document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')") == "100"
    assert troubles(tab) == []


async def test_the_person_at_the_page_approves_with_a_comment(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('main .chip.accepted')", "the task is shown")
    reason = "It deletes <b>everything</b>."
    approval = ApprovalView("s1", "step", reason, "pending", "2025-11-10T10:30:00Z", "2099-11-10T10:30:00Z", step="s1")
    gateway.script.approvals = (approval,)
    await gateway.script.emit(
        "task.waiting", reason=reason, status="waiting", approvals=[msgspec.to_builtins(approval)], progress=10
    )
    await tab.until("document.querySelector('[aria-labelledby=approval]')", "the person is asked")
    shown = await tab.run("document.querySelector('[aria-labelledby=approval]').innerText")
    assert reason in shown, "as text, not as markup"
    await tab.run("document.querySelector('#approval-comment').focus()")
    await tab.do("Input.insertText", text="Go ahead.")
    await tab.run("document.querySelector('[aria-labelledby=approval] button.primary').click()")
    await tab.until("!document.querySelector('[aria-labelledby=approval]')", "nothing is left to approve")
    assert gateway.script.decisions == [{"decision": "approve", "approval_id": "s1", "comment": "Go ahead."}]
    assert troubles(tab) == []


async def test_the_person_at_the_page_pauses_a_task_adds_an_instruction_and_skips_a_step(
    gateway: GatewayHarness, tab: Tab
) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await plan(gateway)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('main .chip.running')", "the task runs")
    await tab.run("[...document.querySelectorAll('button')].find((each) => each.innerText === 'Pause').click()")
    await wait_until(lambda: steered(gateway) == [("pause", b"")], description="the task is paused")
    await gateway.script.emit("task.paused", by="ada", status="paused", progress=10)
    await tab.until("document.querySelector('main .chip.paused')", "it shows as paused")
    await tab.run("document.querySelector('#instruction').focus()")
    await tab.do("Input.insertText", text="Keep it <b>short</b>.")
    await tab.run("document.querySelector('[aria-label=\"Steer this task\"] form button').click()")
    await wait_until(lambda: len(steered(gateway)) == 2, description="the instruction is sent")
    assert steered(gateway)[1] == ("instructions", b'{"text":"Keep it <b>short</b>."}')
    await gateway.script.emit("task.instructed", by="ada", text="Keep it <b>short</b>.", number=1, progress=10)
    await tab.until("document.body.innerText.includes('Resume')", "it can be resumed")
    step = await tab.run("document.querySelector('#skip-step').value")
    await tab.run("document.querySelector('#skip-step').form.requestSubmit()")
    await wait_until(lambda: len(steered(gateway)) == 3, description="the step is skipped")
    assert steered(gateway)[2] == ("skip", msgspec.json.encode({"step": step}))
    await gateway.script.emit("step.skipped", step=step, by="ada", status="paused", progress=10)
    await tab.until("document.querySelector('article.step.skipped')", "it shows as skipped")
    assert troubles(tab) == []


def steered(gateway: GatewayHarness) -> list[tuple[str, bytes]]:
    """Return what was done to the task, and with which body."""
    return [(each.path.rpartition("/")[2], each.body) for each in gateway.script.seen if each.method == "POST"]


async def finish(gateway: GatewayHarness, tab: Tab, output: str, evidence: Evidence, *, found: bool = True) -> None:
    """Show a task of one step that has ended with this result."""
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    steps = [{"step": "s1", "title": "First", "arm": "coder", "depends_on": []}]
    await gateway.script.emit("task.planned", steps=steps, progress=5)
    await gateway.script.emit("step.started", step="s1", title="First", arm="coder", attempt=1, run=1)
    await gateway.script.emit("step.completed", step="s1", score=1.0, reasons=[], text_length=0, progress=90)
    await gateway.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    view = msgspec.structs.replace(
        gateway.script.view(),
        output=output,
        found=found,
        steps=(StepView("s1", "First", "coder", "completed", 1, output=output, evidence=evidence),),
        files=(FileRef("offer.pdf", digest="d" * 64),),
        progress=100.0,
    )
    gateway.script.answers["GET", f"/tasks/{TASK}"] = json_answer(view)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('[aria-labelledby=result] .cites, [aria-labelledby=result] .notice, "
                    "[aria-labelledby=result] .verdict')", "the result and its evidence are there")  # fmt: skip


def result_text(tab: Tab) -> Awaitable[Any]:
    return tab.run("document.querySelector('[aria-labelledby=result]').innerText")


async def test_a_citation_opens_the_passage_of_its_source(gateway: GatewayHarness, tab: Tab) -> None:
    lines = "Delivery\nThe stations <b>arrive</b> in six weeks.\nThe harbour is open."
    passage = Passage("offer.pdf", "d" * 64, 11, 13, lines, 1.0, "page 3", ("words",))
    gateway.script.answers["POST", "/search"] = json_answer(SearchResult((passage,)))
    cite = Citation("offer.pdf", 12, 12, "The stations <b>arrive</b> in six weeks.", "page 3")
    await finish(gateway, tab, "In six weeks.\n\n[offer.pdf, page 3]", Evidence("documents", citations=(cite,)))
    await tab.run("document.querySelector('.cites summary').click()")
    await tab.until("document.querySelector('.passage li.cited')", "the passage is open")
    assert await tab.run("document.querySelector('.cites summary').innerText") == "offer.pdf, page 3"
    shown = await tab.run("[...document.querySelectorAll('.passage li')].map((line) => line.innerText)")
    assert shown[0].split() == ["11", "Delivery"]
    assert await tab.run("document.querySelector('.passage li.cited').innerText.includes('<b>arrive</b>')"), "as text"
    asked = json.loads(next(seen.body for seen in gateway.script.seen if seen.path == "/search"))
    assert asked["filters"] == {"digests": ["d" * 64]}
    assert troubles(tab) == []


async def test_a_source_that_was_erased_is_said_to_be_gone(gateway: GatewayHarness, tab: Tab) -> None:
    gateway.script.answers["POST", "/search"] = json_answer(SearchResult(()))
    cite = Citation("offer.pdf", 12, 12, "In six weeks.", "page 3")
    await finish(gateway, tab, "In six weeks.", Evidence("documents", citations=(cite,)))
    await tab.run("document.querySelector('.cites summary').click()")
    await tab.until(
        "document.querySelector('.cites .notice')?.innerText.includes('not in memory any more')", "it says so"
    )


async def test_assumptions_and_doubts_stand_with_the_result(gateway: GatewayHarness, tab: Tab) -> None:
    read = Assumption("amount: read 1.234 as 1,234 (decimal comma elsewhere in the file)", "konto", "amount")
    undecided = Assumption("day: 03/04/2024 may be in March", "konto", "day", decided=False)
    note = "not certain, check it: The question names the column tax, but the query does not read it."
    evidence = Evidence("data", query="SELECT 1", rows=1, assumptions=(read, undecided), notes=(note,))
    await finish(gateway, tab, "sum: 1234", evidence)
    text = await result_text(tab)
    assert "read 1.234 as 1,234" in text
    assert "Not decided by the file, so the answer may be wrong\nday: 03/04/2024" in text
    assert "Not certain\nThe question names the column tax" in text
    assert "Not found" not in text


async def test_a_goal_without_an_answer_is_said_to_be_not_found(gateway: GatewayHarness, tab: Tab) -> None:
    await finish(gateway, tab, "Not found: no passage has it.", Evidence("documents", found=False), found=False)
    assert "Not found. The files do not have what the goal asks for." in await result_text(tab)
    assert troubles(tab) == []


async def test_history_does_not_take_back_what_the_task_is_already(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    view = msgspec.structs.replace(gateway.script.view(), status="completed", output="Done.", version=9, progress=100.0)
    gateway.script.answers["GET", f"/tasks/{TASK}"] = json_answer(view)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('[aria-labelledby=result]')", "the result is there")
    await gateway.script.emit("task.started", progress=5)
    await gateway.script.emit("task.progress", progress=50, note={"code": "late", "detail": "the history was read"})
    await tab.until("document.querySelector('main').innerText.includes('the history was read')", "the history was read")
    assert "Done." in await result_text(tab)


async def test_the_page_goes_on_where_it_was_cut_off(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await plan(gateway)
    await write(gateway, "one 🐙 ", 0, reset=True)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('.live')?.innerText.includes('one')", "the text is there")
    gateway.service.context.draining.set()
    await tab.until("document.querySelector('main').innerText.includes('reconnecting')", "the socket is closed")
    await write(gateway, "two ", 6)
    await gateway.script.emit("task.progress", progress=50)
    gateway.service.context.draining.clear()
    await write(gateway, "three", 10)
    await tab.until("document.querySelector('.live').innerText === 'one 🐙 two three'", "nothing lost or doubled")
    await tab.until(
        "document.querySelector('[role=progressbar]').getAttribute('aria-valuenow') === '50'", "the progress"
    )
    assert troubles(tab) == []


async def test_the_tasks_change_as_they_are_watched(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    gateway.script.keys[LOCAL_KEY] = "tasks:read events:read"

    def task(number: int, status: TaskStatus, progress: float) -> DashboardTask:
        made = f"2025-11-10T10:30:0{number}.000Z"
        return DashboardTask(f"task-{number}", status, f"goal {number}", progress, 1, made, made)

    def changes(request: Request) -> Response:
        part = Changes("", ("tasks",), 1, (task(2, "running", 10), task(1, "completed", 100)))
        if request.query_params.get("after") == "1":
            part = Changes("", ("tasks",), 2, (task(2, "running", 70), task(3, "accepted", 0)), ("task-1",))
        elif "after" in request.query_params:
            part = Changes("", ("tasks",), 2)
        return Response(msgspec.json.encode(part), media_type="application/json")

    gateway.script.answers["GET", "/dashboard/changes"] = changes
    await tab.do("Page.navigate", url=gateway.url("/#/tasks"))
    await tab.until("document.querySelectorAll('.task-rows li').length === 2", "the tasks are there")
    assert gateway.script.redis is not None
    # A hint without a known tenant makes every feed look again.
    await gateway.script.redis.publish([(RedisKeys().log, b"changed")])
    rows = "[...document.querySelectorAll('.task-rows li')].map((row) => row.querySelector('a').innerText).join()"
    await tab.until(f"{rows} === 'goal 3,goal 2'", "one is new, one matches no more")
    assert "70 %" in await tab.run("document.querySelectorAll('.task-rows li')[1].textContent")
    assert troubles(tab) == []


async def test_events_begin_with_the_newest_and_go_back(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    gateway.script.keys[LOCAL_KEY] = "tasks:read events:read"
    gateway.script.answers["GET", "/dashboard/events"] = json_answer(Changes("", ("events",), 1200))
    asked: list[int] = []

    def events(request: Request) -> Response:
        after = int(request.query_params["after"])
        asked.append(after)
        found = [
            Event("task.progress", "2025-11-10T10:30:00.000Z", "orchestrator", {}, f"id-{seq}", "t", f"e{seq}", seq=seq)
            for seq in range(after + 1, min(after + 500, 1200) + 1)
        ]
        return Response(msgspec.json.encode(EventList(tuple(found), after)), media_type="application/json")

    gateway.script.answers["GET", "/events"] = events
    await tab.do("Page.navigate", url=gateway.url("/#/events"))
    await tab.until("document.querySelectorAll('.feed li').length === 500", "the newest are there")
    assert asked == [700]
    ends = "[...document.querySelectorAll('.feed li summary span')].map((s) => s.textContent)"
    assert (await tab.run(f"{ends}[0]"), await tab.run(f"{ends}.at(-1)")) == ("e1200", "e701")
    for count in (1000, 1200):
        await tab.run("[...document.querySelectorAll('button')].find((b) => b.innerText === 'Show earlier').click()")
        await tab.until(f"document.querySelectorAll('.feed li').length === {count}", "earlier ones are there")
    assert (asked, await tab.run(f"{ends}.at(-1)")) == ([700, 200, 0], "e1")
    assert not await tab.run("document.querySelector('main').innerText.includes('Show earlier')"), "there are no others"
    assert troubles(tab) == []


async def test_a_task_is_cancelled(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    await tab.until("document.querySelector('button.danger')", "the button is there")
    await tab.run("window.confirm = () => true; document.querySelector('button.danger').click()")
    await tab.until("document.querySelector('main .chip.cancelled')", "the task is cancelled")
    assert gateway.script.status == "cancelled"


async def test_where_nobody_is_trusted_the_page_asks_for_a_key(tmp_path: Path, tab: Tab) -> None:
    session = "octosess_" + "0" * 32 + "_secret"
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        opened = {"session": session, "expires_in": 43200, "tenant": "acme", "scope": "tasks:*"}
        gateway.script.answers["POST", "/sessions"] = json_answer(opened)
        gateway.script.answers["POST", "/sessions/end"] = json_answer({"status": "ok"})
        gateway.script.answers["GET", "/sessions/issuers"] = json_answer({"issuers": []})
        await gateway.script.emit("task.accepted", goal="a goal", progress=0)
        await plan(gateway)
        await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
        await tab.until("document.querySelector('#key')", "a key is asked for")
        await tab.run("document.querySelector('#key').focus()")
        await tab.do("Input.insertText", text=KEY)
        gateway.script.keys[session] = "user"
        await tab.run("document.querySelector('#key').form.querySelector('button').click()")
        await tab.until("document.querySelector('.step.running')", "the task is watched")
        kept = await tab.run("document.cookie + JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
        assert kept == "{}{}", "scripts see nothing of it"
        await write(gateway, "streamed", 0, reset=True)
        await tab.until("document.querySelector('.live')?.innerText.includes('streamed')", "the text streams")
        assert KEY not in await tab.run("location.href")
        await gateway.script.emit("task.cancelled", status="cancelled", progress=5)
        await tab.until("document.querySelector('main .chip.cancelled')", "the end is told")
        await tab.until("document.querySelector('header.top > button')?.innerText === 'Log out'", "one can log out")
        await tab.run("document.querySelector('header.top > button').click()")
        await tab.until("document.querySelector('#key')", "a key is asked for again")
        assert [error for error in troubles(tab) if "401" not in error] == []


async def test_everything_has_a_name_and_fits_a_phone(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    await gateway.script.emit("task.accepted", goal="a goal " * 40, progress=0)
    await plan(gateway)
    await tab.size(360, 740, mobile=True)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
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


async def test_where_the_time_went_is_shown_as_text_and_bars(gateway: GatewayHarness, tab: Tab) -> None:
    prepare(gateway)
    whole = {"trace_id": "t", "start": 100.0, "duration_ms": 2000.0, "code": "", "message": "", "attributes": {}}
    call = {**whole, "span_id": "b", "parent_id": "a", "service": "orchestrator", "name": "x", "kind": "client"}
    served = {**whole, "span_id": "c", "parent_id": "b", "service": "coder", "kind": "server", "code": "not_accepted"}
    spans = [
        {**whole, "span_id": "a", "parent_id": "", "service": "orchestrator", "name": "task", "kind": "internal"},
        call,
        {**served, "name": "<b>execute</b>"},
        {**served, "span_id": "d", "parent_id": "a", "code": "", "name": "kept", "attributes": {"octollm.peer": "x"}},
    ]
    gateway.script.answers["GET", f"/tasks/{TASK}/trace"] = json_answer({"task_id": TASK, "spans": spans})
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    await tab.do("Page.navigate", url=gateway.url(f"/#/tasks/{TASK}"))
    panel = "[...document.querySelectorAll('details')].find((d) => d.textContent.includes('Where the time went'))"
    await tab.until(panel, "the panel is there")
    await tab.run(f"{panel}.open = true")
    await tab.until("document.querySelectorAll('.trace li').length === 2", "a call and its serving are one line")
    assert await tab.run("[...document.querySelectorAll('.trace .what')].map((e) => e.innerText).join('; ')") == (
        "orchestrator task; coder <b>execute</b> · not_accepted"
    )
    assert await tab.run("document.querySelector('.trace .when i').style.width") == "100%"
    assert troubles(tab) == []
