"""The dashboard stream of a whole installation: who sees what, snapshot and changes, filters, and resuming."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import websockets
from gateway_client import GatewayClient
from scripts import NOTES

from octollm.contracts.services import SERVICES

GOAL = "How often does it retry?"
Frame = dict[str, Any]


class Dashboard:
    """A client of the stream: the tasks as they are, the events and the frames in order."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket
        self.frames: list[Frame] = []
        self.tasks: dict[str, Frame] = {}
        self.events: list[Frame] = []

    @property
    def position(self) -> int:
        return self.frames[-1]["seq"]

    async def next(self) -> Frame:
        frame = json.loads(await asyncio.wait_for(self._socket.recv(), 30))
        self.frames.append(frame)
        data = frame["data"]
        if frame["type"] == "snapshot":
            self.tasks = {task["task_id"]: task for task in data["tasks"]}
        elif frame["type"] == "change":
            self.tasks.update({task["task_id"]: task for task in data["tasks"]})
            for task_id in data["removed"]:
                self.tasks.pop(task_id, None)
            self.events += data["events"]
        return frame

    async def until(self, reached: Callable[[], object]) -> None:
        while not reached():
            await self.next()


@contextlib.asynccontextmanager
async def dashboard(gateway: GatewayClient, query: str = "", *, key: str | None = None) -> AsyncIterator[Dashboard]:
    headers = {"Authorization": f"Bearer {key or gateway.system.local_key}"}
    address = gateway.system.gateway_url.replace("http", "ws", 1) + f"/ws/dashboard{query}"
    async with websockets.connect(address, additional_headers=headers, proxy=None) as socket:
        yield Dashboard(socket)


async def refused(gateway: GatewayClient, query: str = "", *, key: str | None = None) -> tuple[int, str]:
    async with dashboard(gateway, query, key=key) as stream:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await stream.next()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


async def create_key(gateway: GatewayClient, scope: str, **members: str) -> str:
    response = await gateway.client.post("/keys", json={"name": "dashboard", "scope": scope, **members})
    assert response.status_code == 201, response.text
    return response.json()["secret"]


async def complete(gateway: GatewayClient) -> str:
    return (await gateway.run(GOAL, {"notes.md": NOTES}))["task_id"]


