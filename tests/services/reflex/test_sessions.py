"""The page's session at the door: a cookie that only our own pages can use, and that can be ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from door_kit import KEY, TASK, Doorway, doorway, json_answer
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

SESSION = "octosess_" + "0" * 32 + "_secret-of-the-session"


def prepare(door: Doorway) -> None:
    door.script.keys[SESSION] = "user"
    opened = {"session": SESSION, "expires_in": 43200, "tenant": "acme", "scope": "tasks:*"}
    door.script.answers["POST", "/sessions"] = json_answer(opened)
    door.script.answers["POST", "/sessions/end"] = json_answer({"status": "ok"})
    door.script.answers["GET", "/tasks"] = json_answer({"tasks": []})
    door.script.answers["POST", "/tasks"] = json_answer({"task_id": TASK}, 201)


def ours(door: Doorway) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{door.port}"}


async def test_a_key_opens_a_session_that_scripts_cannot_read(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        assert (await door.client.get("/tasks")).status_code == 401
        answer = await door.client.post("/session", json={"api_key": KEY}, headers=ours(door))
        assert answer.status_code == 200
        assert answer.json() == {"tenant": "acme", "scope": "tasks:*", "session": True}
        cookie = answer.headers["set-cookie"]
        for part in (f"octollm_session={SESSION}", "HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert part in cookie
        assert "Secure" not in cookie
        assert answer.headers["cache-control"] == "no-store"
        asked = door.script.seen[-1]
        assert (asked.path, json.loads(asked.body)) == ("/sessions", {"subject_token": KEY, "login": None})
        # The client has it now and shows it by itself.
        assert (await door.client.get("/tasks")).status_code == 200
        assert (await door.client.get("/session")).json()["session"] is True
        assert SESSION not in str([each.headers for each in door.script.seen if each.path == "/tasks"])


async def test_a_session_is_for_our_own_pages(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        cookies = {"Cookie": f"octollm_session={SESSION}"}
        body = {"goal": "x"}
        for headers in (
            {},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {**ours(door), "Sec-Fetch-Site": "cross-site"},
            {**ours(door), "Sec-Fetch-Site": "same-site"},
        ):
            told = await door.client.post("/tasks", json=body, headers={**cookies, **headers})
            assert (told.status_code, told.json()["code"]) == (403, "origin_refused"), headers
        told = await door.client.get("/tasks", headers={**cookies, "Sec-Fetch-Site": "cross-site"})
        assert (told.status_code, told.json()["code"]) == (403, "origin_refused")
        told = await door.client.post("/tasks", json=body, headers={**cookies, **ours(door)})
        assert told.status_code == 201
        told = await door.client.get("/tasks", headers=cookies)
        assert told.status_code == 200


async def test_a_socket_with_a_session_comes_from_our_own_page(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        await door.script.emit("task.accepted", goal="a goal", progress=0)
        url = f"ws://127.0.0.1:{door.port}/ws/tasks/{TASK}"
        cookie = {"Cookie": f"octollm_session={SESSION}"}
        async with connect(url, additional_headers={**cookie, **ours(door)}, proxy=None) as socket:
            assert json.loads(await socket.recv())["task_id"] == TASK
        async with connect(url, additional_headers=cookie, proxy=None) as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4403
        with pytest.raises(InvalidStatus):
            async with connect(url, additional_headers={**cookie, "Origin": "https://evil.example"}, proxy=None):
                pass


async def test_an_ended_session_opens_nothing_and_its_cookie_is_taken_away(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        await door.client.post("/session", json={"api_key": KEY}, headers=ours(door))
        assert (await door.client.get("/tasks")).status_code == 200
        refused = await door.client.delete("/session", headers={"Origin": "https://evil.example"})
        assert refused.json()["code"] == "origin_refused"
        del door.script.keys[SESSION]
        told = await door.client.delete("/session", headers=ours(door))
        assert told.status_code == 200
        assert "Max-Age=0" in told.headers["set-cookie"]
        assert json.loads(door.script.seen[-1].body) == {"session": SESSION}
        assert (await door.client.get("/tasks")).json()["code"] == "token_missing"
        told = await door.client.get("/tasks", headers={"Cookie": f"octollm_session={SESSION}"})
        assert told.json()["code"] == "api_key_invalid"


@pytest.mark.parametrize("value", ["", "octo_local_key", "octosess", "x" * 5000])
async def test_a_cookie_that_is_no_session_is_nobodys(tmp_path: Path, value: str) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        told = await door.client.get("/tasks", headers={"Cookie": f"octollm_session={value}"})
        assert (told.status_code, told.json()["code"]) == (401, "token_missing")


async def test_a_key_that_is_shown_counts_more_than_a_cookie(tmp_path: Path) -> None:
    async with doorway(tmp_path, trust_loopback=False) as door:
        prepare(door)
        headers = {"Cookie": f"octollm_session={SESSION}", "Authorization": f"Bearer {KEY}"}
        assert (await door.client.post("/tasks", json={"goal": "x"}, headers=headers)).status_code == 201


async def test_logging_in_from_elsewhere_is_refused(door: Doorway) -> None:
    told = await door.client.post("/session", json={"api_key": KEY}, headers={"Origin": "https://evil.example"})
    assert told.json()["code"] == "origin_refused"
    assert "set-cookie" not in told.headers


# Pages of other origins

ELSEWHERE = {"Origin": "https://app.example.org"}


async def test_other_origins_are_refused_unless_they_are_named(tmp_path: Path, door: Doorway) -> None:
    headers = {**ELSEWHERE, "Authorization": f"Bearer {KEY}"}
    told = await door.client.post("/tasks", json={"goal": "x"}, headers=headers)
    assert told.json()["code"] == "origin_refused"
    assert "access-control-allow-origin" not in told.headers
    async with doorway(tmp_path / "other", cors_origins=("https://app.example.org",)) as named:
        prepare(named)
        told = await named.client.post("/tasks", json={"goal": "x"}, headers=headers)
        assert told.status_code == 201
        assert told.headers["access-control-allow-origin"] == "https://app.example.org"
        assert "access-control-allow-credentials" not in told.headers
        asked = {
            **ELSEWHERE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = await named.client.options("/tasks", headers=asked)
        assert preflight.status_code == 200
        assert "DELETE" in preflight.headers["access-control-allow-methods"]
        # It is not ours for all that: neither the local user's nor a session's.
        told = await named.client.post("/tasks", json={"goal": "x"}, headers=ELSEWHERE)
        assert told.json()["code"] == "origin_refused"
        cookie = {"Cookie": f"octollm_session={SESSION}", **ELSEWHERE}
        told = await named.client.post("/tasks", json={"goal": "x"}, headers=cookie)
        assert told.json()["code"] == "origin_refused"
        told = await named.client.post("/tasks", json={"goal": "x"}, headers={"Origin": "https://evil.example"})
        assert told.json()["code"] == "origin_refused"
