"""Watching a task over a WebSocket: frames, closing codes, what the watcher may say, slowness, drain."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from door_kit import KEY, OTHER, READER, TASK, Doorway, doorway
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from octollm.contracts.api import StepText
from octollm.errors import OctoError
from octollm.testing import wait_until

SOCKET = f"/ws/tasks/{TASK}"


async def frame(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(socket.recv(), 10))


async def rest(socket: ClientConnection) -> tuple[list[dict[str, Any]], int]:
    """Return the frames up to the end, and the code with which it was closed."""
    frames: list[dict[str, Any]] = []
    try:
        while True:
            frames.append(await frame(socket))
    except ConnectionClosed as closed:
        assert closed.rcvd is not None
        return frames, closed.rcvd.code


async def begin(door: Doorway) -> None:
    await door.script.emit("task.accepted", goal="a goal", progress=0)


async def write(door: Doorway, text: str, offset: int, *, reset: bool = False) -> None:
    await door.script.stream.append(TASK, step="a", attempt=1, run=1, offset=offset, text=text, reset=reset)


async def test_a_task_is_watched_from_its_present_state_to_its_end(door: Doorway) -> None:
    await begin(door)
    async with door.ws() as socket:
        first = await frame(socket)
        assert (first["type"], first["seq"], first["task_id"], first["progress"]) == ("status", 1, TASK, 0)
        await door.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
        assert (await frame(socket))["data"]["event_type"] == "step.started"
        await write(door, "hello ", 0, reset=True)
        token = await frame(socket)
        assert (token["type"], token["step"], token["attempt"], token["run"], token["offset"], token["reset"]) == (
            "token",
            "a",
            1,
            1,
            0,
            True,
        )
        assert (token["seq"], token["data"]["text"]) == (2, "hello ")
        await write(door, "world", 6)
        await door.script.emit("step.completed", step="a", attempt=1, text_length=11, score=1.0)
        await door.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
        frames, code = await rest(socket)
    assert code == 1000
    assert "".join(each["data"]["text"] for each in frames if each["type"] == "token") == "world"
    assert [(each["type"], each["seq"]) for each in frames if each["type"] != "token"] == [("step", 3), ("result", 4)]
    assert frames[-1]["progress"] == 100


async def test_a_watcher_goes_on_from_where_it_was(door: Doorway) -> None:
    await begin(door)
    await door.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    await write(door, "hello world", 0, reset=True)
    await door.script.emit("step.completed", step="a", attempt=1, text_length=11, score=1.0)
    await door.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    async with door.ws(f"{SOCKET}?after=2&offset=a.1.1.6") as socket:
        frames, code = await rest(socket)
    assert code == 1000
    assert [(each["type"], each["seq"]) for each in frames] == [("token", 2), ("step", 3), ("result", 4)]
    assert (frames[0]["offset"], frames[0]["data"]["text"]) == (6, "world")
    async with door.ws(f"{SOCKET}?after=0") as socket:
        frames, code = await rest(socket)
    assert [each["type"] for each in frames] == ["status", "step", "token", "step", "result"]
    async with door.ws(f"{SOCKET}?after=4") as socket:
        assert await rest(socket) == ([], 1000)


async def test_the_text_is_there_without_redis(door: Doorway) -> None:
    await begin(door)
    await door.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    door.script.texts = [StepText("a", 1, 1, "saved")]
    async with door.ws() as socket:
        await frame(socket)
        assert (await frame(socket))["data"]["text"] == "saved"


@pytest.mark.parametrize(
    ("path", "key", "code"),
    [
        (SOCKET, "octo_unknown_key", 4401),
        (f"/ws/tasks/{OTHER}", KEY, 4404),
        ("/ws/tasks/not%20an%20id", KEY, 4404),
        ("/ws/dashboard", KEY, 4404),
        (f"{SOCKET}?after=x", KEY, 1008),
        (f"{SOCKET}?after=1&after=2", KEY, 1008),
        (f"{SOCKET}?offset=a.1.1", KEY, 1008),
    ],
)
async def test_who_may_not_watch_is_accepted_and_closed_before_any_frame(
    door: Doorway, path: str, key: str, code: int
) -> None:
    await begin(door)
    async with door.ws(path, key=key) as socket:
        assert await rest(socket) == ([], code)


async def test_without_a_key_and_without_trust(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        await begin(door)
        async with door.ws() as socket:
            assert await rest(socket) == ([], 4401)
        async with door.ws(f"{SOCKET}?token={KEY}&access_token={KEY}") as socket:
            assert await rest(socket) == ([], 4401)
        async with door.ws(key=KEY) as socket:
            assert (await frame(socket))["type"] == "status"


async def test_who_lacks_the_scope_is_closed_with_4403(door: Doorway) -> None:
    door.script.failing = OctoError("The token does not allow tasks:read.", code="scope_missing")
    async with door.ws() as socket:
        assert await rest(socket) == ([], 4403)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 400),
    ],
)
async def test_a_foreign_page_gets_no_socket(door: Doorway, headers: dict[str, str], status: int) -> None:
    await begin(door)
    origin = headers.get("Origin")
    if "Host" in headers:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(
            f"GET {SOCKET} HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert f" {status} ".encode() in await reader.readline()
        writer.close()
        return
    with pytest.raises(InvalidStatus) as caught:
        async with door.ws(origin=origin):
            raise AssertionError
    assert caught.value.response.status_code == status
    assert json.loads(caught.value.response.body or b"")["code"] == "origin_refused"


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Via", "Forwarded"])
async def test_a_proxied_socket_is_not_the_local_users(door: Doorway, header: str) -> None:
    await begin(door)
    async with door.ws(headers={header: "1.1 somebody"}) as socket:
        assert await rest(socket) == ([], 4401)


async def test_our_own_page_may_watch(door: Doorway) -> None:
    await begin(door)
    async with door.ws(origin=f"http://127.0.0.1:{door.port}", headers={"Sec-Fetch-Site": "same-origin"}) as socket:
        assert (await frame(socket))["type"] == "status"


async def test_a_watcher_may_cancel(door: Doorway) -> None:
    await begin(door)
    async with door.ws() as socket:
        await frame(socket)
        await socket.send('{"type": "cancel"}')
        frames, code = await rest(socket)
    assert [(each["type"], each["data"]["status"]) for each in frames] == [("status", "cancelled")]
    assert code == 1000


async def test_what_may_not_be_done_is_noted_and_the_watching_goes_on(door: Doorway) -> None:
    await begin(door)
    async with door.ws(key=READER) as socket:
        await frame(socket)
        await socket.send('{"type": "cancel"}')
        note = await frame(socket)
        assert (note["type"], note["seq"], note["data"]["note"]["code"]) == ("status", 1, "scope_missing")
        await socket.send('{"type": "approval", "approved": true}')
        assert (await frame(socket))["data"]["note"]["code"] == "not_configured"
        await door.script.emit("task.cancelled", status="cancelled", progress=0)
        assert (await rest(socket))[1] == 1000


async def test_messages_that_are_not_understood_are_ignored_up_to_a_bound(door: Doorway) -> None:
    await begin(door)
    async with door.ws() as socket:
        await frame(socket)
        for message in ("", "cancel", "[]", '{"type": 3}', '{"type": "delete"}', "[" * 5000, b"\x00", "{}"):
            await socket.send(message)
        await socket.send('{"type": "cancel"}')
        assert (await frame(socket))["data"]["status"] == "cancelled"
    door.script.status, door.script.events = "accepted", door.script.events[:1]
    async with door.ws() as socket:
        await frame(socket)
        for _ in range(9):
            await socket.send("nonsense")
        assert (await rest(socket))[1] == 1008


async def test_a_huge_message_closes_the_socket(door: Doorway) -> None:
    await begin(door)
    async with door.ws() as socket:
        await frame(socket)
        await socket.send("x" * 70_000)
        assert (await rest(socket))[1] == 1009


async def test_a_watcher_that_takes_nothing_is_let_go(tmp_path: Path) -> None:
    async with doorway(tmp_path, patience=0.2) as door:
        await begin(door)
        await door.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
        async with door.ws(max_queue=1) as socket:
            await frame(socket)
            metrics = door.service.base.metrics

            def open_sockets() -> float:
                return metrics.registry.get_sample_value("octollm_live_connections", {"kind": "websocket"}) or 0.0

            assert open_sockets() == 1.0
            # Nothing is read from here on: what is sent fills the buffers on the way, and then waits.
            offset = 0
            for number in range(400):
                await write(door, "x" * 60_000, offset, reset=number == 0)
                offset += 60_000
                await asyncio.sleep(0)
                if open_sockets() == 0.0:
                    break
            await wait_until(lambda: open_sockets() == 0.0, description="the slow watcher is let go", timeout=20)
            _frames, code = await rest(socket)
            assert code == 1013


async def test_a_drain_asks_the_watcher_to_connect_again(door: Doorway) -> None:
    await begin(door)
    async with door.ws() as socket:
        await frame(socket)
        door.service.context.draining.set()
        assert await rest(socket) == ([], 1012)
    async with door.ws() as socket:
        assert await rest(socket) == ([], 1012)


async def test_a_key_that_is_revoked_ends_the_watching(door: Doorway) -> None:
    await begin(door)
    async with door.ws(key=KEY) as socket:
        await frame(socket)
        del door.script.keys[KEY]
        door.script.tokens.clear()
        await door.script.emit("task.progress", progress=5)
        assert (await rest(socket))[1] == 4401


async def test_too_many_watchers_are_sent_away(door: Doorway, tmp_path: Path) -> None:
    async with doorway(tmp_path, rate_limit="2/hour") as limited:
        await begin(limited)
        for _ in range(2):
            async with limited.ws() as socket:
                await frame(socket)
        async with limited.ws() as socket:
            assert await rest(socket) == ([], 1013)


async def events_of(door: Doorway, path: str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with door.client.stream("GET", path, headers=headers or {}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                found.append({"id": fields["id"], **json.loads(fields["data"])})
                fields = {}
    return found


async def test_the_same_frames_come_as_server_sent_events(door: Doorway) -> None:
    await begin(door)
    await door.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
    await write(door, "text", 0, reset=True)
    await door.script.emit("step.completed", step="a", attempt=1, text_length=4, score=1.0)
    await door.script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    path = f"/tasks/{TASK}/events"
    frames = await events_of(door, f"{path}?after=0")
    assert [(each["type"], each["id"]) for each in frames] == [
        ("status", "1"),
        ("step", "2"),
        ("token", "2"),
        ("step", "3"),
        ("result", "4"),
    ]
    # The header is where a browser went on last, whatever address it began with.
    frames = await events_of(door, f"{path}?after=0", {"Last-Event-ID": "3"})
    assert [each["id"] for each in frames] == ["4"]
    assert (await door.client.get(path, headers={"Last-Event-ID": "4"})).status_code == 204


async def test_a_stream_of_a_task_that_is_not_there_is_a_problem(door: Doorway) -> None:
    answer = await door.client.get(f"/tasks/{OTHER}/events")
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
    answer = await door.client.get(f"/tasks/{TASK}/events?after=-1")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")


async def test_a_drain_ends_a_stream(door: Doorway) -> None:
    await begin(door)
    async with door.client.stream("GET", f"/tasks/{TASK}/events") as answer:
        lines = answer.aiter_lines()
        while not (await anext(lines)).startswith("data"):
            pass
        door.service.context.draining.set()
        assert [line async for line in lines if line] == []
