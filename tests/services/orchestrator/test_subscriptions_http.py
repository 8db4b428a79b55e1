"""Durable subscriptions over HTTP, as an arm or an outsider uses them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from orchestrator_kit import OrchestratorHarness, problem

from octollm.framing import iter_sse

TASK_EVENTS = {"patterns": ["events:task:*"], "retry_first": 0.01, "retry_limit": 0.02, "max_attempts": 2}


async def put(orch: OrchestratorHarness, name: str = "billing", **spec: Any) -> dict[str, Any]:
    answer = await orch.send("PUT", f"/subscriptions/{name}", TASK_EVENTS | {"start": "earliest"} | spec)
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body)


async def poll(orch: OrchestratorHarness, query: str = "wait=5", name: str = "billing") -> list[dict[str, Any]]:
    answer = await orch.send("GET", f"/subscriptions/{name}/events?{query}")
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body)["deliveries"]


TYPES = ["task.accepted", "task.planning", "task.planned", "task.started", "task.completed"]


async def poll_until_completed(orch: OrchestratorHarness) -> list[dict[str, Any]]:
    """Return the deliveries once the last event of a task is among them: what is not acknowledged comes again."""
    for _ in range(200):
        found = await poll(orch)
        if found and found[-1]["event"]["event_type"] == "task.completed":
            return found
    raise AssertionError("no end of the task")


async def ack(orch: OrchestratorHarness, *ack_ids: str, name: str = "billing", **more: Any) -> Any:
    return await orch.send("POST", f"/subscriptions/{name}/ack", {"acked": list(ack_ids), **more})


async def lag(orch: OrchestratorHarness) -> dict[str, Any]:
    return msgspec.json.decode((await orch.send("GET", "/subscriptions/billing")).body)["lag"]


async def test_a_subscriber_polls_acknowledges_and_continues(orch: OrchestratorHarness) -> None:
    view = await put(orch)
    assert (view["name"], view["spec"]["patterns"]) == ("billing", ["events:task:*"])
    task = await orch.run({"goal": "one"})
    found = await poll_until_completed(orch)
    assert [delivery["event"]["event_type"] for delivery in found] == TYPES
    assert {delivery["event"]["data"]["task_id"] for delivery in found} == {task.task_id}
    assert [d["ack_id"] for d in await poll(orch)] == [d["ack_id"] for d in found], "not acknowledged, so again"
    for _ in range(2):  # an acknowledgement whose answer was lost is repeated
        assert (await ack(orch, *(d["ack_id"] for d in found))).status == 200
    assert await poll(orch, "wait=0") == []
    await orch.run({"goal": "two"})
    assert (await poll(orch))[0]["event"]["event_type"] == "task.accepted"
    assert (await lag(orch))["positions"] > 0


async def test_the_end_of_what_was_read_is_no_lag(orch: OrchestratorHarness) -> None:
    await put(orch, patterns=["events:audit:*"])
    await orch.run({"goal": "one"})
    await poll(orch, "wait=0")
    assert (await lag(orch))["dead"] == 0
    listed = msgspec.json.decode((await orch.send("GET", "/subscriptions")).body)["subscriptions"]
    assert [(row["name"], len(row["consumers"])) for row in listed] == [("billing", 1)]


async def test_acknowledgements_out_of_order_made_up_or_under_an_old_lease_are_refused(
    orch: OrchestratorHarness,
) -> None:
    await put(orch)
    await orch.run({"goal": "one"})
    found = await poll_until_completed(orch)
    early = problem(await ack(orch, found[2]["ack_id"]))
    assert (early["status"], early["code"], early["errors"][0]["pointer"]) == (409, "ack_out_of_order", "/acked/0")
    for made_up in ("", "l.1.1.1.99999999", "x" * 300, "\x1b[31m"):
        wrong = problem(await ack(orch, made_up))
        assert wrong["status"] in (400, 409)
        assert "\x1b" not in wrong["detail"]
    stranger = problem(await ack(orch, found[0]["ack_id"], consumer="stranger"))
    assert stranger["code"] == "lease_lost"
    answer = await orch.send("POST", "/subscriptions/billing/replay", {"after": 0})
    assert msgspec.json.decode(answer.body) == {"after": 0}
    assert problem(await ack(orch, found[0]["ack_id"]))["code"] == "lease_lost"
    again = await poll(orch)
    assert again[0]["event"] == found[0]["event"]
    assert (await ack(orch, again[0]["ack_id"])).status == 200


async def test_a_failed_delivery_comes_again_and_becomes_a_dead_letter(orch: OrchestratorHarness) -> None:
    await put(orch)
    await orch.run({"goal": "one"})
    found = await poll_until_completed(orch)
    first = found[0]
    assert (await ack(orch, failed=[{"ack_id": first["ack_id"], "reason": "no disk"}])).status == 200
    (again, *_) = await poll(orch)
    assert (again["event"]["id"], again["attempt"]) == (first["event"]["id"], 2)
    assert (await ack(orch, failed=[{"ack_id": again["ack_id"], "reason": "no disk"}])).status == 200
    (letter,) = msgspec.json.decode((await orch.send("GET", "/dead-letters")).body)["dead_letters"]
    assert (letter["state"], letter["reason"], letter["attempts"]) == ("dead", "no disk", 2)
    assert letter["event"]["id"] == first["event"]["id"]
    rest: list[str] = []
    while len(rest) < len(found) - 1:
        for delivery in await poll(orch):
            rest.append(delivery["event"]["event_type"])
            assert (await ack(orch, delivery["ack_id"])).status == 200
    assert rest == [delivery["event"]["event_type"] for delivery in found[1:]]
    assert (await orch.send("POST", f"/dead-letters/{letter['id']}/retry")).status == 200
    (retried,) = await poll(orch)
    assert retried["event"]["id"] == first["event"]["id"]
    assert (await ack(orch, retried["ack_id"])).status == 200
    assert problem(await orch.send("DELETE", f"/dead-letters/{letter['id']}"))["code"] == "dead_letter_not_found"


async def test_consumers_share_what_there_is(orch: OrchestratorHarness) -> None:
    await put(orch)
    await poll(orch, "wait=0&consumer=a")
    await poll(orch, "wait=0&consumer=b")
    await poll(orch, "wait=0&consumer=a")  # gives up its surplus
    await poll(orch, "wait=0&consumer=b")
    consumers = msgspec.json.decode((await orch.send("GET", "/subscriptions/billing")).body)["consumers"]
    assert {row["consumer"]: row["partitions"] for row in consumers} == {"a": 32, "b": 32}
    tasks = [await orch.run({"goal": f"goal {n}"}) for n in range(3)]
    by_consumer = {name: await poll(orch, f"wait=1&consumer={name}") for name in "ab"}
    subjects = [{d["event"]["subject"] for d in found} for found in by_consumer.values()]
    assert not subjects[0] & subjects[1]
    assert subjects[0] | subjects[1] == {f"task/{task.task_id}" for task in tasks}


async def test_deliveries_stream_as_server_sent_events(orch: OrchestratorHarness) -> None:
    await put(orch)
    await orch.run({"goal": "one"})
    seen: list[str] = []
    headers = {"Authorization": f"Bearer {orch.bearer}", "Accept": "text/event-stream"}
    url = orch.harness.urls["orchestrator"] + "/subscriptions/billing/events?limit=2"
    async with orch.harness.http.stream("GET", url, headers, None, seconds=20) as streamed:
        async for data in iter_sse(streamed.chunks, 1 << 20):
            if data is None:
                continue
            delivery = msgspec.json.decode(data)
            seen.append(delivery["event"]["event_type"])
            assert (await ack(orch, delivery["ack_id"])).status == 200
            if delivery["event"]["event_type"] == "task.completed":
                break
    assert seen == TYPES


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"patterns": ["events:tasks:*"]}, "/patterns/0"),
        ({"patterns": []}, "/patterns"),
        ({"patterns": ["events:task:*"], "on_poison": "explode"}, "/on_poison"),
        ({"patterns": ["events:task:*"], "max_attempts": 0}, "/max_attempts"),
        ({"patterns": ["events:task:*"], "start": 99999}, "/after"),
        ({"patterns": ["events:task:*"], "nonsense": 1}, ""),
    ],
)
async def test_a_wrong_subscription_is_refused_with_its_place(
    orch: OrchestratorHarness, body: dict[str, Any], pointer: str
) -> None:
    refused = problem(await orch.send("PUT", "/subscriptions/billing", body))
    assert refused["status"] == 400
    assert [fault["pointer"] for fault in refused["errors"]][:1] == [pointer] or refused["code"] == "unknown_field"


@pytest.mark.parametrize("name", ["UPPER", "a%2Fb", "x" * 65, "%1b"])
async def test_a_wrong_name_is_refused(orch: OrchestratorHarness, name: str) -> None:
    answer = await orch.send("PUT", f"/subscriptions/{name}", TASK_EVENTS)
    assert answer.status in (400, 403, 404)


async def test_a_name_that_no_scope_can_have_is_named(orch: OrchestratorHarness) -> None:
    refused = problem(await orch.send("PUT", "/subscriptions/Bad%20Name%1b", TASK_EVENTS))
    assert (refused["status"], refused["code"]) == (400, "invalid_parameter")
    assert "name 'Bad Name\\x1b'" in refused["detail"]


async def test_another_tenant_sees_nothing_of_it(orch: OrchestratorHarness) -> None:
    await put(orch)
    await orch.run({"goal": "one"})
    found = await poll_until_completed(orch)
    await ack(orch, failed=[{"ack_id": found[0]["ack_id"], "reason": "r", "final": True}])
    (letter,) = msgspec.json.decode((await orch.send("GET", "/dead-letters")).body)["dead_letters"]
    made = await orch.send("POST", "/keys", {"name": "theirs", "scope": "user", "tenant": "other"})
    ours, orch.bearer = orch.bearer, await orch.login(msgspec.json.decode(made.body)["secret"])
    for method, path, body in (
        ("GET", "/subscriptions/billing", None),
        ("DELETE", "/subscriptions/billing", None),
        ("GET", "/subscriptions/billing/events?wait=0", None),
        ("POST", "/subscriptions/billing/ack", {"acked": [found[1]["ack_id"]]}),
        ("POST", "/subscriptions/billing/replay", {"after": 0}),
        ("POST", f"/dead-letters/{letter['id']}/retry", None),
        ("DELETE", f"/dead-letters/{letter['id']}", None),
        ("GET", "/dead-letters?subscription=billing", None),
    ):
        assert problem(await orch.send(method, path, body))["status"] == 404, path
    assert msgspec.json.decode((await orch.send("GET", "/dead-letters")).body)["dead_letters"] == []
    # A subscription of the same name is another one, and has none of our events.
    await put(orch)
    assert await poll(orch, "wait=0") == []
    orch.bearer = ours
    assert (await lag(orch))["dead"] == 1


async def test_a_key_may_be_for_one_subscription(orch: OrchestratorHarness) -> None:
    await put(orch)
    made = await orch.send("POST", "/keys", {"name": "narrow", "scope": "events:subscribe:billing"})
    orch.bearer = await orch.login(msgspec.json.decode(made.body)["secret"])
    assert await poll(orch, "wait=0") == []
    assert problem(await orch.send("GET", "/subscriptions/other/events"))["code"] == "scope_missing"
    assert problem(await orch.send("GET", "/subscriptions"))["code"] == "scope_missing"
