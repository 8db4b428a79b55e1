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
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE, ExportBuffer, Span
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
async def monitor(tmp_path):
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with start_harness() as harness, open_redis("memory://") as redis:
        base = harness.base("monitor")
        async with harness.serve(monitor_service(base, settings, redis=redis)):
            yield harness, base.spans


@pytest.fixture
def harness(monitor):
    return monitor[0]


async def send(harness: Harness, spans: list[Span], peer: str = "coder", token: str | None = None):
    signed = token or harness.base(peer).identity.signer().sign_token("monitor")
    return await harness.send("monitor", "POST", "/v1/traces", token=signed, body=encode_spans(spans, "1"))


async def read(harness: Harness, task: str = "task-1", **token: Any):
    bearer = harness.token("monitor:read", **{"task": None, **token})
    answer = await harness.send("monitor", "GET", f"/traces?task={task}", token=bearer)
    return answer.status, msgspec.json.decode(answer.body)


async def test_spans_are_taken_once_and_read_by_their_task(harness: Harness) -> None:
    sent = [span("1", note="x"), span("2", parent="1"), span("3", task="task-2")]
    for _ in range(2):
        answer = await send(harness, sent)
        assert (answer.status, answer.body) == (200, b"{}")
    status, found = await read(harness)
    assert status == 200
    assert [each["span_id"] for each in found["spans"]] == ["1" * 16, "2" * 16]
    first = found["spans"][0]
    assert first["attributes"] == {"note": "x"}
    assert (first["service"], first["name"], first["duration_ms"]) == ("coder", "execute", 5.0)


async def test_a_service_writes_under_its_own_name_alone(harness: Harness) -> None:
    await send(harness, [span("1", service="orchestrator")], peer="coder")
    _, found = await read(harness)
    assert [each["service"] for each in found["spans"]] == ["coder"]
    # Nor does it keep another from telling of the same span.
    await send(harness, [span("1", service="judge")], peer="judge")
    _, found = await read(harness)
    assert {each["service"] for each in found["spans"]} == {"coder", "judge"}


async def test_only_registered_services_may_write(harness: Harness) -> None:
    stranger = ServiceTokenSigner(SigningKey.generate("stranger"), "stranger", harness.clock, harness.ids)
    imposter = ServiceTokenSigner(SigningKey.generate("coder"), "coder", harness.clock, harness.ids)
    own = harness.base("coder").identity.signer()
    for token in (
        stranger.sign_token("monitor"),
        imposter.sign_token("monitor"),
        own.sign_token("orchestrator"),
        harness.token("monitor:read"),
        harness.token("monitor:write"),
        "nonsense",
    ):
        assert (await send(harness, [span("1")], token=token)).status == 401
    assert (await harness.send("monitor", "POST", "/v1/traces", body=encode_spans([span("1")], "1"))).status == 401
    assert (await read(harness))[1]["spans"] == []


async def test_without_the_directory_nobody_is_believed(harness: Harness) -> None:
    del harness.urls["orchestrator"]
    assert (await send(harness, [span("1")])).status == 503


async def test_a_tenant_sees_its_own_spans_only(harness: Harness) -> None:
    await send(harness, [span("1"), span("2", tenant="rival"), span("3", parent="2", tenant="", task="")])
    _, found = await read(harness)
    assert [each["span_id"] for each in found["spans"]] == ["1" * 16]
    _, found = await read(harness, tenant="rival")
    assert [each["span_id"] for each in found["spans"]] == ["2" * 16, "3" * 16]
    _, found = await read(harness, tenant="nobody")
    assert found["spans"] == []


async def test_a_token_for_a_task_opens_that_task_alone(harness: Harness) -> None:
    await send(harness, [span("1")])
    own = harness.token("monitor:read", task="task-1")
    answer = await harness.send("monitor", "GET", "/traces?task=task-1", token=own)
    assert (answer.status, len(msgspec.json.decode(answer.body)["spans"])) == (200, 1)
    bearer = harness.token("monitor:read", task="task-2")
    answer = await harness.send("monitor", "GET", "/traces?task=task-1", token=bearer)
    assert (answer.status, msgspec.json.decode(answer.body)["code"]) == (404, "task_not_found")
    answer = await harness.send("monitor", "GET", "/traces", token=bearer)
    assert (answer.status, msgspec.json.decode(answer.body)["code"]) == (400, "invalid_parameter")
    answer = await harness.send("monitor", "GET", "/traces?task=task-1", token=harness.token("memory:read"))
    assert answer.status == 401


async def test_the_request_that_reads_a_trace_is_no_span_of_its_task(
    monitor: tuple[Harness, ExportBuffer[Span]],
) -> None:
    harness, exported = monitor
    await send(harness, [span("1")])
    exported.take(100)
    sampled = {"traceparent": f"00-{'b' * 32}-{'c' * 16}-01"}
    reading = harness.token("monitor:read", task="task-1")
    answer = await harness.send("monitor", "GET", "/traces?task=task-1", token=reading, headers=sampled)
    assert answer.status == 200
    own = exported.take(100)
    assert "traces.read" in [each.name for each in own]
    await send(harness, own, peer="monitor")
    _, found = await read(harness)
    assert [each["trace_id"] for each in found["spans"]] == [TRACE]


async def test_malformed_and_too_large_requests_are_refused_with_the_place(harness: Harness) -> None:
    signed = harness.base("coder").identity.signer().sign_token("monitor")
    wrong = encode_spans([span("1")], "1").replace(TRACE.encode(), b"xyz")
    answer = await harness.send("monitor", "POST", "/v1/traces", token=signed, body=wrong)
    problem = msgspec.json.decode(answer.body)
    assert (answer.status, problem["code"]) == (400, "invalid_body")
    assert problem["errors"][0]["pointer"].endswith("/traceId")
    for body, status in ((b"\x0a\x00", 400), (b" " * (5 * 1024 * 1024), 413)):
        assert (await harness.send("monitor", "POST", "/v1/traces", token=signed, body=body)).status == status


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
