from __future__ import annotations

from typing import Any

import msgspec
import pytest

from octollm.capability import ServiceTokenSigner, SigningKey
from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.context import TraceContext
from octollm.services.monitor.service import monitor_service
from octollm.services.monitor.span_store import SpanStore
from octollm.storage import open_database, open_redis
from octollm.storage.migrations import migrate
from octollm.telemetry.otlp import encode_spans
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE, Span
from octollm.testing.harness import Harness, start_harness

TRACE = "a" * 32


def span(span_id: str, service: str = "coder", parent: str = "", **attributes: Any) -> Span:
    named = {TENANT_ATTRIBUTE: attributes.pop("tenant", "default"), TASK_ATTRIBUTE: attributes.pop("task", "task-1")}
    start = 1_700_000_000_000_000_000
    return Span(
        service,
        "execute",
        "server",
        TraceContext(TRACE, span_id * 16),
        parent * 16,
        start,
        start + 5_000_000,
        {**{name: value for name, value in named.items() if value}, **attributes},
    )


@pytest.fixture
async def house(tmp_path):
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with (
        start_harness() as house,
        open_redis("memory://") as redis,
        house.serve(monitor_service(house.base("monitor"), settings, redis=redis)),
    ):
        yield house


async def send(house: Harness, spans: list[Span], peer: str = "coder", token: str | None = None):
    signed = token or house.base(peer).identity.signer().sign_token("monitor")
    return await house.send("monitor", "POST", "/v1/traces", token=signed, body=encode_spans(spans, "1"))


async def read(house: Harness, task: str = "task-1", **token: Any):
    bearer = house.token("monitor:read", **{"task": None, **token})
    answer = await house.send("monitor", "GET", f"/traces?task={task}", token=bearer)
    return answer.status, msgspec.json.decode(answer.body)


async def test_spans_are_taken_once_and_read_by_their_task(house: Harness) -> None:
    sent = [span("1", note="x"), span("2", parent="1"), span("3", task="task-2")]
    for _ in range(2):
        answer = await send(house, sent)
        assert (answer.status, answer.body) == (200, b"{}")
    status, found = await read(house)
    assert status == 200
    assert [each["span_id"] for each in found["spans"]] == ["1" * 16, "2" * 16]
    first = found["spans"][0]
    assert first["attributes"] == {"note": "x"}
    assert (first["service"], first["name"], first["duration_ms"]) == ("coder", "execute", 5.0)


async def test_a_service_writes_under_its_own_name_alone(house: Harness) -> None:
    await send(house, [span("1", service="orchestrator")], peer="coder")
    _, found = await read(house)
    assert [each["service"] for each in found["spans"]] == ["coder"]
    # Nor does it keep another from telling of the same span.
    await send(house, [span("1", service="judge")], peer="judge")
    _, found = await read(house)
    assert {each["service"] for each in found["spans"]} == {"coder", "judge"}


async def test_only_registered_services_may_write(house: Harness) -> None:
    stranger = ServiceTokenSigner(SigningKey.generate("stranger"), "stranger", house.clock, house.ids)
    imposter = ServiceTokenSigner(SigningKey.generate("coder"), "coder", house.clock, house.ids)
    own = house.base("coder").identity.signer()
    for token in (
        stranger.sign_token("monitor"),
        imposter.sign_token("monitor"),
        own.sign_token("orchestrator"),
        house.token("monitor:read"),
        house.token("monitor:write"),
        "nonsense",
    ):
        assert (await send(house, [span("1")], token=token)).status == 401
    assert (await house.send("monitor", "POST", "/v1/traces", body=encode_spans([span("1")], "1"))).status == 401
    assert (await read(house))[1]["spans"] == []


async def test_without_the_directory_nobody_is_believed(house: Harness) -> None:
    del house.urls["orchestrator"]
    assert (await send(house, [span("1")])).status == 503


async def test_a_tenant_sees_its_own_spans_only(house: Harness) -> None:
    await send(house, [span("1"), span("2", tenant="rival"), span("3", parent="2", tenant="", task="")])
    _, found = await read(house)
    assert [each["span_id"] for each in found["spans"]] == ["1" * 16]
    _, found = await read(house, tenant="rival")
    assert [each["span_id"] for each in found["spans"]] == ["2" * 16, "3" * 16]
    _, found = await read(house, tenant="nobody")
    assert found["spans"] == []


async def test_a_token_for_a_task_opens_that_task_alone(house: Harness) -> None:
    await send(house, [span("1")])
    own = house.token("monitor:read", task="task-1")
    answer = await house.send("monitor", "GET", "/traces?task=task-1", token=own)
    assert (answer.status, len(msgspec.json.decode(answer.body)["spans"])) == (200, 1)
    bearer = house.token("monitor:read", task="task-2")
    answer = await house.send("monitor", "GET", "/traces?task=task-1", token=bearer)
    assert (answer.status, msgspec.json.decode(answer.body)["code"]) == (404, "task_not_found")
    answer = await house.send("monitor", "GET", "/traces", token=bearer)
    assert (answer.status, msgspec.json.decode(answer.body)["code"]) == (400, "invalid_parameter")
    answer = await house.send("monitor", "GET", "/traces?task=task-1", token=house.token("memory:read"))
    assert answer.status == 401


async def test_malformed_and_too_large_requests_are_refused_with_the_place(house: Harness) -> None:
    signed = house.base("coder").identity.signer().sign_token("monitor")
    wrong = encode_spans([span("1")], "1").replace(TRACE.encode(), b"xyz")
    answer = await house.send("monitor", "POST", "/v1/traces", token=signed, body=wrong)
    problem = msgspec.json.decode(answer.body)
    assert (answer.status, problem["code"]) == (400, "invalid_body")
    assert problem["errors"][0]["pointer"].endswith("/traceId")
    for body, status in ((b"\x0a\x00", 400), (b" " * (5 * 1024 * 1024), 413)):
        assert (await house.send("monitor", "POST", "/v1/traces", token=signed, body=body)).status == status


@pytest.fixture
async def db():
    async with open_database("memory://", clock=SystemClock()) as db:
        await migrate(db, "monitor")
        yield db


async def test_an_arm_of_somebody_elses_is_found_below_the_calls_that_it_served_only(db) -> None:
    store = SpanStore(db)
    await store.add([span("1"), span("2", service="translator", parent="1"), span("3", service="translator")])
    found = await store.read_task("default", "task-1")
    assert [each.span_id for each in found.spans] == ["1" * 16, "2" * 16]


async def test_secrets_of_a_careless_arm_are_masked(db) -> None:
    store = SpanStore(db)
    careless = span("2", service="translator", parent="1", authorization="Bearer x", note="eyJabcdef.eyJabc.sig")
    await store.add([span("1"), careless])
    found = await store.read_task("default", "task-1")
    assert found.spans[1].attributes == {"authorization": "***", "note": "***"}


async def test_old_spans_and_too_many_are_forgotten(db) -> None:
    store = SpanStore(db, max_spans=2)
    await store.add([span(str(number)) for number in range(1, 6)])
    assert await store.prune() == 3
    assert await store.prune() == 0
    found = await store.read_task("default", "task-1")
    assert [each.span_id[0] for each in found.spans] == ["4", "5"]
    assert await SpanStore(db, max_age=-1).prune() == 2
    assert (await store.read_task("default", "task-1")).spans == ()
