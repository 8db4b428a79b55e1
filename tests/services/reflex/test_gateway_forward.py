"""What is passed on, what is passed back, and what never gets so far."""

from __future__ import annotations

import asyncio

import pytest
from gateway_kit import KEY, TASK, GatewayHarness, json_answer, stream_answer
from starlette.responses import Response

from octollm.errors import FieldError, OctoError
from octollm.rpc.problems import problem_response

CLIENT = {
    "Idempotency-Key": "key-1",
    "X-Correlation-ID": "corr-abc",
    "X-Request-ID": "req-abc",
    "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-03",
    "tracestate": "vendor=value, tenant@system=b;c",
    "baggage": "userId=alice,isProduction=false",
    "X-Internal": "trust me",
    "Cookie": "session=1",
    "X-Timeout-Ms": "50000",
    "Accept-Language": "eo",
}


async def test_a_submission_is_passed_on_with_what_belongs_to_it_and_no_more(gateway: GatewayHarness) -> None:
    gateway.script.answers["POST", "/tasks"] = json_answer(
        {"task_id": TASK}, 201, location=f"/tasks/{TASK}", etag='"1"'
    )
    answer = await gateway.client.post("/tasks", content=b'{"goal": "x"}', headers=CLIENT)
    assert (answer.status_code, answer.json()) == (201, {"task_id": TASK})
    assert (answer.headers["location"], answer.headers["etag"]) == (f"/tasks/{TASK}", '"1"')
    assert (answer.headers["x-request-id"], answer.headers["x-correlation-id"]) == ("req-abc", "corr-abc")
    seen = gateway.script.seen[-1]
    assert seen.body == b'{"goal": "x"}'
    assert seen.headers["idempotency-key"] == "key-1"
    assert seen.headers["x-correlation-id"] == "corr-abc"
    assert seen.headers["x-request-id"] == "req-abc"
    assert seen.headers["traceparent"].startswith("00-" + "a" * 32)
    assert seen.headers["traceparent"].endswith("-03")
    assert seen.headers["tracestate"] == "vendor=value,tenant@system=b;c"
    assert seen.headers["baggage"] == "userId=alice,isProduction=false"
    assert seen.headers["content-type"] == "application/json"
    assert not {"x-internal", "cookie", "accept-language", "origin"} & set(seen.headers)