async def test_a_task_is_followed_from_its_creation_to_its_end(shared_gateway: GatewayClient) -> None:
    async with dashboard(shared_gateway) as stream:
        first = await stream.next()
        assert (first["type"], first["data"]["includes"]) == ("snapshot", ["tasks", "events", "services"])
        task_id = await complete(shared_gateway)
        await stream.until(lambda: stream.tasks.get(task_id, {}).get("status") == "completed")
        state = stream.tasks[task_id]
        assert (state["goal"], state["progress"], state["failure"]) == (GOAL, 100, "")
        view = (await shared_gateway.client.get(f"/tasks/{task_id}")).json()
        assert state["usage"]["prompt_tokens"] > 0
        assert (state["version"], state["usage"]) == (view["version"], view["usage"])
        # Each event once, in order, as the log has them.
        after = first["seq"]
        logged = (await shared_gateway.client.get(f"/events?after={after}&limit=500")).json()["events"]
        await stream.until(lambda: stream.events and stream.events[-1]["seq"] >= logged[-1]["seq"])
        assert [event["seq"] for event in stream.events][: len(logged)] == [event["seq"] for event in logged]
        await stream.until(lambda: any(frame["type"] == "services" for frame in stream.frames))
        services = next(frame["data"] for frame in stream.frames if frame["type"] == "services")
        assert services["available"], services
        assert {each["service"] for each in services["services"]} == set(SERVICES)
    seqs = [frame["seq"] for frame in stream.frames]
    assert seqs == sorted(seqs)
    # From any position on, the same state is reached and no event comes twice or is missing.
    for cut in stream.frames[:: max(1, len(stream.frames) // 4)]:
        async with dashboard(shared_gateway, f"?after={cut['seq']}&include=tasks&include=events") as resumed:
            expected = [event["seq"] for event in logged if event["seq"] > cut["seq"]]
            await resumed.until(lambda: len(resumed.events) >= len(expected))  # noqa: B023  (awaited here)
            assert [event["seq"] for event in resumed.events][: len(expected)] == expected
            if expected:
                assert resumed.tasks[task_id]["status"] == "completed"


async def test_filters_show_what_matches_and_say_what_no_longer_does(shared_gateway: GatewayClient) -> None:
    task_id = await complete(shared_gateway)
    for query, shown in (
        ("?status=completed", True),
        ("?status=failed&status=completed", True),
        ("?status=failed,running", False),
        ("?text=OFTEN%20does", True),
        ("?text=100%25", False),
        ("?text=h_w", False),
    ):
        async with dashboard(shared_gateway, f"{query}&include=tasks") as stream:
            assert (task_id in {each["task_id"] for each in (await stream.next())["data"]["tasks"]}) is shown, query
    async with dashboard(shared_gateway, "?status=accepted,planning,running&include=tasks") as stream:
        await stream.next()
        second = await complete(shared_gateway)
        await stream.until(lambda: any(second in frame["data"].get("removed", ()) for frame in stream.frames))
        assert second not in stream.tasks
    async with dashboard(shared_gateway, "?limit=1&include=tasks") as stream:
        snapshot = (await stream.next())["data"]
        assert [each["task_id"] for each in snapshot["tasks"]] == [second]
        older = (await shared_gateway.client.get("/tasks", params={"cursor": snapshot["cursor"], "limit": 1})).json()
        assert older["tasks"][0]["task_id"] == task_id


async def test_each_part_needs_its_scope(shared_gateway: GatewayClient) -> None:
    for scope, includes in (
        ("tasks:read", ["tasks"]),
        ("events:read", ["events"]),
        ("monitor:read", ["services"]),
        ("tasks:* monitor:read", ["tasks", "services"]),
    ):
        key = await create_key(shared_gateway, scope)
        async with dashboard(shared_gateway, key=key) as stream:
            assert (await stream.next())["data"]["includes"] == includes
        for part in {"tasks", "events", "services"}.difference(includes):
            assert await refused(shared_gateway, f"?include={part}", key=key) == (4403, "scope_missing"), (scope, part)
    assert (await refused(shared_gateway, key=await create_key(shared_gateway, "memory:read")))[0] == 4403
    assert (await refused(shared_gateway, key="octo_no_such_key"))[0] == 4401


async def test_another_tenant_sees_nothing_of_this_one(shared_gateway: GatewayClient) -> None:
    task_id = await complete(shared_gateway)
    stranger = await create_key(shared_gateway, "user", tenant="elsewhere")
    async with dashboard(shared_gateway, key=stranger) as stream:
        snapshot = await stream.next()
        assert (snapshot["data"]["tenant"], snapshot["data"]["tasks"]) == ("elsewhere", [])
        await complete(shared_gateway)
        # The stranger's own task is the first thing that it hears of.
        headers = {"Authorization": f"Bearer {stranger}"}
        own = await shared_gateway.client.post("/tasks", json={"goal": "My own goal"}, headers=headers)
        assert own.status_code == 201, own.text
        await stream.until(lambda: stream.tasks)
        assert [*stream.tasks] == [own.json()["task_id"]]
        assert {event["subject"] for event in stream.events} <= {f"task/{own.json()['task_id']}", "audit/elsewhere"}
    async with dashboard(shared_gateway, f"?after={snapshot['seq']}", key=stranger) as stream:
        await stream.until(lambda: stream.tasks)
        assert task_id not in stream.tasks
    assert await refused(shared_gateway, "?tenant=local", key=stranger) == (4404, "not_found")


async def test_what_cannot_be_resumed_or_read_is_refused(shared_gateway: GatewayClient) -> None:
    assert await refused(shared_gateway, "?after=999999999") == (1008, "position_unknown")
    for query in ("after=x", "after=-1", "status=odd", "include=odd", "limit=0", "limit=201", "after=1&after=2"):
        assert await refused(shared_gateway, f"?{query}") == (1008, "invalid_parameter"), query
    response = await shared_gateway.client.get("/dashboard/events?after=999999999")
    assert (response.status_code, response.json()["code"]) == (409, "position_unknown")
    response = await shared_gateway.client.get("/dashboard/events?status=odd")
    assert (response.status_code, response.json()["code"]) == (400, "invalid_parameter")


async def test_the_same_frames_come_as_server_sent_events(shared_gateway: GatewayClient) -> None:
    async with asyncio.timeout(60), shared_gateway.client.stream("GET", "/dashboard/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.aiter_lines()
        event = [line async for line in _first_data(lines)]
    assert json.loads(event[-1])["type"] == "snapshot"


async def _first_data(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
            return


async def test_a_withdrawn_key_ends_its_stream(shared_gateway: GatewayClient) -> None:
    response = await shared_gateway.client.post("/keys", json={"name": "short", "scope": "tasks:read"})
    async with dashboard(shared_gateway, key=response.json()["secret"]) as stream:
        await stream.next()
        revoked = await shared_gateway.client.delete(f"/keys/{response.json()['key']['id']}")
        assert revoked.status_code == 200, revoked.text
        with pytest.raises(websockets.ConnectionClosed) as closed:
            while True:
                await stream.next()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4401


async def test_the_services_can_be_read_once(shared_gateway: GatewayClient) -> None:
    states = (await shared_gateway.client.get("/services")).json()["services"]
    assert {each["service"] for each in states} == set(SERVICES)
    key = await create_key(shared_gateway, "user")
    response = await shared_gateway.client.get("/services", headers={"Authorization": f"Bearer {key}"})
    assert (response.status_code, response.json()["code"]) == (403, "authority_missing")
