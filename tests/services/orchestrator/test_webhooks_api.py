"""Webhooks of a real orchestrator: who may make them, what they show, test delivery, replay."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, Script, orchestrator_kit, problem
from webhook_kit import Receiver, receiver

from octollm.contracts.webhooks import NewWebhook, WebhookDeliveryList, WebhookTestResult, WebhookView
from octollm.rpc.http_client import HttpResponse
from octollm.testing import wait_until


@pytest.fixture
async def receiver_server() -> AsyncGenerator[Receiver]:
    async with receiver() as found:
        yield found


@pytest.fixture
async def orch(tmp_path: Path, script: Script, receiver_server: Receiver) -> AsyncGenerator[OrchestratorHarness]:
    async with orchestrator_kit(tmp_path, script, OCTOLLM_EGRESS_ORIGINS=receiver_server.url) as found:
        yield found


def body(receiver_server: Receiver, **more: Any) -> dict[str, Any]:
    return {"url": receiver_server.url + "/in", "patterns": ["events:task:*"], **more}


async def create(orch: OrchestratorHarness, receiver_server: Receiver, **more: Any) -> NewWebhook:
    answer = await orch.send("POST", "/webhooks", body(receiver_server, **more))
    assert answer.status == 201, answer.body
    return msgspec.json.decode(answer.body, type=NewWebhook)


async def view(orch: OrchestratorHarness, webhook_id: str) -> WebhookView:
    return msgspec.json.decode((await orch.send("GET", f"/webhooks/{webhook_id}")).body, type=WebhookView)


async def log(orch: OrchestratorHarness, webhook_id: str, query: str = "") -> WebhookDeliveryList:
    answer = await orch.send("GET", f"/webhooks/{webhook_id}/deliveries{query}")
    return msgspec.json.decode(answer.body, type=WebhookDeliveryList)


def refused(answer: HttpResponse) -> tuple[int, str]:
    return answer.status, problem(answer)["code"]


async def test_a_task_s_events_are_delivered_listed_and_replayed_with_their_ids(
    orch: OrchestratorHarness, receiver_server: Receiver
):
    new = await create(orch, receiver_server, data={"status": "completed"}, patterns=["events:task:completed"])
    receiver_server.secrets = [new.secret]
    task = await orch.run({"goal": "do it"})
    await wait_until(lambda: receiver_server.received, description="the delivery", timeout=15)
    [event] = receiver_server.received
    assert (event["event_type"], event["data"]["task_id"]) == ("task.completed", task.task_id)
    [logged] = [each for each in await orch.history(task.task_id) if each["event_type"] == "task.completed"]
    assert event == logged

    async def stored() -> bool:
        return (await log(orch, new.webhook.id, "?state=delivered")).deliveries != ()

    await wait_until(stored, description="the outcome is stored")
    [delivery] = (await log(orch, new.webhook.id)).deliveries
    assert (delivery.event_id, delivery.attempts, delivery.last_status) == (event["id"], 1, 204)
    for number, again in enumerate(({"event_ids": [event["id"]]}, {"after": 0}), start=2):
        answer = await orch.send("POST", f"/webhooks/{new.webhook.id}/replay", again)
        assert msgspec.json.decode(answer.body)["queued"] == 1
        # At least once: on a busy machine it may come twice.
        await wait_until(lambda: len(receiver_server.received) >= number, description="the replay", timeout=15)  # noqa: B023
    assert {each["id"] for each in receiver_server.received} == {event["id"]}
    assert (await view(orch, new.webhook.id)).last_delivered_at is not None


async def test_a_test_delivery_says_what_the_receiver_answered(orch: OrchestratorHarness, receiver_server: Receiver):
    new = await create(orch, receiver_server)
    answer = await orch.send("POST", f"/webhooks/{new.webhook.id}/test")
    result = msgspec.json.decode(answer.body, type=WebhookTestResult)
    # The receiver does not know the secret yet.
    assert (result.delivered, result.status, result.error) == (False, 400, "The receiver answered 400.")
    receiver_server.secrets = [new.secret]
    result = msgspec.json.decode((await orch.send("POST", f"/webhooks/{new.webhook.id}/test")).body)
    assert (result["delivered"], result["status"]) == (True, 204)
    assert receiver_server.received[0]["event_type"] == "webhook.test"
    answer = await orch.send("POST", f"/webhooks/{new.webhook.id}/secret", {"overlap_seconds": 60})
    rotated = msgspec.json.decode(answer.body, type=NewWebhook)
    assert rotated.webhook.secrets == 2
    receiver_server.secrets = [rotated.secret]
    assert msgspec.json.decode((await orch.send("POST", f"/webhooks/{new.webhook.id}/test")).body)["delivered"]


async def test_a_disabled_webhook_gets_nothing_until_it_is_enabled(
    orch: OrchestratorHarness, receiver_server: Receiver
):
    new = await create(orch, receiver_server)
    receiver_server.secrets = [new.secret]
    answer = await orch.send("PUT", f"/webhooks/{new.webhook.id}", body(receiver_server, enabled=False))
    assert msgspec.json.decode(answer.body)["state"] == "disabled"
    await orch.run({"goal": "unseen"})
    assert refused(await orch.send("POST", f"/webhooks/{new.webhook.id}/replay", {})) == (409, "state_conflict")
    answer = await orch.send(
        "PUT", f"/webhooks/{new.webhook.id}", body(receiver_server, patterns=["events:task:accepted"])
    )
    assert msgspec.json.decode(answer.body, type=WebhookView).state == "active"
    await orch.run({"goal": "seen"})
    await wait_until(lambda: receiver_server.received, description="the delivery", timeout=15)
    assert [event["data"]["goal"] for event in receiver_server.received] == ["seen"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"url": "http://127.0.0.1:1/"}, 403, "url_refused"),
        ({"url": "https://169.254.169.254/"}, 403, "url_refused"),
        ({"url": "https://user@example.com/"}, 403, "url_refused"),
        ({"patterns": ["events:nothing:*"]}, 400, "invalid_body"),
        ({"patterns": []}, 400, "invalid_body"),
        ({"format": "xml"}, 400, "invalid_body"),
        ({"unknown": 1}, 400, "unknown_field"),
    ],
)
async def test_a_webhook_that_cannot_work_is_refused(
    orch: OrchestratorHarness, receiver_server: Receiver, change: dict[str, Any], status: int, code: str
):
    assert refused(await orch.send("POST", "/webhooks", body(receiver_server, **change))) == (status, code)


async def test_only_who_may_read_events_has_them_sent_and_tenants_are_apart(
    orch: OrchestratorHarness, receiver_server: Receiver
):
    new = await create(orch, receiver_server)
    local = orch.bearer
    made = await orch.send("POST", "/keys", {"name": "writer", "scope": "webhooks:write webhooks:read"})
    orch.bearer = await orch.login(msgspec.json.decode(made.body)["secret"])
    assert refused(await orch.send("POST", "/webhooks", body(receiver_server))) == (403, "authority_missing")
    orch.bearer = local
    made = await orch.send("POST", "/keys", {"name": "first", "scope": "admin", "tenant": "acme"})
    orch.bearer = await orch.login(msgspec.json.decode(made.body)["secret"])
    assert msgspec.json.decode((await orch.send("GET", "/webhooks")).body) == {"webhooks": []}
    path = f"/webhooks/{new.webhook.id}"
    for method, where, sent in (
        ("GET", path, None),
        ("PUT", path, body(receiver_server)),
        ("DELETE", path, None),
        ("POST", f"{path}/secret", {}),
        ("POST", f"{path}/test", None),
        ("POST", f"{path}/replay", {}),
        ("GET", f"{path}/deliveries", None),
    ):
        assert refused(await orch.send(method, where, sent)) == (404, "not_found")
    orch.bearer = local
    for where in ("/webhooks", path, "/audit?limit=500"):
        assert new.secret[6:].encode() not in (await orch.send("GET", where)).body
    assert (await orch.send("DELETE", path)).status == 200
    assert refused(await orch.send("GET", path)) == (404, "not_found")
