"""`octollm demo`, `up` and `run` as processes; only the model's words are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from command_line import GOAL
from scripts import CODE, NOTES, default_reply

from octollm.concurrency import run_until_first
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply

pytestmark = pytest.mark.sandbox


def reply_with_fault(asked):
    found = default_reply(asked)
    return found.replace("number * 2", "number + 3") if isinstance(found, str) else found


def hanging(asked):
    """Plan as ever, then begin to write and never end."""
    found = default_reply(asked)
    return found if found.startswith("{") else ScriptedReply(found, hangs=True)


async def test_the_demo_shows_every_stage_and_saves_the_result(command_line):
    ended = await command_line.run("demo", GOAL)
    assert ended.code == 0, ended.out + ended.err
    shown = ended.out
    for words in ("Ready 10 services", "Task task-", f"Goal {GOAL}", "Plan", "writes:", "accepted", "Result", "Saved"):
        assert words in shown, words
        shown = shown[shown.index(words) :]
    assert f"{command_line.gateway_url}/" in shown
    [folder] = (command_line.work / "octollm-results").iterdir()
    saved = json.loads((folder / "result.json").read_text())
    assert saved["status"] == "completed"
    assert any(CODE in Path(artifact["path"]).read_text() for artifact in saved["artifacts"])
    assert command_line.ports_are_free()
    assert command_line.left_behind == []


async def test_a_demo_that_fails_says_why(command_line, script):
    script.reply = reply_with_fault
    ended = await command_line.run("demo", GOAL)
    assert ended.code == 1
    assert "not_accepted" in ended.out
    assert "Task failed" in ended.out


async def test_json_is_all_that_standard_output_gets(shared_command_line):
    ended = await shared_command_line.run("run", GOAL, "--json")
    assert ended.code == 0, ended.err
    outcome = json.loads(ended.out)
    assert list(outcome)[:5] == ["task_id", "status", "output", "artifacts", "usage"]
    assert outcome["status"] == "completed"
    assert CODE in outcome["output"]
    assert outcome["usage"]["prompt_tokens"] > 0
    for artifact in outcome["artifacts"]:
        assert Path(artifact["path"]).stat().st_size == artifact["size"]
        assert Path(artifact["path"]).is_relative_to(shared_command_line.work / "octollm-results" / outcome["task_id"])
    assert "Plan" in ended.err


async def test_a_failed_goal_is_exit_code_1_with_json(shared_command_line):
    shared_command_line.script.reply = reply_with_fault
    ended = await shared_command_line.run("run", GOAL, "--json")
    assert ended.code == 1
    outcome = json.loads(ended.out)
    assert outcome["status"] == "failed"
    assert outcome["error"]["code"] == "not_accepted"


async def test_a_question_without_an_answer_is_exit_code_3(shared_command_line):
    (shared_command_line.work / "notes.md").write_text(NOTES)
    question = "Who painted the ceiling of the chapel?"
    ended = await shared_command_line.run("run", question, "--file", "notes.md", "--json")
    assert ended.code == 3, ended.err
    outcome = json.loads(ended.out)
    assert (outcome["status"], outcome["found"]) == ("completed", False)
    assert "The files do not have what the goal asks for." in ended.err


async def test_a_budget_is_sent(shared_command_line):
    ended = await shared_command_line.run("run", GOAL, "--max-tokens", "5", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["error"]["code"] == "budget_exhausted"


async def test_a_file_goes_along(shared_command_line):
    seen = []

    def reading(asked):
        seen.append(asked.last + asked.system)
        if "SQL" in asked.system:
            return "```sql\nSELECT sum(amount) AS total FROM sales\n```"
        return default_reply(asked)

    shared_command_line.script.reply = reading
    (shared_command_line.work / "sales.csv").write_text("region,amount\nnorth,150\nsouth,90\n")
    ended = await shared_command_line.run("run", "What do all the amounts add up to?", "--file", "sales.csv", "--json")
    assert ended.code == 0, ended.err
    assert "240" in json.loads(ended.out)["output"]
    assert any("amount" in text for text in seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_up_ends_with_a_signal_and_leaves_nothing(command_line, number):
    process = await command_line.up()
    ended = await command_line.interrupt(process, number)
    assert ended.code == 130, ended.err
    assert command_line.ports_are_free()
    assert command_line.processes_left(process.pid) == []
    assert command_line.left_behind == []
    assert not (command_line.home / "running.json").exists()
    assert "Traceback" not in ended.err


async def test_a_demo_that_is_interrupted_while_it_writes_leaves_nothing(command_line, script):
    script.reply = hanging
    process = await command_line.start("demo", GOAL)
    await wait_until(lambda: command_line.model.active > 0, description="the model writes", timeout=60)
    ended = await command_line.interrupt(process)
    assert ended.code == 130, ended.err
    await wait_until(lambda: command_line.model.active == 0, description="the model was left", timeout=30)
    assert command_line.ports_are_free()
    assert command_line.processes_left(process.pid) == []
    assert command_line.left_behind == []
    assert "is cancelled" in ended.out
    assert "Traceback" not in ended.err + ended.out


async def test_a_run_that_is_interrupted_cancels_its_task(shared_command_line):
    async def tasks():
        async with httpx.AsyncClient() as client:
            listed = (await client.get(f"{shared_command_line.gateway_url}/tasks")).json()["tasks"]
        return {task["task_id"]: task for task in listed}

    before = await tasks()
    shared_command_line.script.reply = hanging
    process = await shared_command_line.start("run", GOAL)
    await wait_until(lambda: shared_command_line.model.active > 0, description="the model writes", timeout=60)
    # The command knows its task once it prints about it; the model may write earlier.
    assert await process.stdout.readline()
    ended = await shared_command_line.interrupt(process)
    assert ended.code == 130
    await wait_until(lambda: shared_command_line.model.active == 0, description="the model was left", timeout=30)
    after = await tasks()
    [task] = [after[task_id] for task_id in after.keys() - before.keys()]
    assert task["status"] == "cancelled"


@dataclass
class WithheldResponses:
    """Relays connections to the gateway, and withholds the responses of one that submits a task."""

    url: str = ""
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def serve(self, gateway_url):
        gateway = urlsplit(gateway_url)

        async def relay(reader, writer):
            up_reader, up_writer = await asyncio.open_connection(gateway.hostname, gateway.port)
            submits = asyncio.Event()
            hosts = (self.url.removeprefix("http://").encode(), gateway.netloc.encode())
            with contextlib.suppress(ConnectionError):
                await run_until_first(
                    self._forward(reader, up_writer, submits, hosts), self._return(up_reader, writer, submits)
                )
            for each in (writer, up_writer):
                each.close()

        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self
            self.released.set()

    async def _forward(self, reader, writer, submits, hosts):
        while data := await reader.read(65536):
            if data.startswith(b"POST /tasks "):
                submits.set()
                self.submitted.set()
            writer.write(data.replace(*hosts))  # the gateway checks the Host header

    async def _return(self, reader, writer, submits):
        while data := await reader.read(65536):
            if submits.is_set():
                await self.released.wait()
            writer.write(data)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_run_that_is_interrupted_while_it_submits(shared_command_line, answers):
    shared_command_line.script.reply = hanging

    async def running():
        async with httpx.AsyncClient() as client:
            listed = (await client.get(f"{shared_command_line.gateway_url}/tasks")).json()["tasks"]
        return {task["task_id"] for task in listed if task["status"] not in ("completed", "failed", "cancelled")}

    (shared_command_line.work / "notes.txt").write_text("Twice.\n")
    async with WithheldResponses().serve(shared_command_line.gateway_url) as relay:
        shared_command_line.settings["OCTOLLM_URL"] = relay.url
        process = await shared_command_line.start("run", GOAL, "--file", "notes.txt")
        await wait_until(relay.submitted.is_set, description="the goal is submitted")
        await wait_until(running, description="the gateway has accepted the task")
        [task_id] = await running()
        process.send_signal(signal.SIGINT)
        if answers:
            relay.released.set()
        ended = await shared_command_line.end(process, 20)
    assert ended.code == 130, ended.err
    if answers:
        assert f"{task_id} is cancelled" in ended.out
        assert await running() == set()
    else:
        assert "may still run" in ended.out
        assert await running() == {task_id}
        async with httpx.AsyncClient() as client:
            await client.post(f"{shared_command_line.gateway_url}/tasks/{task_id}/cancel")


async def test_a_watch_that_is_interrupted_leaves_the_task_alone(command_line, up, script):
    script.reply = hanging
    async with httpx.AsyncClient() as client:
        task_id = (await client.post(f"{command_line.gateway_url}/tasks", json={"goal": GOAL})).json()["task_id"]
        process = await command_line.start("watch", task_id)
        await wait_until(lambda: command_line.model.active > 0, description="the model writes", timeout=60)
        line = await process.stdout.readline()
        assert b"plan writes" in line or b"Plan" in line, line
        assert (await command_line.interrupt(process)).code == 130
        assert (await client.get(f"{command_line.gateway_url}/tasks/{task_id}")).json()["status"] == "running"
        assert command_line.model.active > 0


async def test_a_task_goes_on_after_its_process_was_killed(command_line, script):
    script.reply = hanging
    first = await command_line.up()
    async with httpx.AsyncClient() as client:
        task_id = (await client.post(f"{command_line.gateway_url}/tasks", json={"goal": GOAL})).json()["task_id"]
    await wait_until(lambda: command_line.model.active > 0, description="the model writes", timeout=60)
    first.kill()
    await first.wait()
    script.reply = default_reply
    second = await command_line.up()
    try:
        ended = await command_line.run("watch", task_id)
        assert ended.code == 0, ended.out + ended.err
        assert ended.out.count("accepted") == 1
    finally:
        await command_line.interrupt(second)
