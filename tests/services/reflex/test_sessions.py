"""The page's session at the gateway: a cookie that only our own pages can use, and that can be ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_kit import KEY, TASK, GatewayHarness, json_answer, start_gateway
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

SESSION = "octosess_" + "0" * 32 + "_secret-of-the-session"


def prepare(gateway: GatewayHarness) -> None:
    gateway.script.keys[SESSION] = "user"
    opened = {"session": SESSION, "expires_in": 43200, "tenant": "acme", "scope": "tasks:*"}
    gateway.script.answers["POST", "/sessions"] = json_answer(opened)
    gateway.script.answers["POST", "/sessions/end"] = json_answer({"status": "ok"})
    gateway.script.answers["GET", "/tasks"] = json_answer({"tasks": []})
    gateway.script.answers["POST", "/tasks"] = json_answer({"task_id": TASK}, 201)


def own_headers(gateway: GatewayHarness) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{gateway.port}"}


async def test_a_key_opens_a_session_that_scripts_cannot_read(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        assert (await gateway.client.get("/tasks")).status_code == 401
        answer = await gateway.client.post("/session", json={"api_key": KEY}, headers=own_headers(gateway))
        assert answer.status_code == 200
        assert answer.json() == {"tenant": "acme", "scope": "tasks:*", "session": True}
        cookie = answer.headers["set-cookie"]
        for part in (f"octollm_session={SESSION}", "HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert part in cookie
        assert "Secure" not in cookie
        assert answer.headers["cache-control"] == "no-store"
        asked = gateway.script.seen[-1]
        assert (asked.path, json.loads(asked.body)) == ("/sessions", {"subject_token": KEY, "login": None})
        # The client has it now and shows it by itself.
        assert (await gateway.client.get("/tasks")).status_code == 200
        assert (await gateway.client.get("/session")).json()["session"] is True
        assert SESSION not in str([each.headers for each in gateway.script.seen if each.path == "/tasks"])


async def test_a_session_is_for_our_own_pages(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        cookies = {"Cookie": f"octollm_session={SESSION}"}
        body = {"goal": "x"}
        for headers in (
            {},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {**own_headers(gateway), "Sec-Fetch-Site": "cross-site"},
            {**own_headers(gateway), "Sec-Fetch-Site": "same-site"},
        ):
            told = await gateway.client.post("/tasks", json=body, headers={**cookies, **headers})
            assert (told.status_code, told.json()["code"]) == (403, "origin_refused"), headers
        told = await gateway.client.get("/tasks", headers={**cookies, "Sec-Fetch-Site": "cross-site"})
        assert (told.status_code, told.json()["code"]) == (403, "origin_refused")
        told = await gateway.client.post("/tasks", json=body, headers={**cookies, **own_headers(gateway)})
        assert told.status_code == 201
        told = await gateway.client.get("/tasks", headers=cookies)
        assert told.status_code == 200


async def test_a_socket_with_a_session_comes_from_our_own_page(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        await gateway.script.emit("task.accepted", goal="a goal", progress=0)
        url = f"ws://127.0.0.1:{gateway.port}/ws/tasks/{TASK}"
        cookie = {"Cookie": f"octollm_session={SESSION}"}
        async with connect(url, additional_headers={**cookie, **own_headers(gateway)}, proxy=None) as socket:
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
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        await gateway.client.post("/session", json={"api_key": KEY}, headers=own_headers(gateway))
        assert (await gateway.client.get("/tasks")).status_code == 200
        refused = await gateway.client.delete("/session", headers={"Origin": "https://evil.example"})
        assert refused.json()["code"] == "origin_refused"
        del gateway.script.keys[SESSION]
        told = await gateway.client.delete("/session", headers=own_headers(gateway))
        assert told.status_code == 200
        assert "Max-Age=0" in told.headers["set-cookie"]
        assert json.loads(gateway.script.seen[-1].body) == {"session": SESSION}
        assert (await gateway.client.get("/tasks")).json()["code"] == "token_missing"
        told = await gateway.client.get("/tasks", headers={"Cookie": f"octollm_session={SESSION}"})
        assert told.json()["code"] == "api_key_invalid"


@pytest.mark.parametrize("value", ["", "octo_local_key", "octosess", "x" * 5000])
async def test_a_cookie_that_is_no_session_is_nobodys(tmp_path: Path, value: str) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        told = await gateway.client.get("/tasks", headers={"Cookie": f"octollm_session={value}"})
        assert (told.status_code, told.json()["code"]) == (401, "token_missing")


async def test_a_key_that_is_shown_counts_more_than_a_cookie(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        prepare(gateway)
        headers = {"Cookie": f"octollm_session={SESSION}", "Authorization": f"Bearer {KEY}"}
        assert (await gateway.client.post("/tasks", json={"goal": "x"}, headers=headers)).status_code == 201


async def test_logging_in_from_elsewhere_is_refused(gateway: GatewayHarness) -> None:
    told = await gateway.client.post("/session", json={"api_key": KEY}, headers={"Origin": "https://evil.example"})
    assert told.json()["code"] == "origin_refused"
    assert "set-cookie" not in told.headers


# Pages of other origins

ELSEWHERE = {"Origin": "https://app.example.org"}


async def test_other_origins_are_refused_unless_they_are_named(tmp_path: Path, gateway: GatewayHarness) -> None:
    headers = {**ELSEWHERE, "Authorization": f"Bearer {KEY}"}
    told = await gateway.client.post("/tasks", json={"goal": "x"}, headers=headers)
    assert told.json()["code"] == "origin_refused"
    assert "access-control-allow-origin" not in told.headers
    async with start_gateway(tmp_path / "other", cors_origins=("https://app.example.org",)) as named:
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