async def test_a_problem_passes_as_it_was_told(gateway: GatewayHarness) -> None:
    def refuse(request: object) -> Response:
        error = OctoError(
            "The body has an unknown member here.",
            code="unknown_field",
            field_errors=(FieldError("/gaol", "unknown field"),),
        )
        return problem_response(error, request.headers["x-request-id"])  # type: ignore[attr-defined]

    gateway.script.answers["POST", "/tasks"] = refuse
    answer = await gateway.client.post("/tasks", json={"gaol": "x"}, headers={"X-Request-ID": "req-1"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "urn:octollm:error:unknown_field",
        "title": "The body has an unknown member",
        "status": 400,
        "detail": "The body has an unknown member here.",
        "code": "unknown_field",
        "retryable": False,
        "request_id": "req-1",
        "errors": [{"pointer": "/gaol", "detail": "unknown field"}],
    }


async def test_a_shed_call_keeps_its_retry_after(gateway: GatewayHarness) -> None:
    gateway.script.answers["POST", "/tasks"] = lambda _request: problem_response(
        OctoError("Slow down.", code="rate_limited", retry_after=77), "r"
    )
    answer = await gateway.client.post("/tasks", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "77")


@pytest.mark.parametrize(
    ("method", "path", "there"),
    [
        ("GET", "/tasks?limit=2&cursor=c&status=failed", "/tasks?limit=2&cursor=c&status=failed"),
        ("GET", f"/tasks/{TASK}/history?after=3&limit=9", f"/tasks/{TASK}/history?after=3&limit=9"),
        ("GET", f"/tasks/{TASK}/texts", f"/tasks/{TASK}/texts"),
        ("GET", f"/tasks/{TASK}/trace", f"/tasks/{TASK}/trace"),
        ("POST", f"/tasks/{TASK}/approval", f"/tasks/{TASK}/approval"),
        ("GET", "/events?after=1", "/events?after=1"),
        ("GET", "/arms", "/arms"),
        ("GET", "/keys", "/keys"),
        ("POST", "/keys", "/keys"),
        ("DELETE", "/keys/k-1", "/keys/k-1"),
        ("POST", "/token", "/tokens"),
        ("GET", "/webhooks", "/webhooks"),
        ("GET", "/dead-letters", "/dead-letters"),
    ],
)
async def test_public_paths(gateway: GatewayHarness, method: str, path: str, there: str) -> None:
    bare = there.partition("?")[0]
    gateway.script.answers[method, bare] = json_answer({"ok": True})
    answer = await gateway.client.request(method, path)
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    seen = gateway.script.seen[-1]
    assert seen.path + (f"?{seen.query}" if seen.query else "") == there


@pytest.mark.parametrize(
    "path",
    [
        "/budget/reserve",
        "/idempotency/claim",
        "/directory",
        "/revocations",
        "/tokens",
        "/arms/register",
        "/tasks/x/y",
    ],
)
async def test_what_is_not_public_is_not_there(gateway: GatewayHarness, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await gateway.client.request(method, path)
        assert answer.status_code in (404, 405)
    assert gateway.script.seen == []


@pytest.mark.parametrize(
    "target",
    [
        "//tasks",
        "/tasks//x",
        "/tasks/../budget/reserve",
        "/tasks/..",
        "/./tasks",
        "/tasks/%2e%2e/tokens",
        "/tasks/x%2f..%2f..%2ftokens",
        "/tasks/x%5c..",
        "/tasks/x\\y",
        "/tasks/%00",
        "/tasks/%252e%252e",
        "/tasks/" + "x" * 2000,
        "//evil.example/tasks",
        "/tasks/\xe4",
    ],
)
async def test_paths_with_two_meanings_are_refused(gateway: GatewayHarness, target: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode("latin-1"))
    assert b" 400 " in await reader.readline()
    writer.close()
    assert gateway.script.seen == []


async def test_path_parameters_are_encoded_again(gateway: GatewayHarness) -> None:
    await gateway.client.get("/tasks/a%20b%3Fc%23d")
    assert gateway.script.seen[-1].path == "/tasks/a%20b%3Fc%23d"


async def test_bodies_are_bounded(gateway: GatewayHarness) -> None:
    answer = await gateway.client.post("/tasks", content=b" " * (1024 * 1024 + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")

    async def endless() -> object:
        for _ in range(40):
            yield b"x" * 65536

    answer = await gateway.client.post("/tasks", content=endless())  # type: ignore[arg-type]
    assert answer.status_code == 413
    assert gateway.script.seen == []


async def test_a_file_goes_through_with_its_name_and_comes_back_as_a_download(gateway: GatewayHarness) -> None:
    digest = "a" * 64
    gateway.script.answers["POST", "/files"] = json_answer({"digest": digest}, 201)
    body = b"<script>" * 300_000
    answer = await gateway.client.post("/files", content=body, headers={"X-File-Name": "r%C3%A9sum%C3%A9.html"})
    assert answer.status_code == 201
    seen = gateway.script.seen[-1]
    assert (seen.headers["x-file-name"], len(seen.body)) == ("r%C3%A9sum%C3%A9.html", len(body))
    gateway.script.answers["GET", f"/files/{digest}"] = lambda _request: Response(body, media_type="text/html")
    answer = await gateway.client.get(f"/files/{digest}")
    assert answer.content == body
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


async def test_a_file_name_with_other_characters_is_refused(gateway: GatewayHarness) -> None:
    answer = await gateway.client.post("/files", content=b"x", headers={"X-File-Name": b"a b"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_header")


async def test_the_stream_of_events_is_passed_on_as_it_comes(gateway: GatewayHarness) -> None:
    gateway.script.answers["GET", "/events"] = stream_answer(b"id: 1\ndata: {}\n\n", b"id: 2\ndata: {}\n\n")
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "41"}
    async with gateway.client.stream("GET", "/events?after=1", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert await answer.aread() == b"id: 1\ndata: {}\n\nid: 2\ndata: {}\n\n"
    seen = gateway.script.seen[-1]
    assert (seen.headers["accept"], seen.headers["last-event-id"]) == ("text/event-stream", "41")


async def test_a_refused_stream_is_a_problem(gateway: GatewayHarness) -> None:
    gateway.script.answers["GET", "/events"] = lambda _request: problem_response(
        OctoError("No.", code="scope_missing"), "r"
    )
    answer = await gateway.client.get("/events", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")


async def test_without_an_orchestrator_the_gateway_says_so(gateway: GatewayHarness) -> None:
    gateway.script.refusing = OctoError("Starting.", code="unavailable", retry_after=9)
    answer = await gateway.client.post("/tasks", json={}, headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.json()["retryable"], answer.headers["retry-after"]) == (503, True, "9")
    gateway.script.refusing, gateway.script.failing = None, OctoError("Starting.", code="unavailable", retry_after=9)
    answer = await gateway.client.post("/tasks", json={}, headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "9")


async def test_the_page_may_run_only_itself(gateway: GatewayHarness) -> None:
    answer = await gateway.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    for outside in ("http://", "https://"):
        assert f'src="{outside}' not in answer.text
        assert f'href="{outside}' not in answer.text
