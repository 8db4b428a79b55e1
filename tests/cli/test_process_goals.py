"""`octollm demo`, `up` and `run` as processes; only the model's words are scripted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest
from cli_support import GOAL
from scripts import CODE, default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply

pytestmark = pytest.mark.sandbox


def wrong(asked):
    found = default_reply(asked)
    return found.replace("number * 2", "number + 3") if isinstance(found, str) else found


def hanging(asked):
    """Plan as ever, then begin to write and never end."""
    found = default_reply(asked)
    return found if found.startswith("{") else ScriptedReply(found, hangs=True)


async def test_the_demo_shows_every_stage_and_saves_the_result(place):
    ended = await place.run("demo", GOAL)
    assert ended.code == 0, ended.out + ended.err
    shown = ended.out
    for words in ("Ready 10 services", "Task task-", f"Goal {GOAL}", "Plan", "writes:", "accepted", "Result", "Saved"):
        assert words in shown, words
        shown = shown[shown.index(words) :]
    assert f"{place.gateway_url}/" in shown
    [folder] = (place.work / "octollm-results").iterdir()
    saved = json.loads((folder / "result.json").read_text())
    assert saved["status"] == "completed"
    assert any(CODE in Path(artifact["path"]).read_text() for artifact in saved["artifacts"])
    assert place.ports_are_free()
    assert place.left_behind == []


async def test_a_demo_that_fails_says_why(place, script):
    script.reply = wrong
    ended = await place.run("demo", GOAL)
    assert ended.code == 1
    assert "not_accepted" in ended.out
    assert "Task failed" in ended.out


async def test_json_is_all_that_standard_output_gets(shared_place):
    ended = await shared_place.run("run", GOAL, "--json")
    assert ended.code == 0, ended.err
    outcome = json.loads(ended.out)
    assert list(outcome)[:5] == ["task_id", "status", "output", "artifacts", "usage"]
    assert outcome["status"] == "completed"
    assert CODE in outcome["output"]
    assert outcome["usage"]["prompt_tokens"] > 0
    for artifact in outcome["artifacts"]:
        assert Path(artifact["path"]).stat().st_size == artifact["size"]
        assert Path(artifact["path"]).is_relative_to(shared_place.work / "octollm-results" / outcome["task_id"])
    assert "Plan" in ended.err


async def test_a_failed_goal_is_exit_code_1_with_json(shared_place):
    shared_place.script.reply = wrong
    ended = await shared_place.run("run", GOAL, "--json")
    assert ended.code == 1
    outcome = json.loads(ended.out)
    assert outcome["status"] == "failed"
    assert outcome["error"]["code"] == "not_accepted"


async def test_a_budget_is_sent(shared_place):
    ended = await shared_place.run("run", GOAL, "--max-tokens", "5", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["error"]["code"] == "budget_exhausted"


async def test_a_file_goes_along(shared_place):
    seen = []

    def reading(asked):
        seen.append(asked.last + asked.system)
        if "SQL" in asked.system:
            return "```sql\nSELECT sum(amount) AS total FROM sales\n```"
        return default_reply(asked)

    shared_place.script.reply = reading
    (shared_place.work / "sales.csv").write_text("region,amount\nnorth,150\nsouth,90\n")
    ended = await shared_place.run("run", "What is the total amount?", "--file", "sales.csv", "--json")
    assert ended.code == 0, ended.err
    assert "240" in json.loads(ended.out)["output"]
    assert any("amount" in text for text in seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_up_ends_with_a_signal_and_leaves_nothing(place, number):
    process = await place.up()
    ended = await place.interrupt(process, number)
    assert ended.code == 130, ended.err
    assert place.ports_are_free()
    assert place.processes_left(process.pid) == []
    assert place.left_behind == []
    assert not (place.home / "running.json").exists()
    assert "Traceback" not in ended.err


async def test_a_demo_that_is_interrupted_while_it_writes_leaves_nothing(place, script):
    script.reply = hanging
    process = await place.start("demo", GOAL)
    await wait_until(lambda: place.model.active > 0, description="the model writes", timeout=60)
    ended = await place.interrupt(process)
    assert ended.code == 130, ended.err
    await wait_until(lambda: place.model.active == 0, description="the model was left")
    assert place.ports_are_free()
    assert place.processes_left(process.pid) == []
    assert place.left_behind == []
    assert "is cancelled" in ended.out
    assert "Traceback" not in ended.err + ended.out


async def test_a_run_that_is_interrupted_cancels_its_task(shared_place):
    async def tasks():
        async with httpx.AsyncClient() as client:
            listed = (await client.get(f"{shared_place.gateway_url}/tasks")).json()["tasks"]
        return {task["task_id"]: task for task in listed}

    before = await tasks()
    shared_place.script.reply = hanging
    process = await shared_place.start("run", GOAL)
    await wait_until(lambda: shared_place.model.active > 0, description="the model writes", timeout=60)
    # The command knows its task once it prints about it; the model may write earlier.
    assert await process.stdout.readline()
    ended = await shared_place.interrupt(process)
    assert ended.code == 130
    await wait_until(lambda: shared_place.model.active == 0, description="the model was left")
    after = await tasks()
    [task] = [after[task_id] for task_id in after.keys() - before.keys()]
    assert task["status"] == "cancelled"


async def test_a_watch_that_is_interrupted_leaves_the_task_alone(place, up, script):
    script.reply = hanging
    async with httpx.AsyncClient() as client:
        task_id = (await client.post(f"{place.gateway_url}/tasks", json={"goal": GOAL})).json()["task_id"]
        process = await place.start("watch", task_id)
        await wait_until(lambda: place.model.active > 0, description="the model writes", timeout=60)
        line = await process.stdout.readline()
        assert b"plan writes" in line or b"Plan" in line, line
        assert (await place.interrupt(process)).code == 130
        assert (await client.get(f"{place.gateway_url}/tasks/{task_id}")).json()["status"] == "running"
        assert place.model.active > 0


async def test_a_task_goes_on_after_its_process_was_killed(place, script):
    script.reply = hanging
    first = await place.up()
    async with httpx.AsyncClient() as client:
        task_id = (await client.post(f"{place.gateway_url}/tasks", json={"goal": GOAL})).json()["task_id"]
    await wait_until(lambda: place.model.active > 0, description="the model writes", timeout=60)
    first.kill()
    await first.wait()
    script.reply = default_reply
    second = await place.up()
    try:
        ended = await place.run("watch", task_id)
        assert ended.code == 0, ended.out + ended.err
        assert ended.out.count("accepted") == 1
    finally:
        await place.interrupt(second)
