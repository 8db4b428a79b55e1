from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from document_files import encrypted_office_file
from orchestrator_kit import OrchestratorHarness, Script, problem

from octollm.arm import Context
from octollm.contracts.internal import (
    ClaimBatch,
    ClaimRequest,
    ClaimResponseBatch,
    ReserveRequest,
    ReserveResponse,
    SettleRequest,
)
from octollm.contracts.task import ExecuteResult, Task, Usage
from octollm.testing import wait_until

FINAL_EVENTS = ("task.completed", "task.failed", "task.cancelled")
# ruff: noqa: E501  (a case a line)
CASES: list[tuple[Any, str, str | None]] = [
    (b"{not json", "invalid_json", ""),
    (b"", "invalid_json", ""),
    ({"goal": 7}, "invalid_body", "/goal"),
    ({}, "invalid_body", ""),
    ({"goal": "x", "budget": {"max_tokens": "many"}}, "invalid_body", "/budget/max_tokens"),
    ({"goal": "x", "gaol": "y"}, "unknown_field", "/gaol"),
    ({"goal": "x", "context": {"files": [{"name": "a.txt", "text": "t", "mode": 7}]}}, "unknown_field", "/context/files/0/mode"),
    ({"goal": ""}, "goal_invalid", "/goal"),
    ({"goal": "  \n "}, "goal_invalid", "/goal"),
    ({"goal": "x" * 100_000}, "goal_invalid", "/goal"),
    ({"goal": "x", "budget": {"max_tokens": 0}}, "budget_invalid", "/budget/max_tokens"),
    ({"goal": "x", "budget": {"max_tokens": -1}}, "budget_invalid", "/budget/max_tokens"),
    ({"goal": "x", "budget": {"max_cost_usd": 0}}, "budget_invalid", "/budget/max_cost_usd"),
    ({"goal": "x", "budget": {"max_time_seconds": -3}}, "budget_invalid", "/budget/max_time_seconds"),
    ({"goal": "x", "budget": {"max_retries": 99}}, "budget_invalid", "/budget/max_retries"),
    ({"goal": "x", "deadline": "2001-01-01T00:00:00Z"}, "deadline_invalid", "/deadline"),
    ({"goal": "x", "deadline": "tomorrow"}, "deadline_invalid", "/deadline"),
    ({"goal": "x", "deadline": "2999-01-01T00:00:00"}, "deadline_invalid", "/deadline"),
    ({"goal": "x", "assigned_arm": "plumber"}, "arm_unknown", "/assigned_arm"),
    ({"goal": "x", "priority": 10**20}, "invalid_body", "/priority"),
    ({"goal": "x", "priority": -101}, "invalid_body", "/priority"),
    ({"goal": "x", "priority": 0.5}, "invalid_body", "/priority"),
    ({"goal": "x", "task_id": "task-123"}, "invalid_body", "/task_id"),
    ({"goal": "x", "context": {"files": [{"name": "a.txt"}]}}, "file_invalid", "/context/files/0"),
    ({"goal": "x", "context": {"files": [{"name": "../a", "text": "t"}]}}, "file_invalid", "/context/files/0/name"),
    ({"goal": "x", "context": {"files": [{"name": "a", "digest": "0" * 64}]}}, "file_invalid", "/context/files/0/digest"),
    (
        {"goal": "x", "context": {"files": [{"name": "a", "text": "1"}, {"name": "a", "text": "2"}]}},
        "file_invalid",
        "/context/files/1/name",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "pointer"), CASES)
async def test_a_bad_task_is_refused_with_the_place_of_the_fault(
    orch: OrchestratorHarness, body: Any, code: str, pointer: str | None
) -> None:
    answer = await orch.send("POST", "/tasks", body)
    found = problem(answer)
    assert (answer.status, found["code"], found["status"]) == (400, code, 400)
    assert found["errors"][0]["pointer"] == pointer
    assert found["request_id"] == answer.headers["x-request-id"]
    assert msgspec.json.decode((await orch.send("GET", "/tasks")).body)["tasks"] == []


async def test_a_priority_below_zero_and_a_limit_of_a_millisecond_are_taken(orch: OrchestratorHarness) -> None:
    view = await orch.run({"goal": "later", "priority": -1})
    assert view.status == "completed"
    view = await orch.run({"goal": "at once", "budget": {"max_time_seconds": 0.001}})
    assert (view.status, view.error and view.error.code) == ("failed", "deadline_exceeded")
    history = msgspec.json.decode((await orch.send("GET", f"/tasks/{view.task_id}/history")).body)["events"]
    assert [event["event_type"] for event in history if event["event_type"] in FINAL_EVENTS] == ["task.failed"]


