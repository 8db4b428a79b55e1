from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import websockets
from gateway_client import GatewayClient
from scripts import NOTES, SALES, ReplaceableScript, default_reply

from octollm.contracts.services import SERVICES
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, ScriptedReply

pytestmark = pytest.mark.sandbox
GOAL = "How many rows have amount > 100, and their total?"


async def test_a_watcher_sees_every_event_once_and_the_text(gateway: GatewayClient) -> None:
    task_id = await gateway.submit(GOAL, {"sales.csv": SALES})
    frames, code = await gateway.frames(task_id)
    assert code == 1000
    assert all({"task_id", "type", "seq", "timestamp", "progress", "data"} <= set(frame) for frame in frames)
    events = [frame for frame in frames if frame["type"] not in ("token", "ping")]
    assert [frame["seq"] for frame in events] == list(range(1, len(events) + 1))
    assert [events[0]["data"].get("status", "accepted"), events[-1]["type"]] == ["accepted", "result"]
    progress = [frame["progress"] for frame in frames]
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0, 100)
    text = "".join(frame["data"]["text"] for frame in frames if frame["type"] == "token" and frame["step"] == "s1")
    assert "SELECT" in text
    again, _ = await gateway.frames(task_id)
    assert [frame["seq"] for frame in again if frame["type"] not in ("token", "ping")] == [f["seq"] for f in events]
    tail, _ = await gateway.frames(task_id, f"?after={len(events) - 1}")
    assert [frame["type"] for frame in tail if frame["type"] != "token"] == ["result"]


async def test_the_same_frames_come_as_server_sent_events(gateway: GatewayClient) -> None:
    task_id = await gateway.submit(GOAL, {"sales.csv": SALES})
    lines: list[str] = []
    async with asyncio.timeout(60), gateway.client.stream("GET", f"/tasks/{task_id}/events?after=0") as stream:
        async for line in stream.aiter_lines():
            lines.append(line)
    frames = [msgspec.json.decode(line[5:]) for line in lines if line.startswith("data:")]
    assert frames[-1]["type"] == "result"
    ids = [int(line[3:]) for line in lines if line.startswith("id:")]
    assert ids == sorted(ids)


async def test_a_position_that_cannot_be_resumed_is_an_error_at_the_gateway(gateway: GatewayClient) -> None:
    task = await gateway.run(GOAL, {"sales.csv": SALES})
    of_task = f"/tasks/{task['task_id']}/events"
    stream = {"Accept": "text/event-stream"}
    for path, headers in (
        (of_task, {**stream, "Last-Event-ID": "999999"}),
        (f"{of_task}?after=1", {**stream, "Last-Event-ID": "999999"}),
        (f"{of_task}?after=999999", stream),
        ("/events", {**stream, "Last-Event-ID": "999999"}),
        ("/events?after=999999", stream),
        ("/events?after=999999", {}),
    ):
        async with asyncio.timeout(10):
            answer = await gateway.client.get(path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "position_unknown"), (path, headers)
    url = gateway.url.replace("http", "ws", 1) + f"/ws/tasks/{task['task_id']}?after=999999"
    async with asyncio.timeout(10), websockets.connect(url) as ws:
        with pytest.raises(websockets.ConnectionClosedError) as closed:
            await ws.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert closed.value.rcvd.reason == "position_unknown"
    # A position that it has is resumed.
    assert (await gateway.client.get(f"{of_task}?after={task['version']}", headers=stream)).status_code in (200, 204)


async def test_an_unknown_task_and_a_foreign_page_are_closed_before_any_frame(gateway: GatewayClient) -> None:
    frames, code = await gateway.frames("task-" + "0" * 32)
    assert (frames, code) == ([], 4404)
    url = gateway.url.replace("http", "ws", 1) + "/ws/tasks/task-" + "0" * 32
    with pytest.raises((websockets.InvalidStatus, websockets.ConnectionClosed)):
        async with websockets.connect(url, origin=websockets.Origin("https://evil.example")) as ws:
            await ws.recv()


async def test_cancelling_stops_the_model_all_the_way_down(
    gateway: GatewayClient, script: ReplaceableScript, model: ScriptedModel
) -> None:
    script.reply = lambda asked: default_reply(asked) if asked.schema else ScriptedReply("SELECT 1, ", hangs=True)
    task_id = await gateway.submit(GOAL, {"sales.csv": SALES})
    await wait_until(lambda: model.active == 1 and len(model.requests) > 1, description="the model is writing")
    url = gateway.url.replace("http", "ws", 1) + f"/ws/tasks/{task_id}"
    async with asyncio.timeout(20), websockets.connect(url) as ws:
        await ws.send('{"type": "cancel"}')
        async for message in ws:
            last: dict[str, Any] = msgspec.json.decode(message)
        assert ws.close_code == 1000
    assert last["data"]["status"] == "cancelled"
    await wait_until(lambda: model.active == 0, description="generation has stopped", timeout=2)
    assert (await gateway.task(task_id))["status"] == "cancelled"


