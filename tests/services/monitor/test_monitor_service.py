from typing import Any

import msgspec
import pytest

from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.events import EventBus
from octollm.services.monitor.service import monitor_service
from octollm.storage import RedisKeys, open_redis
from octollm.testing import wait_until
from octollm.testing.harness import Harness, start_harness


@pytest.fixture
async def monitor(tmp_path, monkeypatch):
    monkeypatch.setattr("octollm.services.monitor.health.POLL_SECONDS", 0.05)
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with (
        start_harness() as harness,
        open_redis("memory://") as redis,
        harness.serve(monitor_service(harness.base("monitor"), settings, redis=redis)),
    ):
        yield harness, EventBus(redis, RedisKeys(), harness.clock, harness.ids)


async def states(harness: Harness) -> dict[str, Any]:
    answer = await harness.send("monitor", "GET", "/services", token=harness.token("monitor:read"))
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body)


async def state_of(harness: Harness, service: str) -> str:
    found = {state["service"]: state for state in (await states(harness))["services"]}
    assert set(found) == set(SERVICES)
    return found[service]["state"]


async def test_who_answers_is_up_and_who_does_not_is_down(monitor) -> None:
    harness, _ = monitor

    async def seen(service: str, state: str) -> bool:
        return await state_of(harness, service) == state

    await wait_until(lambda: seen("orchestrator", "up"), description="the orchestrator is seen")
    assert await state_of(harness, "coder") == "unknown"
    harness.urls["coder"] = "http://127.0.0.1:9"
    await wait_until(lambda: seen("coder", "down"), description="the coder is missed")
    harness.urls["coder"] = harness.urls["monitor"]
    await wait_until(lambda: seen("coder", "up"), description="the coder is back")


async def test_events_are_heard(monitor) -> None:
    harness, bus = monitor

    async def ready() -> bool:
        answer = await harness.send("monitor", "GET", "/ready")
        return msgspec.json.decode(answer.body)["status"] == "ready"

    await wait_until(ready, description="the monitor listens")
    await bus.publish(
        "breaker.opened", subject="x", tenant="system", source="x", data={"service": "x", "instance": "y"}
    )

    async def is_received() -> bool:
        return (await states(harness))["events"] == 1

    await wait_until(is_received, description="the event is heard")
    metrics = (await harness.send("monitor", "GET", "/metrics")).body.decode()
    assert 'octollm_events_total{event_type="breaker.opened"} 1.0' in metrics


async def test_the_wrong_token_is_refused(monitor) -> None:
    harness, _ = monitor
    for token, status in ((None, 401), (harness.token("memory:read"), 401), (harness.token("monitor:write"), 403)):
        assert (await harness.send("monitor", "GET", "/services", token=token)).status == status


async def test_it_describes_itself(monitor) -> None:
    harness, _ = monitor
    answer = await harness.send("monitor", "GET", "/openapi.json")
    assert answer.status == 200