async def test_a_binary_file_is_refused(orch: OrchestratorHarness) -> None:
    stored = await orch.send("POST", "/files", b"\x00\x01\x02" * 100, x_file_name="picture.png")
    digest = msgspec.json.decode(stored.body)["digest"]
    body = {"goal": "look", "context": {"files": [{"name": "picture.png", "digest": digest}]}}
    answer = await orch.send("POST", "/tasks", body)
    assert (answer.status, problem(answer)["code"]) == (400, "file_invalid")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"", "The file is empty, so it is no table. No arm of your own reads text/csv either."),
        ("a.json", b" \r\n", "The file is empty, so it is no table. No arm of your own reads application/json either."),
        ("a.xlsx", encrypted_office_file(), "it opens with a password only."),
        ("a.pdf", b"", "a.pdf: The file is empty, so it is no PDF. No arm of your own reads application/pdf either."),
    ],
)
async def test_a_file_that_cannot_be_read_is_refused_before_a_plan(
    orch: OrchestratorHarness, name: str, data: bytes, words: str
) -> None:
    stored = await orch.send("POST", "/files", data, x_file_name=name)
    digest = msgspec.json.decode(stored.body)["digest"]
    answer = await orch.send(
        "POST", "/tasks", {"goal": "look", "context": {"files": [{"name": name, "digest": digest}]}}
    )
    found = problem(answer)
    assert (answer.status, found["code"]) == (400, "file_encrypted" if name == "a.xlsx" else "file_invalid")
    assert found["errors"][0]["pointer"] == "/context/files/0"
    assert found["detail"].endswith(words)


async def test_a_body_over_the_limit_is_refused(orch: OrchestratorHarness) -> None:
    answer = await orch.send("POST", "/files", b"x" * (20 * 1024 * 1024 + 1), x_file_name="big.txt")
    assert (answer.status, problem(answer)["code"]) == (413, "body_too_large")


async def test_unknown_tasks_and_files_are_not_found(orch: OrchestratorHarness) -> None:
    for method, path, code in (
        ("GET", f"/tasks/task-{'0' * 32}", "task_not_found"),
        ("POST", f"/tasks/task-{'0' * 32}/cancel", "task_not_found"),
        ("GET", f"/tasks/task-{'0' * 32}/history", "task_not_found"),
        ("GET", f"/files/{'0' * 64}", "file_not_found"),
        ("GET", "/nowhere", "not_found"),
        ("GET", "/webhooks/none", "not_found"),
    ):
        answer = await orch.send(method, path)
        assert (answer.status, problem(answer)["code"]) == (404, code), path
    answer = await orch.send("DELETE", "/tasks")
    assert (answer.status, problem(answer)["code"]) == (405, "method_not_allowed")


async def test_files_are_stored_once_and_read_back(orch: OrchestratorHarness) -> None:
    first = await orch.send("POST", "/files", b"hello\n", x_file_name="a%20b.txt", content_type="text/plain")
    assert first.status == 201
    stored = msgspec.json.decode(first.body)
    assert (stored["name"], stored["size"]) == ("a b.txt", 6)
    back = await orch.send("GET", f"/files/{stored['digest']}")
    assert back.body == b"hello\n"
    cached = await orch.send("GET", f"/files/{stored['digest']}", if_none_match=back.headers["etag"])
    assert (cached.status, cached.body) == (304, b"")


async def test_tokens_are_needed_and_must_fit(orch: OrchestratorHarness) -> None:
    harness = orch.harness

    async def refused(token: str | None) -> tuple[int, str]:
        answer = await harness.send("orchestrator", "GET", "/tasks", token=token)
        if answer.status == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
        return answer.status, problem(answer)["code"]

    assert await refused(None) == (401, "token_missing")
    assert await refused("nonsense") == (401, "token_malformed")
    assert await refused(orch.bearer[:-4] + "AAAA") == (401, "token_invalid")
    assert await refused(harness.token("coder:execute")) == (401, "token_invalid")
    assert await refused(harness.token("tasks:create", task=None)) == (403, "scope_missing")
    # A service's own token opens only what services may do.
    assert (await refused(harness.base("coder").identity.signer().sign_token("orchestrator")))[0] == 401


async def test_only_reflex_may_exchange_and_only_models_may_reserve(orch: OrchestratorHarness) -> None:
    for service, path, body in (
        ("coder", "/token", {"subject_token": "octo_local_test-secret"}),
        ("coder", "/budget/settle", {"reservation": "x", "usage": {}}),
    ):
        token = orch.harness.base(service).identity.signer().sign_token("orchestrator")
        answer = await orch.harness.send("orchestrator", "POST", path, token=token, body=body)
        assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")


