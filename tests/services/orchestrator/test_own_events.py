"""Events of services: who may post which, what is stored and what only published, and those of the orchestrator."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, problem
from sqlalchemy import select

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.events import Event
from octollm.rpc.http_client import HttpResponse
from octollm.storage import open_database
from octollm.storage.tables import events
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)


def started(service: str = "memory", **changes: Any) -> Event:
    event = Event("system.started", "2025-11-10T10:30:00Z", service, {"service": service}, IDS.hex(), "system", "")
    return msgspec.structs.replace(event, **changes)


async def post(orch: OrchestratorHarness, service: str, event: Event) -> HttpResponse:
    token = orch.harness.base(service).identity.signer().sign_token("orchestrator")
    return await orch.harness.http.send(
        "POST",
        orch.harness.urls["orchestrator"] + "/events",
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        msgspec.json.encode(event),
        seconds=5,
    )


async def stored(orch: OrchestratorHarness) -> list[dict[str, Any]]:
    async with (
        open_database(f"sqlite:///{orch.home}/data/orchestrator.db", clock=CLOCK) as db,
        db.read() as connection,
    ):
        return [dict(row) for row in await connection.all(select(events).order_by(events.c.row_id).limit(500))]


async def test_an_event_of_a_service_is_stored_once_and_as_its_own(orch: OrchestratorHarness) -> None:
    event = started(source="someone", tenant="acme", subject="task/of-another")
    assert (await post(orch, "memory", event)).status == 200
    assert (await post(orch, "memory", event)).status == 200
    [row] = [row for row in await stored(orch) if row["id"] == event.id]
    assert (row["source"], row["tenant"], row["subject"]) == ("memory", "system", "service/memory")
    assert row["timestamp"] == event.timestamp


@pytest.mark.parametrize(
    ("service", "event_type", "data", "code"),
    [
        ("memory", "task.completed", {"task_id": "x", "status": "completed", "duration_ms": 1}, "scope_missing"),
        ("memory", "token.revoked", {"kind": "jti", "value": "x", "at": 1.0}, "scope_missing"),
        ("memory", "audit.recorded", {"action": "key.added"}, "scope_missing"),
        ("memory", "arm.removed", {"arm": "coder"}, "scope_missing"),
        ("coder", "cache.invalidated", {"key": "x"}, "scope_missing"),
        ("memory", "system.invented", {}, "invalid_body"),
        ("memory", "system.degraded", {"service": "memory"}, "invalid_body"),
        ("memory", "breaker.opened", {"service": 7, "instance": "x"}, "invalid_body"),
    ],
)
async def test_a_service_posts_what_it_is_declared_to_emit_and_nothing_else(
    orch: OrchestratorHarness, service: str, event_type: str, data: dict[str, object], code: str
) -> None:
    event = started(event_type=event_type, data=data)
    answer = await post(orch, service, event)
    assert problem(answer)["code"] == code
    assert event.id not in {row["id"] for row in await stored(orch)}


async def test_an_event_that_is_not_durable_is_accepted_and_not_stored(orch: OrchestratorHarness) -> None:
    event = started(event_type="cache.invalidated", data={"key": "facts/x"}, tenant="acme", subject="cache/facts")
    assert (await post(orch, "memory", event)).status == 200
    assert event.id not in {row["id"] for row in await stored(orch)}


async def test_the_orchestrator_stores_its_start_and_what_it_revokes_and_audits(orch: OrchestratorHarness) -> None:
    made = msgspec.json.decode((await orch.send("POST", "/keys", {"name": "ci", "scope": "tasks:read"})).body)
    assert (await orch.send("DELETE", f"/keys/{made['key']['id']}")).status == 200

    async def complete() -> bool:
        rows = await stored(orch)
        actions = {row["data"].get("action") for row in rows if row["event_type"] == "audit.recorded"}
        return {"key.added", "key.revoked"} <= actions

    await wait_until(complete, description="the sealed audit rows have their events")
    rows = await stored(orch)
    [start] = [row for row in rows if row["event_type"] == "system.started" and row["source"] == "orchestrator"]
    assert start["data"]["service"] == "orchestrator"
    [revoked] = [row for row in rows if row["event_type"] == "token.revoked"]
    assert (revoked["data"]["kind"], revoked["data"]["value"]) == ("cred", made["key"]["id"])
    assert revoked["tenant"] == "local"
    # In order and without a gap for each tenant; nothing of who did it, which is in the audit log.
    audited = [row for row in rows if row["event_type"] == "audit.recorded" and row["tenant"] == "local"]
    assert [row["data"]["seq"] for row in audited] == list(range(1, len(audited) + 1))
    assert all(set(row["data"]) == {"action", "seq"} for row in audited)
