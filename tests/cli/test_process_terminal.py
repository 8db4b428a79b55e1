"""Commands on a real terminal: the live tree of a run, and approvals asked there or decided at another one."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from command_line import GOAL
from scripts import default_reply
from terminal_kit import terminal

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply

pytestmark = pytest.mark.sandbox


INTERACTIVE = {"NO_COLOR": "", "CI": ""}
HOSTILE = "# \x1b]0;owned\x07 \x1b[2J\x9b31m \u202eevil\n"


def writes_hostile_code(asked):
    found = default_reply(asked)
    # One character at a time: no escape sequence arrives whole.
    return found if found.startswith("{") else ScriptedReply(f"```python\n{HOSTILE}", hangs=True, chunk_size=1)


async def test_a_run_is_a_live_tree_that_fits_the_terminal_and_is_not_controlled_by_a_model(shared_command_line):
    shared_command_line.script.reply = writes_hostile_code
    shared_command_line.settings |= INTERACTIVE
    async with terminal(shared_command_line, "run", GOAL) as shell:
        await shell.see("Do the work", "coder", "␛]0;owned␇ ␛[2J", "evil", "running", "tokens (", "USD", "left")
        assert "\x1b]" not in shell.shown
        assert not {"\x07", "\x9b", "\u202e"} & set(shell.shown)
        assert "\x1b[2J" not in shell.shown
        assert shell.screen.title == ""
        shell.resize(50, 12)
        await shell.see("└─", "coder", "running")
        shell.resize(20, 3)
        await shell.see("%  running")
        shell.resize(100, 30)
        await shell.see("Do the work", "␛]0;owned␇", "left")
        shell.press("\x03")
        assert await shell.end() == 130
    assert "Stopping" in shell.shown
    assert not shell.screen.cursor.hidden
    assert "Traceback" not in shell.shown


async def test_an_approval_is_asked_below_the_tree_which_then_goes_on(shared_command_line):
    shared_command_line.settings |= INTERACTIVE
    async with terminal(shared_command_line, "run", GOAL, "--approve", "plan", lines=80) as shell:
        await shell.see("└─ ○ ", "Do the work", "y approves, n rejects")
        shell.type("y Fine.")
        await shell.expect("approved by")
        assert await shell.end() == 0
        await shell.see("└─ ✓ ", "completed", "Task completed in", "Result")
    assert not shell.screen.cursor.hidden


async def test_top_shows_services_and_open_tasks_until_q_and_in_a_pipe_once(shared_command_line):
    shared_command_line.script.reply = writes_hostile_code
    shared_command_line.settings |= INTERACTIVE
    async with (
        terminal(shared_command_line, "run", f"\x1b[2J {GOAL}") as running,
        terminal(shared_command_line, "top", lines=40) as shell,
    ):
        await shell.see("reflex", "judge", "up", "1 running", "␛[2J Write", "q quits")
        shell.resize(60, 12)
        await shell.see("OctoLLM  1 running", "more")
        shell.press("x")
        once = await shared_command_line.run("top")
        assert (once.code, "\x1b" in once.out) == (0, False), once.err
        assert "reflex" in once.out
        assert f"␛[2J {GOAL}" in once.out
        listed = json.loads((await shared_command_line.run("top", "--json")).out)
        assert [task["status"] for task in listed["tasks"]] == ["running"]
        assert {service["service"]: service["state"] for service in listed["services"]}["judge"] == "up"
        shell.press("q")
        assert await shell.end() == 0
        running.press("\x03")
        assert await running.end() == 130
    assert not shell.screen.cursor.hidden
    assert shell.shown.rstrip().endswith(("\x1b[?1049l", "\x1b[?25h"))


async def test_the_person_at_the_terminal_is_asked(shared_command_line):
    async with terminal(shared_command_line, "run", GOAL, "--approve", "plan") as shell:
        await shell.expect("y approves, n rejects")
        shell.type("maybe")
        await shell.expect("y or n:")
        shell.type("y Looks right.")
        await shell.expect("approved by")
        assert await asyncio.wait_for(shell.process.wait(), 60) == 0
    assert "Looks right." in shell.shown
    # The command has NO_COLOR and CI: lines that stay.
    assert "1. Do the work  (coder)" in shell.shown
    assert "\x1b" not in shell.shown


async def test_a_rejection_at_the_terminal_ends_the_task(shared_command_line):
    async with terminal(shared_command_line, "run", GOAL, "--approve", "plan") as shell:
        await shell.expect("y approves, n rejects")
        shell.type("n Not this way.")
        assert await asyncio.wait_for(shell.process.wait(), 60) == 1
    assert "approval_rejected" in shell.shown
    assert "Not this way." in shell.shown


async def test_somebody_else_decides_while_the_terminal_asks(shared_command_line):
    async with terminal(shared_command_line, "run", GOAL, "--approve", "plan") as shell:
        await shell.expect("y approves, n rejects")
        listed = await shared_command_line.run("task", "approvals", "--json")
        [pending] = json.loads(listed.out)["approvals"]
        assert (await shared_command_line.run("task", "approvals")).out.count(pending["task_id"]) == 1
        approved = await shared_command_line.run("task", "approve", pending["task_id"], "-m", "From elsewhere.")
        assert (approved.code, "is running" in approved.out) == (0, True), approved.err
        await shell.expect("decided elsewhere")
        assert await asyncio.wait_for(shell.process.wait(), 60) == 0
    shown = await shared_command_line.run("task", "show", pending["task_id"])
    assert "From elsewhere." in shown.out
    again = await shared_command_line.run("task", "reject", pending["task_id"])
    assert (again.code, "state_conflict" in again.err) == (1, True)
    assert "Nothing waits for approval." in (await shared_command_line.run("task", "approvals")).out


async def test_a_task_is_run_again_and_steered_from_the_command_line(shared_command_line):
    async with terminal(shared_command_line, "run", GOAL, "--approve", "plan") as shell:
        await shell.expect("y approves, n rejects")
        shell.type("n Later.")
        assert await asyncio.wait_for(shell.process.wait(), 60) == 1
    listed = json.loads((await shared_command_line.run("task", "list", "--json")).out)
    rejected = listed["tasks"][0]["task_id"]
    assert "No step was tried." in (await shared_command_line.run("task", "history", rejected)).out
    # A retry asks for the same approval, so it waits.
    retried = await shared_command_line.run("task", "retry", rejected, "--json")
    task_id = json.loads(retried.out)["task_id"]

    async def has_status(status: str) -> bool:
        return json.loads((await shared_command_line.run("task", "show", task_id, "--json")).out)["status"] == status

    await wait_until(lambda: has_status("waiting"), description="it waits for approval", timeout=60)
    for command, word in (
        (("pause", task_id), "is paused"),
        (("instruct", task_id, "Keep it \x1b[31mshort."), "is paused"),
        (("extend", task_id, "--max-tokens", "90000"), "is paused"),
        (("resume", task_id), "is running"),
    ):
        done = await shared_command_line.run("task", *command)
        assert (done.code, word in done.out) == (0, True), (command, done.out, done.err)
    shown = (await shared_command_line.run("task", "show", task_id)).out
    assert "short." in shown
    assert "\x1b[31m" not in shown, "a text of others does not control the terminal"
    lower = await shared_command_line.run("task", "extend", task_id, "--max-tokens", "10")
    assert (lower.code, "budget_invalid" in lower.err) == (2, True), lower.err
    await wait_until(lambda: has_status("waiting"), description="it waits again", timeout=60)
    assert (await shared_command_line.run("task", "approve", task_id)).code == 0
    await wait_until(lambda: has_status("completed"), description="it completes", timeout=60)
    history = (await shared_command_line.run("task", "history", task_id)).out
    assert "accepted" in history
    forked = await shared_command_line.run("task", "fork", task_id, "--from", "nowhere")
    assert (forked.code, "step_unknown" in forked.err) == (2, True), forked.err


async def test_a_misspelt_rule_is_refused_before_anything_runs(shared_command_line):
    ended = await shared_command_line.run("run", GOAL, "--approve", "codr")
    assert (ended.code, "coder" in ended.err) == (2, True), ended.err
    wrong = await shared_command_line.run("task", "approve", "task-1", "--goal", "no equals sign")
    assert wrong.code == 2


@pytest.mark.parametrize(("answer", "code"), [(signal.SIGINT, 130), ("n", 1)])
async def test_a_question_before_an_erasure_ends_with_ctrl_c_and_with_no(command_line, answer, code):
    # Nothing runs here: the question comes before anything is sent.
    async with terminal(command_line, "memory", "erase", "--all") as shell:
        await shell.expect("Erase it? [y/N]:")
        if isinstance(answer, signal.Signals):
            shell.process.send_signal(answer)
        else:
            shell.type(answer)
        assert await asyncio.wait_for(shell.process.wait(), 10) == code
    assert "Traceback" not in shell.shown