@pytest.mark.parametrize(
    "secret", ["", "octo_local_wrong", "octo_nobody_x", "x" * 500, "octo__", "octo_local_test-secret "]
)
async def test_a_wrong_key_is_refused_without_saying_why(orch: OrchestratorHarness, secret: str) -> None:
    signer = orch.harness.base("reflex").identity.signer()
    answer = await orch.harness.send(
        "orchestrator", "POST", "/token", token=signer.sign_token("orchestrator"), body={"subject_token": secret}
    )
    assert (answer.status, problem(answer)["code"]) == (401, "api_key_invalid")
    assert "local_test-secret" not in answer.body.decode()


async def test_keys_are_made_used_and_revoked_and_tenants_do_not_meet(orch: OrchestratorHarness) -> None:
    made = await orch.send("POST", "/keys", {"name": "ci", "scope": "tasks:read events:read"})
    assert made.status == 201, made.body
    key = msgspec.json.decode(made.body)
    assert key["secret"] not in (await orch.send("GET", "/keys")).body.decode()
    admin, narrow = orch.bearer, await orch.login(key["secret"])
    orch.bearer = narrow
    assert (await orch.send("GET", "/tasks")).status == 200
    answer = await orch.send("POST", "/tasks", {"goal": "x"})
    assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")
    wider = await orch.send("POST", "/keys", {"name": "more", "scope": "admin"})
    assert (wider.status, problem(wider)["code"]) == (403, "scope_missing")
    orch.bearer = admin
    assert (await orch.send("DELETE", f"/keys/{key['key']['id']}")).status == 200
    orch.bearer = narrow
    revoked = await orch.send("GET", "/tasks")
    assert (revoked.status, problem(revoked)["code"]) == (401, "token_revoked")


async def _reserve(
    orch: OrchestratorHarness, bearer: str, key: str, prompt: int, most: int | None
) -> ReserveResponse | str:
    token = orch.harness.base("models").identity.signer().sign_token("orchestrator")
    body = ReserveRequest(bearer, key, prompt, most, "m")
    answer = await orch.harness.send("orchestrator", "POST", "/budget/reserve", token=token, body=body)
    if answer.status >= 400:
        return str(problem(answer)["code"])
    return msgspec.json.decode(answer.body, type=ReserveResponse)


async def _settle(orch: OrchestratorHarness, reservation: str, usage: Usage, answer: bytes = b"null") -> None:
    token = orch.harness.base("models").identity.signer().sign_token("orchestrator")
    body = SettleRequest(reservation, usage, msgspec.Raw(answer))
    done = await orch.harness.send("orchestrator", "POST", "/budget/settle", token=token, body=body)
    assert done.status == 200


async def test_a_budget_is_never_exceeded_and_repeats_are_answered_from_the_journal(
    orch: OrchestratorHarness, script: Script
) -> None:
    found: list[object] = []

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        outgoing = await ctx.prepare_call("models", "chat", b"{}")
        bearer = outgoing.bearer
        first = await _reserve(orch, bearer, "k1", 100, 300)
        assert isinstance(first, ReserveResponse)
        found.append(first.max_completion_tokens)
        # While 400 of 1000 tokens are reserved, a call that wants everything gets what is left.
        second = await _reserve(orch, bearer, "k2", 100, None)
        assert isinstance(second, ReserveResponse)
        found.append(second.max_completion_tokens)
        found.append(await _reserve(orch, bearer, "k3", 10, None))
        await _settle(orch, first.reservation, Usage(100, 50), b'{"text":"kept"}')
        await _settle(orch, second.reservation, Usage(100, 500))
        again = await _reserve(orch, bearer, "k1", 100, 300)
        assert isinstance(again, ReserveResponse)
        found.append((again.reservation, bytes(again.journal)))
        found.append(await _reserve(orch, bearer, "k4", 300, 10))
        return ExecuteResult(output="ok")

    script.execute = execute
    view = await orch.run({"goal": "count", "budget": {"max_tokens": 1000}})
    assert view.status == "completed", view.error
    assert found == [300, 500, "budget_exhausted", ("", b'{"text":"kept"}'), "budget_exhausted"]
    assert (view.usage.prompt_tokens, view.usage.completion_tokens) == (200, 550)


