"""The trace of a goal through every service, as its owner reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from gateway_client import GatewayClient
from scripts import default_reply

from octollm.cli.critical_path import find_critical_path
from octollm.cli.span_tree import build_tree
from octollm.contracts.observability import SpanView
from octollm.contracts.services import SERVICES
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, ScriptedReply
from octollm.testing.system import installation

pytestmark = pytest.mark.sandbox
GOAL = "Write a Python function double(number) with tests"


async def spans_of(gateway: GatewayClient, task_id: str, settled: str = "task") -> list[dict[str, Any]]:
    """Return the spans of a task once that of its run is there and no more come."""
    found: list[dict[str, Any]] = []

    async def is_complete() -> bool:
        nonlocal found
        answer = await gateway.client.get(f"/tasks/{task_id}/trace")
        assert answer.status_code == 200, answer.text
        before, found = len(found), answer.json()["spans"]
        ids = {span["span_id"] for span in found}
        joined = all(span["parent_id"] in ids for span in found if span["parent_id"])
        return joined and before == len(found) and any(span["name"] == settled for span in found)

    await wait_until(is_complete, description="the trace is whole", interval=0.3, timeout=20)
    return found


async def test_every_span_of_a_goal_reaches_one_root_and_tells_by_which_authority(
    gateway: GatewayClient, tmp_path: Path
) -> None:
    task = await gateway.run(GOAL)
    assert task["status"] == "completed"
    spans = await spans_of(gateway, task["task_id"])
    by_id = {span["span_id"]: span for span in spans}
    assert not [span for span in spans if span["trace_id"] != task["trace_id"]]
    roots = [span for span in spans if not span["parent_id"]]
    assert [(root["service"], root["name"]) for root in roots] == [("reflex", "tasks.submit")]
    assert {span["service"] for span in spans} >= set(SERVICES) - {"monitor", "memory", "retriever"}
    names = {span["name"] for span in spans}
    assert {"task", "plan", "step s1", "attempt 1", "accept", "sandbox python"} <= names

    path = find_critical_path(build_tree(msgspec.convert(spans, list[SpanView])))
    waited_for = {share.waited_for: share.mostly_in for share in path.waited_for}
    assert waited_for["sandbox"] == "executor sandbox python"
    assert "queue" in waited_for, waited_for

    def line(span: dict[str, Any]) -> list[dict[str, Any]]:
        found = [span]
        while found[-1]["parent_id"]:
            found.append(by_id[found[-1]["parent_id"]])
            assert len(found) <= len(spans), "a span is its own caller"
        return found

    assert all(line(span)[-1] is roots[0] for span in spans)
    # coder → judge → executor: each was given less than the one before.
    runs = [span for span in spans if (span["service"], span["name"], span["kind"]) == ("executor", "run", "server")]
    [run, *_] = [span for span in runs if ("judge", "validate") in {(up["service"], up["name"]) for up in line(span)}]
    links = [msgspec.json.decode(link) for link in run["attributes"]["octollm.chain"]]
    chain = {name: [link[name] for link in links] for name in ("iss", "aud", "scope", "jti")}
    assert (chain["iss"][:3], chain["iss"][-1]) == (["orchestrator", "coder", "judge"], "judge")
    assert (chain["aud"][:3], chain["aud"][-1]) == (["coder", "judge", "executor"][: len(chain["aud"])], "executor")
    assert chain["scope"][-1] == "executor:run"
    allowed = [msgspec.json.decode(text) for text in chain["scope"][:-1]]
    assert "executor:run" in allowed[0]["judge:validate"]
    assert len(set(chain["jti"])) == len(chain["jti"]) >= 3
    validate = next(up for up in line(run) if (up["service"], up["name"]) == ("judge", "validate"))
    assert msgspec.json.decode(validate["attributes"]["octollm.chain"][-1])["scope"] == "judge:validate"

    [first, *_] = [span for span in spans if "gen_ai.request.model" in span["attributes"]]
    used = first["attributes"]
    assert (used["gen_ai.operation.name"], used["gen_ai.provider.name"]) == ("chat", "openai")
    assert used["gen_ai.response.finish_reasons"] == ["stop"]
    assert used["gen_ai.request.max_tokens"] > 0
    assert used["gen_ai.usage.input_tokens"] > 0
    assert used["octollm.first_token_ms"] >= 0
    total = sum(
        span["attributes"].get(f"gen_ai.usage.{kind}_tokens", 0) for span in spans for kind in ("input", "output")
    )
    assert total == task["usage"]["prompt_tokens"] + task["usage"]["completion_tokens"]
    sandbox = next(span["attributes"] for span in spans if span["name"] == "sandbox python")
    assert (sandbox["process.exit.code"], sandbox["octollm.limit"]) == (0, "")

    # No token anywhere: not in a span, not in the log, not in the database.
    log = (tmp_path / "home" / "logs" / "octollm.jsonl").read_text()
    kept = b"".join(file.read_bytes() for file in (tmp_path / "home" / "data").glob("monitor.db*"))
    assert "eyJ" not in msgspec.json.encode(spans).decode() + log
    assert b"eyJ" not in kept
    assert gateway.system.local_key.encode() not in kept


async def test_a_client_that_traces_is_joined_and_its_flag_honoured(gateway: GatewayClient, script: Any) -> None:
    script.reply = lambda asked: default_reply(asked) if asked.schema else ScriptedReply("SELECT ", hangs=True)
    trace_id, caller = "c" * 32, "d" * 16
    body = {"goal": GOAL, "budget": {"max_time_seconds": 1}}
    sampled = await gateway.client.post("/tasks", json=body, headers={"traceparent": f"00-{trace_id}-{caller}-01"})
    silent = await gateway.client.post("/tasks", json=body, headers={"traceparent": f"00-{trace_id}-{caller}-00"})
    task, other = sampled.json()["task_id"], silent.json()["task_id"]
    for each in (task, other):
        assert (await gateway.finished(each))["trace_id"] == trace_id

    async def failed() -> list[Any]:
        spans = (await gateway.client.get(f"/tasks/{task}/trace")).json()["spans"]
        return [span for span in spans if span["name"] == "task"]

    await wait_until(failed, description="the task's span is there")
    [span] = await failed()
    assert span["code"] == "deadline_exceeded"
    spans = (await gateway.client.get(f"/tasks/{task}/trace")).json()["spans"]
    assert [each["name"] for each in spans if each["parent_id"] == caller] == ["tasks.submit"]
    assert (await gateway.client.get(f"/tasks/{other}/trace")).json()["spans"] == []


async def test_a_task_that_is_taken_over_goes_on_in_its_trace(
    tmp_path: Path, model: ScriptedModel, script: Any
) -> None:
    settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
    script.reply = lambda asked: default_reply(asked) if asked.schema else ScriptedReply("def ", hangs=True)
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        task_id = await GatewayClient(system, client).submit(GOAL)
        await wait_until(lambda: model.active == 1 and len(model.requests) > 1, description="the model is writing")
    script.reply = default_reply
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        gateway = GatewayClient(system, client)
        assert (await gateway.finished(task_id))["status"] == "completed"
        spans = await spans_of(gateway, task_id)
    runs = [span for span in spans if span["name"] == "task"]
    assert [run["attributes"]["octollm.run"] for run in runs] == [1, 2]
    assert runs[0]["code"] == "cancelled"
    assert runs[0]["parent_id"] == runs[1]["parent_id"]
    assert len({span["trace_id"] for span in spans}) == 1


async def test_nobody_elses_trace_is_read(gateway: GatewayClient) -> None:
    answer = await gateway.client.get("/tasks/task-" + "0" * 32 + "/trace")
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
    made = await gateway.client.post("/keys", json={"name": "no reader", "scope": "tasks:create"})
    secret = made.json()["secret"]
    task_id = await gateway.submit(GOAL)
    answer = await gateway.client.get(f"/tasks/{task_id}/trace", headers={"Authorization": f"Bearer {secret}"})
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
    await gateway.finished(task_id)


async def test_a_take_over_of_planning_pays_for_no_model_call_again(
    tmp_path: Path, model: ScriptedModel, script: Any
) -> None:
    settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}

    def designs() -> int:
        return sum(asked.system.startswith("You plan work for a team") for asked in model.requests)

    # The model's plan cannot be used, twice; then the planner asks for titles, and dies while it waits for them.
    script.reply = lambda asked: (
        ScriptedReply("{", hangs=True)
        if asked.system.startswith("You plan work. Write for each step")
        else default_reply(asked)
    )
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        task_id = await GatewayClient(system, client).submit(GOAL)
        await wait_until(lambda: model.active == 1 and designs() == 2, description="the titles are asked for")
    script.reply = default_reply
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        assert (await GatewayClient(system, client).finished(task_id))["status"] == "completed"
    assert designs() == 2
