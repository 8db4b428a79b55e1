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
async def watched(tmp_path, monkeypatch):
    monkeypatch.setattr("octollm.services.monitor.health.POLL_SECONDS", 0.05)
    settings = read_settings({"OCTOLLM_HOME": str(tmp_path)}, ())
    async with (
        start_harness() as house,
        open_redis("memory://") as redis,
        house.serve(monitor_service(house.base("monitor"), settings, redis=redis)),
    ):
        yield house, EventBus(redis, RedisKeys(), house.clock, house.ids)


async def states(house: Harness) -> dict[str, Any]:
    answer = await house.send("monitor", "GET", "/services", token=house.token("monitor:read"))
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body)


async def state_of(house: Harness, service: str) -> str:
    found = {state["service"]: state for state in (await states(house))["services"]}
    assert set(found) == set(SERVICES)
    return found[service]["state"]


async def test_who_answers_is_up_and_who_does_not_is_down(watched) -> None:
    house, _ = watched

    async def seen(service: str, state: str) -> bool:
        return await state_of(house, service) == state

    await wait_until(lambda: seen("orchestrator", "up"), description="the orchestrator is seen")
    assert await state_of(house, "coder") == "unknown"
    house.urls["coder"] = "http://127.0.0.1:9"
    await wait_until(lambda: seen("coder", "down"), description="the coder is missed")
    house.urls["coder"] = house.urls["monitor"]
    await wait_until(lambda: seen("coder", "up"), description="the coder is back")


async def test_events_are_heard(watched) -> None:
    house, bus = watched

    async def ready() -> bool:
        answer = await house.send("monitor", "GET", "/ready")
        return msgspec.json.decode(answer.body)["status"] == "ready"

    await wait_until(ready, description="the monitor listens")
    await bus.publish(
        "breaker.opened", subject="x", tenant="system", source="x", data={"service": "x", "instance": "y"}
    )

    async def heard() -> bool:
        return (await states(house))["events"] == 1

    await wait_until(heard, description="the event is heard")
    metrics = (await house.send("monitor", "GET", "/metrics")).body.decode()
    assert 'octollm_events_total{event_type="breaker.opened"} 1.0' in metrics


async def test_the_wrong_token_is_refused(watched) -> None:
    house, _ = watched
    for token, status in ((None, 401), (house.token("memory:read"), 401), (house.token("monitor:write"), 403)):
        assert (await house.send("monitor", "GET", "/services", token=token)).status == status


async def test_it_describes_itself(watched) -> None:
    house, _ = watched
    answer = await house.send("monitor", "GET", "/openapi.json")
    assert answer.status == 200
