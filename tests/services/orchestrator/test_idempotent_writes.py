"""Every public write of the orchestrator honours ``Idempotency-Key``; secrets are stored only encrypted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, problem
from sqlalchemy import update

from octollm.arm import Context
from octollm.contracts.auth import NewKey, TokenResponse
from octollm.contracts.enrolment import NewEnrolmentToken
from octollm.contracts.hooks import NewHook
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.task import ExecuteResult, Task
from octollm.contracts.webhooks import NewWebhook
from octollm.errors import OctoError
from octollm.rpc.call import Operation
from octollm.rpc.http_client import HttpResponse
from octollm.rpc.idempotency import MAX_KEY
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.accounts import LOCAL_TENANT
from octollm.services.orchestrator.admin_api import AdminApi
from octollm.services.orchestrator.arms_api import ArmsApi
from octollm.services.orchestrator.files import file_operations
from octollm.services.orchestrator.hooks import HooksApi
from octollm.services.orchestrator.schedules import SchedulesApi
from octollm.services.orchestrator.steering_api import SteeringApi
from octollm.services.orchestrator.subscriptions_api import SubscriptionsApi
from octollm.services.orchestrator.tasks_api import TasksApi
from octollm.services.orchestrator.tokens_api import TokensApi
from octollm.services.orchestrator.webhooks_api import WebhooksApi
from octollm.storage import Database, open_database
from octollm.storage.tables import admissions, idempotency
from octollm.testing import wait_until

KEY = "client-chosen-key-1"


def decoded(response: HttpResponse) -> Any:
    return msgspec.json.decode(response.body)


async def listed(orch: OrchestratorHarness, path: str, member: str) -> list[Any]:
    return decoded(await orch.send("GET", path))[member]


async def new_key(orch: OrchestratorHarness) -> str:
    return str(decoded(await orch.send("POST", "/keys", {"name": "k", "scope": "user"}))["key"]["id"])


async def new_token(orch: OrchestratorHarness) -> str:
    body = {"name": "weather", "calls": [], "lifetime_seconds": 60}
    return str(decoded(await orch.send("POST", "/joins", body))["join"]["id"])


async def new_task(orch: OrchestratorHarness) -> str:
    async def hang(_contract: Task, _ctx: Context) -> ExecuteResult:
        await asyncio.Event().wait()
        raise AssertionError

    orch.script.execute = hang
    return (await orch.submit({"goal": "do it"})).task_id


async def ended_task(orch: OrchestratorHarness) -> str:
    return (await orch.run({"goal": "do it"})).task_id


async def paused_task(orch: OrchestratorHarness) -> str:
    task_id = await new_task(orch)
    await orch.send("POST", f"/tasks/{task_id}/pause")
    return task_id


async def no_target(_orch: OrchestratorHarness) -> str:
    return ""


CREATE = [
    ("/keys", {"name": "ci", "scope": "user"}, {"name": "other", "scope": "user"}, "secret"),
    ("/joins", {"name": "weather", "calls": [], "lifetime_seconds": 60}, {"name": "other", "calls": []}, "secret"),
    (
        "/tokens",
        {"aud": "coder", "scope": "coder:execute", "lifetime_seconds": 60},
        {"aud": "coder", "scope": "coder:execute", "lifetime_seconds": 61},
        "access_token",
    ),
]


@pytest.mark.parametrize(("path", "body", "other", "secret"), CREATE, ids=[row[0] for row in CREATE])
async def test_a_repeat_replays_the_response_and_its_secret(
    orch: OrchestratorHarness, path: str, body: dict[str, Any], other: dict[str, Any], secret: str
) -> None:
    first = await orch.send("POST", path, body, Idempotency_Key=KEY)
    assert first.status in (200, 201), first.body
    assert "idempotent-replayed" not in first.headers
    respelled = msgspec.json.format(msgspec.json.encode(dict(reversed(body.items()))), indent=3)
    again = await orch.send("POST", path, respelled, Idempotency_Key=KEY)
    assert (again.status, again.body) == (first.status, first.body)
    assert again.headers["idempotent-replayed"] == "true"
    conflict = await orch.send("POST", path, other, Idempotency_Key=KEY)
    assert (conflict.status, problem(conflict)["code"]) == (409, "idempotency_conflict")
    # Another key is another call: two secrets.
    assert decoded(await orch.send("POST", path, body, Idempotency_Key="key-2"))[secret] != decoded(first)[secret]


@pytest.mark.parametrize(("path", "body", "other", "secret"), CREATE, ids=[row[0] for row in CREATE])
async def test_a_secret_that_is_replayed_is_nowhere_in_plain_text(
    orch: OrchestratorHarness, tmp_path: Path, path: str, body: dict[str, Any], other: dict[str, Any], secret: str
) -> None:
    del other
    text = str(decoded(await orch.send("POST", path, body, Idempotency_Key=KEY))[secret])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    stored = b"".join(file.read_bytes() for file in files)
    # The part that cannot be guessed: no id and no prefix.
    # Both are base64url, which has "_" too.
    guarded = text.rpartition(".")[2] if "." in text else text.split("_", 2)[2]
    assert len(guarded) >= 32
    assert guarded.encode() not in stored
    assert KEY.encode() in stored, "the stored response is among the files"
    assert decoded(await orch.send("POST", path, body, Idempotency_Key=KEY))[secret] == text


async def test_a_key_is_created_once_by_calls_side_by_side(orch: OrchestratorHarness) -> None:
    before = len(await listed(orch, "/keys", "keys"))
    body = {"name": "ci", "scope": "user"}
    responses = await asyncio.gather(*(orch.send("POST", "/keys", body, Idempotency_Key=KEY) for _ in range(8)))
    assert {response.status for response in responses} == {201}
    assert len({response.body for response in responses}) == 1
    assert len(await listed(orch, "/keys", "keys")) == before + 1


async def test_a_refusal_is_replayed_as_well(orch: OrchestratorHarness) -> None:
    body = {"name": "", "scope": "user"}
    first, again = [await orch.send("POST", "/keys", body, Idempotency_Key=KEY) for _ in range(2)]
    assert (first.status, problem(first)["code"]) == (400, "invalid_body")
    assert (again.status, problem(again)["code"]) == (400, "invalid_body")
    assert again.headers["idempotent-replayed"] == "true"


CHANGE: list[tuple[str, str, Callable[[OrchestratorHarness], Awaitable[str]], Any]] = [
    ("POST", "/tasks/{id}/cancel", new_task, None),
    ("DELETE", "/keys/{id}", new_key, None),
    ("DELETE", "/joins/{id}", new_token, None),
    ("POST", "/revocations", no_target, {"kind": "jti", "value": "token-1"}),
    ("POST", "/tasks", no_target, {"goal": "do it"}),
    ("POST", "/tasks/{id}/retry", ended_task, None),
    ("POST", "/tasks/{id}/fork", ended_task, {"from": "s1"}),
    ("POST", "/tasks/{id}/pause", new_task, None),
    ("POST", "/tasks/{id}/resume", paused_task, None),
    ("POST", "/tasks/{id}/instructions", new_task, {"text": "Be brief."}),
    ("POST", "/tasks/{id}/extend", new_task, {"max_tokens": 1_000_000}),
]


@pytest.mark.parametrize(("method", "path", "make", "body"), CHANGE, ids=[f"{row[0]} {row[1]}" for row in CHANGE])
async def test_a_change_takes_effect_once_and_a_repeat_gets_the_same_response(
    orch: OrchestratorHarness, method: str, path: str, make: Callable[[OrchestratorHarness], Awaitable[str]], body: Any
) -> None:
    path = path.replace("{id}", await make(orch))
    audited = await audit_length(orch)
    first = await orch.send(method, path, body, Idempotency_Key=KEY)
    assert first.status in (200, 201), first.body
    again = await orch.send(method, path, body, Idempotency_Key=KEY)
    assert (again.status, again.body) == (first.status, first.body)
    assert again.headers["idempotent-replayed"] == "true"
    assert await audit_length(orch) == audited + 1


async def new_arm(orch: OrchestratorHarness) -> str:
    async with orchestrator_database(orch) as db, db.transaction() as tx:
        await tx.execute(
            tx.insert(admissions).values(name="weather", tenant=LOCAL_TENANT, calls=[], join_id="j", admitted_at=1.0)
        )
    return "weather"


@pytest.mark.parametrize(
    ("method", "path", "make", "body"),
    [*CHANGE, ("DELETE", "/arms/{id}", new_arm, None)],
    ids=[f"{row[0]} {row[1]}" for row in [*CHANGE, ("DELETE", "/arms/{id}")]],
)
async def test_a_change_whose_response_was_lost_to_a_crash_is_answered_alike(
    orch: OrchestratorHarness,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    make: Callable[[OrchestratorHarness], Awaitable[str]],
    body: Any,
) -> None:
    """The process dies after the transaction of the change and before its response is stored."""
    path = path.replace("{id}", await make(orch))

    async def die(*_: object, **_named: object) -> None:
        raise OctoError("The process died.", code="unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(SqlIdempotencyStore, "complete", die)
        assert (await orch.send(method, path, body, Idempotency_Key=KEY)).status == 503
    async with orchestrator_database(orch) as db, db.transaction() as tx:
        await tx.execute(update(idempotency).values(lease_until=0.0))
    again = await orch.send(method, path, body, Idempotency_Key=KEY)
    assert again.status in (200, 201), again.body
    if body is None and not path.endswith(("/retry", "/pause", "/resume")):
        # Without the key of the first call, the change is refused as done already.
        assert (await orch.send(method, path, body)).status in (400, 404, 409)


@contextlib.asynccontextmanager
async def orchestrator_database(orch: OrchestratorHarness) -> AsyncGenerator[Database]:
    [file] = [file for file in orch.home.rglob("*.db") if "orchestrator" in file.name]
    async with open_database(f"sqlite:///{file}", clock=orch.harness.clock) as db:
        yield db


async def audit_length(orch: OrchestratorHarness) -> int:
    """Return how many audit rows the tenant has, once those written so far are sealed."""
    page: dict[str, Any] = {}

    async def sealed() -> bool:
        page.update(decoded(await orch.send("GET", "/audit?limit=500")))
        marker = [row for row in page["rows"] if row["action"] == "token.revoked" and row["target"] == value]
        return bool(marker)

    value = f"marker-{orch.harness.ids.hex()}"
    await orch.send("POST", "/revocations", {"kind": "jti", "value": value})
    await wait_until(sealed, description="the marker is sealed, and so is all that was written before it")
    return len([row for row in page["rows"] if not row["target"].startswith("marker-")])


async def test_an_upload_is_addressed_by_its_bytes_and_needs_no_key(orch: OrchestratorHarness) -> None:
    async def upload(body: bytes) -> HttpResponse:
        return await orch.send("POST", "/files", body, X_File_Name="a.json", Idempotency_Key=KEY)

    first, again = await upload(b'{"a": 1}'), await upload(b'{"a": 1}')
    assert (first.status, again.status, again.body) == (201, 201, first.body)
    assert "idempotent-replayed" not in again.headers
    other = await upload(b'{"a":1}')
    assert other.status == 201
    assert decoded(other)["digest"] != decoded(first)["digest"]


async def test_another_principal_has_keys_of_its_own(orch: OrchestratorHarness) -> None:
    body = {"name": "ci", "scope": "user"}
    secret = decoded(await orch.send("POST", "/keys", {"name": "admin", "scope": "admin"}))["secret"]
    first = await orch.send("POST", "/keys", body, Idempotency_Key=KEY)
    orch.bearer = await orch.login(secret)
    theirs = await orch.send("POST", "/keys", body, Idempotency_Key=KEY)
    assert (theirs.status, "idempotent-replayed" in theirs.headers) == (201, False)
    assert decoded(theirs)["key"]["id"] != decoded(first)["key"]["id"]


@pytest.mark.parametrize("length", [1, MAX_KEY])
async def test_a_key_of_the_longest_allowed_length_is_honoured(orch: OrchestratorHarness, length: int) -> None:
    body = {"name": "ci", "scope": "user"}
    responses = [await orch.send("POST", "/keys", body, Idempotency_Key="k" * length) for _ in range(2)]
    assert [response.status for response in responses] == [201, 201]
    assert responses[1].headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize("key", [b"", b"k" * (MAX_KEY + 1), "schlüssel".encode(), "schlüssel".encode("latin-1")])
@pytest.mark.parametrize("path", ["/keys", "/joins", "/tasks"])
async def test_an_invalid_key_is_refused_before_anything_happens(
    orch: OrchestratorHarness, path: str, key: bytes
) -> None:
    status, refusal = await raw_post(orch, path, key, b'{"name":"ci","scope":"user","goal":"x"}')
    assert (status, refusal["code"]) == (400, "invalid_header")
    assert "Idempotency-Key must be 1 to 200" in refusal["detail"]


async def raw_post(orch: OrchestratorHarness, path: str, key: bytes, body: bytes) -> tuple[int, dict[str, Any]]:
    """Send a header that a well-behaved client would refuse to send."""
    url = urlsplit(orch.harness.urls["orchestrator"])
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {orch.bearer}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: "
    )
    writer.write(head.encode() + key + b"\r\n\r\n" + body)
    await writer.drain()
    async with asyncio.timeout(20):
        response = await reader.read()
    writer.close()
    start, _, payload = response.partition(b"\r\n\r\n")
    return int(start.split(b" ", 2)[1]), msgspec.json.decode(payload[payload.index(b"{") : payload.rindex(b"}") + 1])


def operations() -> dict[tuple[str, str], Operation]:
    """Return what the orchestrator declares for users, by method and path; no handler is called."""
    none: Any = None
    declared = [
        *TasksApi(*[none] * len(fields(TasksApi))).operations(),
        *SteeringApi(*[none] * len(fields(SteeringApi))).operations(),
        *file_operations(none),
        *TokensApi(*[none] * len(fields(TokensApi))).operations(),
        *ArmsApi(*[none] * len(fields(ArmsApi))).operations(),
        *AdminApi(*[none] * len(fields(AdminApi))).operations(),
        *HooksApi(*[none] * 6).operations(),
        *WebhooksApi(*[none] * 10).operations(),
        *SubscriptionsApi(none, none, none, none, none).operations(),
        *SchedulesApi(*[none] * 8).operations(),
        *SchedulesApi(*[none] * 8).operations(),
    ]
    return {(each.method, each.path): each for each in declared}


def test_every_public_write_honours_a_key() -> None:
    """A write that ignores the key would run twice when a client or the gateway retries it."""
    writes = [each for each in PUBLIC_OPERATIONS if each.method != "GET" and each.service == "orchestrator"]
    assert len(writes) >= 10
    served = operations()
    for each in writes:
        assert served[each.method, each.service_path or each.path].kind != "read_only", each.id


def test_every_secret_that_is_shown_once_is_encrypted() -> None:
    encrypted = {each.name for each in operations().values() if each.secret_response}
    holds_secret = {
        each.name
        for each in operations().values()
        if each.response in (NewHook, NewWebhook, NewKey, NewEnrolmentToken, TokenResponse)
    }
    # Token exchange is authenticated by a service, whose calls carry no key.
    assert encrypted == holds_secret - {"token.exchange"}