@pytest.mark.parametrize(
    ("price", "found"), [(0.001, ["ok", "budget_exhausted"]), (0.0, ["ok", "ok"]), (None, ["budget_exhausted"] * 2)]
)
async def test_money_is_bounded_and_an_unknown_price_is_no_price(
    orch: OrchestratorHarness, script: Script, price: float | None, found: list[str]
) -> None:
    seen: list[str] = []

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        bearer = (await ctx.prepare_call("models", "chat", b"{}")).bearer
        for key in ("k1", "k2"):
            token = orch.harness.base("models").identity.signer().sign_token("orchestrator")
            body = ReserveRequest(bearer, key, 100, 100, "m", price)
            answer = await orch.harness.send("orchestrator", "POST", "/budget/reserve", token=token, body=body)
            seen.append("ok" if answer.status == 200 else problem(answer)["code"])
        return ExecuteResult(output="ok")

    script.execute = execute
    await orch.run({"goal": "spend", "budget": {"max_cost_usd": 0.3}})
    assert seen == found


async def test_a_token_made_by_hand_opens_an_arm_and_what_it_declares(
    orch: OrchestratorHarness, script: Script
) -> None:
    answer = await orch.send("POST", "/tokens", {"scope": "coder:execute", "aud": "coder"})
    assert answer.status == 200, answer.body
    token = msgspec.json.decode(answer.body)["access_token"]
    seen: list[bool] = []

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        seen.extend((ctx.allows("judge:validate"), ctx.allows("models:chat"), ctx.allows("keys:write")))
        return ExecuteResult(output=contract.goal)

    script.execute = execute
    # The ADR's client: no idempotency key, an opaque task id, members that we do not know.
    body = {"task_id": "task-123", "goal": "hi", "language": "python"}
    direct = await orch.harness.send("coder", "POST", "/execute", token=token, body=body)
    assert (direct.status, msgspec.json.decode(direct.body)["output"]) == (200, "hi")
    assert seen == [True, True, False]
    for wrong in (
        {"scope": "coder:execute", "aud": "judge"},
        {"scope": "", "aud": "coder"},
        {"scope": "a b", "aud": "x"},
    ):
        assert (await orch.send("POST", "/tokens", wrong)).status == 400
    listed = msgspec.json.decode((await orch.send("GET", "/tasks")).body)["tasks"]
    assert listed == []  # an ad-hoc task is nobody's submission


async def test_a_repeated_key_at_an_arm_is_answered_from_what_was_stored(
    orch: OrchestratorHarness, script: Script
) -> None:
    answer = await orch.send("POST", "/tokens", {"scope": "coder:execute", "aud": "coder"})
    token = msgspec.json.decode(answer.body)["access_token"]
    headers = {"Idempotency-Key": "same"}
    first = await orch.harness.send("coder", "POST", "/execute", token=token, body={"goal": "a"}, headers=headers)
    second = await orch.harness.send("coder", "POST", "/execute", token=token, body={"goal": "a"}, headers=headers)
    other = await orch.harness.send("coder", "POST", "/execute", token=token, body={"goal": "b"}, headers=headers)
    assert first.body == second.body
    assert second.headers["idempotent-replayed"] == "true"
    assert len(script.executed) == 1
    assert (other.status, problem(other)["code"]) == (409, "idempotency_conflict")


def _take_over(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as db:
        db.execute("UPDATE tasks SET run = run + 1, lease_until = lease_until + 60")
        db.commit()


async def test_calls_of_an_older_run_are_refused(orch: OrchestratorHarness, script: Script) -> None:
    asked: list[asyncio.Task[list[str]]] = []

    async def ask(bearer: str) -> list[str]:
        return [await _claim(orch, bearer, "after"), str(await _reserve(orch, bearer, "k1", 10, 10))]

    async def execute(contract: Task, ctx: Context) -> ExecuteResult:
        bearer = (await ctx.prepare_call("models", "chat", b"{}")).bearer
        assert await _claim(orch, bearer, "before") == "claimed"
        # Another orchestrator takes the task over.
        await asyncio.to_thread(_take_over, orch.home / "data" / "orchestrator.db")
        # In a task of its own: the first orchestrator cancels this step as soon as it notices.
        asked.append(asyncio.create_task(ask(bearer)))
        await asyncio.shield(asked[0])
        return ExecuteResult(output="too late")

    script.execute = execute
    task = await orch.submit({"goal": "count"})
    await wait_until(lambda: bool(asked), description="the older run asks", timeout=20)
    assert await asked[0] == ["fence_lost", "fence_lost"]
    # What the older run brings is not taken either.
    assert (await orch.task(task.task_id)).status == "running"


async def _claim(orch: OrchestratorHarness, bearer: str, key: str) -> str:
    token = orch.harness.base("models").identity.signer().sign_token("orchestrator")
    body = ClaimBatch((ClaimRequest(bearer, "chat", key, "0" * 64, repeatable=True),))
    answer = await orch.harness.send("orchestrator", "POST", "/idempotency/claim", token=token, body=body)
    found = msgspec.json.decode(answer.body, type=ClaimResponseBatch).answers[0]
    return found.outcome if found.problem is None else found.problem.code
