"""Who is let in: keys, the local user, and the ways in which a page or a proxy tries to be one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway_kit import KEY, LOCAL_KEY, TASK, GatewayHarness, json_answer, start_gateway
from websockets.exceptions import ConnectionClosed

from octollm.errors import OctoError
from octollm.services.reflex.throttle import RateLimiter
from octollm.services.reflex.upstream import CachedToken, TokenExchangeClient


def listing(gateway: GatewayHarness) -> None:
    gateway.script.answers["GET", "/tasks"] = json_answer({"tasks": []})
    gateway.script.answers["POST", "/tasks"] = json_answer({"task_id": "x"}, 201, location="/tasks/x")


async def test_a_key_is_exchanged_once_and_never_passed_on(gateway: GatewayHarness) -> None:
    listing(gateway)
    for _ in range(3):
        answer = await gateway.client.get("/tasks", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
    assert gateway.script.exchanges == [KEY]
    assert {seen.headers["authorization"] for seen in gateway.script.seen} == {"Bearer access-1"}


async def test_concurrent_calls_share_one_exchange(gateway: GatewayHarness) -> None:
    listing(gateway)
    headers = {"Authorization": f"Bearer {KEY}"}
    answers = await asyncio.gather(*(gateway.client.get("/tasks", headers=headers) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert gateway.script.exchanges == [KEY]


async def test_a_key_that_is_not_valid_is_refused_and_asked_again(gateway: GatewayHarness) -> None:
    headers = {"Authorization": "Bearer octo_unknown_key"}
    for _ in range(2):
        answer = await gateway.client.get("/tasks", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "api_key_invalid")
        assert "octo_unknown_key" not in answer.text
    assert len(gateway.script.exchanges) == 2


async def test_a_revoked_token_is_exchanged_again_and_a_revoked_key_refused(gateway: GatewayHarness) -> None:
    listing(gateway)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert (await gateway.client.get("/tasks", headers=headers)).status_code == 200
    gateway.script.tokens.clear()
    assert (await gateway.client.get("/tasks", headers=headers)).status_code == 200
    gateway.script.tokens.clear()
    del gateway.script.keys[KEY]
    answer = await gateway.client.get("/tasks", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "api_key_invalid")


async def test_when_the_gateway_itself_is_refused_the_caller_is_not_blamed(gateway: GatewayHarness) -> None:
    gateway.script.refusing = OctoError("who are you?", code="token_invalid")
    answer = await gateway.client.get("/tasks", headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "retry-after" in answer.headers


async def test_a_service_that_accepts_no_token_yet_is_not_the_callers_fault(gateway: GatewayHarness) -> None:
    await gateway.script.emit("task.accepted", goal="a goal", progress=0)
    for code in ("token_invalid", "token_revoked", "token_expired"):
        gateway.script.failing = OctoError("not yet", code=code)
        for path in ("/tasks", f"/tasks/{TASK}/events"):
            answer = await gateway.client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1"
        async with gateway.ws() as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013, "a client connects again, where it would give up after 4401"
    assert (await gateway.client.get("/session/issuers")).status_code == 503


async def test_a_session_is_read_while_another_call_drops_its_token(gateway: GatewayHarness) -> None:
    """The hit of the rate limit comes between authentication and the reading."""
    seen: list[TokenExchangeClient] = []
    get_valid = TokenExchangeClient.get_valid
    hit = RateLimiter.hit

    async def note(self: TokenExchangeClient, *arguments: Any) -> CachedToken:
        seen.append(self)
        return await get_valid(self, *arguments)

    async def drop(self: RateLimiter, bucket: str) -> None:
        await hit(self, bucket)
        for each in seen:
            each.invalidate(LOCAL_KEY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenExchangeClient, "get_valid", note)
        patch.setattr(RateLimiter, "hit", drop)
        assert (await gateway.client.get("/session")).status_code == 200


async def test_the_local_user_needs_no_key(gateway: GatewayHarness) -> None:
    listing(gateway)
    assert (await gateway.client.get("/tasks")).status_code == 200
    own = {"Origin": f"http://localhost:{gateway.port}", "Sec-Fetch-Site": "same-origin"}
    assert (await gateway.client.post("/tasks", json={}, headers=own)).status_code == 201
    assert gateway.script.exchanges == [LOCAL_KEY]


@pytest.mark.parametrize(
    "host", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST:{port}", "octo.example", "alias:1234"]
)
async def test_our_names_are_ours(tmp_path: Path, host: str) -> None:
    async with start_gateway(tmp_path, allowed_hosts=("octo.example", "alias:1234")) as gateway:
        listing(gateway)
        answer = await gateway.client.get("/tasks", headers={"Host": host.format(port=gateway.port)})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost.:{port}",
        "localhost:{port}@evil.example",
        "0.0.0.0:{port}",
        "2130706433:{port}",
        "",
    ],
)
async def test_a_rebound_host_is_refused_everywhere(gateway: GatewayHarness, host: str) -> None:
    for path in ("/tasks", "/", "/health", "/metrics"):
        answer = await gateway.client.get(path, headers={"Host": host.format(port=gateway.port)})
        assert (answer.status_code, answer.json()["code"]) == (400, "host_refused")
    assert gateway.script.exchanges == []


async def test_two_hosts_are_refused(gateway: GatewayHarness) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    host = f"Host: 127.0.0.1:{gateway.port}\r\n"
    writer.write(f"GET /tasks HTTP/1.1\r\n{host}{host}Connection: close\r\n\r\n".encode())
    assert b"400" in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "https://localhost",
        "http://localhost:{port}.evil.example",
        "file://",
        "chrome-extension://abc",
    ],
)
async def test_a_foreign_origin_is_refused(gateway: GatewayHarness, origin: str) -> None:
    listing(gateway)
    headers = {"Origin": origin.format(port=gateway.port)}
    for method in ("GET", "POST", "DELETE"):
        answer = await gateway.client.request(method, "/tasks", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused"), method
    # A key says who asks, but a foreign page may still not make it do anything.
    with_key = {**headers, "Authorization": f"Bearer {KEY}"}
    assert (await gateway.client.post("/tasks", json={}, headers=with_key)).status_code == 403
    assert (await gateway.client.get("/tasks", headers=with_key)).status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Forwarded", "for=127.0.0.1"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Anything", ""),
        ("Via", "1.1 proxy"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "Cross-Site"),
    ],
)
async def test_a_proxied_or_cross_site_request_is_not_the_local_users(
    gateway: GatewayHarness, name: str, value: str
) -> None:
    listing(gateway)
    answer = await gateway.client.get("/tasks", headers={name: value})
    assert (answer.status_code, answer.json()["code"]) == (401, "token_missing")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert (
        await gateway.client.get("/tasks", headers={name: value, "Authorization": f"Bearer {KEY}"})
    ).status_code == 200


@pytest.mark.parametrize("changes", [{"trust_loopback": False}, {"loopback_only": False}])
async def test_without_trust_everybody_shows_a_key(tmp_path: Path, changes: dict[str, bool]) -> None:
    async with start_gateway(tmp_path, **changes) as gateway:  # type: ignore[arg-type]
        answer = await gateway.client.get("/tasks")
        assert (answer.status_code, answer.json()["code"]) == (401, "token_missing")
        assert gateway.script.exchanges == []


async def test_probes_come_by_address_where_the_gateway_is_open_to_others(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, loopback_only=False) as gateway:
        host = {"Host": "10.1.2.3:8000"}
        assert (await gateway.client.get("/health", headers=host)).status_code == 200
        assert (await gateway.client.get("/tasks", headers=host)).status_code == 400
        assert set((await gateway.client.get("/ready", headers=host)).json()["dependencies"]) == {
            "orchestrator",
            "redis",
        }


@pytest.mark.parametrize(
    "value", ["Basic abc", "Bearer", "Bearer a b", "Bearer " + "x" * 9000, "octo_key", "Bearer käse"]
)
async def test_a_malformed_authorization_is_no_local_user(gateway: GatewayHarness, value: str) -> None:
    answer = await gateway.client.get("/tasks", headers={"Authorization": value.encode()})
    assert (answer.status_code, answer.json()["code"]) == (401, "token_malformed")
    assert gateway.script.exchanges == []


async def test_a_token_in_the_address_is_ignored_and_not_passed_on(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, trust_loopback=False) as gateway:
        listing(gateway)
        for name in ("token", "access_token", "api_key", "key", "authorization"):
            assert (await gateway.client.get(f"/tasks?{name}={KEY}")).status_code == 401
        answer = await gateway.client.get(f"/tasks?token={KEY}&limit=3", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        assert gateway.script.seen[-1].query == "limit=3"


async def test_too_many_calls_are_told_when_to_come_back(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, rate_limit="3/hour") as gateway:
        listing(gateway)
        codes = [(await gateway.client.get("/tasks")).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        answer = await gateway.client.get("/tasks")
        assert answer.json()["code"] == "rate_limited"
        assert 1 <= int(answer.headers["retry-after"]) <= 7200
        # Another key has a window of its own.
        assert (await gateway.client.get("/health")).status_code == 200


async def test_guessing_keys_is_limited_by_address(tmp_path: Path) -> None:
    async with start_gateway(tmp_path, rate_limit="3/hour") as gateway:
        codes = [
            (await gateway.client.get("/tasks", headers={"Authorization": f"Bearer octo_guess_{n}"})).status_code
            for n in range(5)
        ]
        assert codes == [401, 401, 401, 429, 429]
        assert len(gateway.script.exchanges) == 3