async def test_the_budget_is_enforced(gateway: GatewayClient) -> None:
    task = await gateway.run(GOAL, {"sales.csv": SALES}, budget={"max_tokens": 60})
    assert task["status"] == "failed"
    assert task["error"]["code"] == "budget_exhausted"
    assert task["usage"]["prompt_tokens"] + task["usage"]["completion_tokens"] <= 60


async def test_the_deadline_is_enforced_and_closes_the_model(
    gateway: GatewayClient, script: ReplaceableScript, model: ScriptedModel
) -> None:
    script.reply = lambda asked: default_reply(asked) if asked.schema else ScriptedReply("SELECT ", hangs=True)
    task = await gateway.run(GOAL, {"sales.csv": SALES}, budget={"max_time_seconds": 4})
    assert (task["status"], task["error"]["code"]) == ("failed", "deadline_exceeded")
    await wait_until(lambda: model.active == 0, description="generation has stopped", timeout=2)


async def test_one_trace_joins_every_service_and_no_secret_is_logged(gateway: GatewayClient, tmp_path: Path) -> None:
    docs = await gateway.run("How often does it retry?", {"notes.md": NOTES})
    code = await gateway.run("Write a Python function double(number) with tests")
    log_file = tmp_path / "home" / "logs" / "octollm.jsonl"
    wanted = (
        (docs, {"planner", "retriever", "memory", "judge", "models"}),
        (code, {"coder", "judge", "executor"}),
    )

    def read_lines() -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in log_file.read_text().splitlines()]

    def is_joined() -> bool:
        lines = read_lines()
        return all(
            services | {"orchestrator"}
            <= {line["service"] for line in lines if line.get("trace_id") == task["trace_id"]}
            for task, services in wanted
        )

    # A service logs a call once its response is sent: the last of them may come after the end of the task.
    await wait_until(is_joined, description="every service has logged its calls in the task's trace")
    log, lines = log_file.read_text(), read_lines()
    for task, services in wanted:
        named = {line["service"] for line in lines if line.get("task_id") == task["task_id"]}
        assert services <= named
        correlated = {line.get("trace_id") for line in lines if line.get("correlation_id") == task["correlation_id"]}
        assert correlated == {task["trace_id"]}
    assert "eyJ" not in log
    assert gateway.system.local_key not in log
    assert gateway.system.local_key.split("_", 2)[2] not in log


async def test_every_service_tells_of_its_health_and_metrics(gateway: GatewayClient) -> None:
    await gateway.run(GOAL, {"sales.csv": SALES})
    for service in SERVICES:
        url = gateway.system.urls[service]
        assert (await gateway.client.get(url + "/health")).json()["service"] == service
        assert (await gateway.client.get(url + "/ready")).status_code == 200
        assert (
            f'octollm_requests_total{{operation="health",service="{service}"'
            in (await gateway.client.get(url + "/metrics")).text
        )
    ended = (await gateway.client.get(gateway.system.urls["orchestrator"] + "/metrics")).text
    assert 'octollm_tasks_total{status="completed"} 1.0' in ended


async def test_the_log_is_read_after_the_fact_and_followed(gateway: GatewayClient) -> None:
    task = await gateway.run(GOAL, {"sales.csv": SALES})

    async def told() -> list[str]:
        found = (await gateway.client.get("/events", params={"after": 0})).json()["events"]
        return [event["event_type"] for event in found if event["subject"] == f"task/{task['task_id']}"]

    await wait_until(lambda: _ends(told), description="the log has it all")
    assert (await told())[0] == "task.accepted"
    seen: list[str] = []
    async with (
        asyncio.timeout(20),
        gateway.client.stream("GET", "/events?after=0", headers={"Accept": "text/event-stream"}) as stream,
    ):
        with contextlib.suppress(StopAsyncIteration):
            async for line in stream.aiter_lines():
                seen.append(line)
                if line == "event: task.completed":
                    break
    assert "event: task.accepted" in seen


async def _ends(told: Any) -> bool:
    return (await told())[-1:] == ["task.completed"]
