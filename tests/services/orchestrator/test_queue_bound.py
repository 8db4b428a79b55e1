"""Backpressure: how many tasks may wait."""

from __future__ import annotations

import pytest
from task_kit import TENANT, TaskKit, open_task_kit

from octollm.errors import OctoError
from octollm.services.orchestrator.submission import REFRESH_SECONDS, QueueBound
from octollm.telemetry import Metrics, get_logger
from octollm.testing import wait_until


async def refusal(bound: QueueBound, tenant: str) -> OctoError:
    with pytest.raises(OctoError) as caught:
        await bound.admit(tenant)
    assert caught.value.retry_after
    return caught.value


async def fill(kit: TaskKit, count: int) -> None:
    for _ in range(count):
        await kit.submit()


async def test_a_tenant_and_the_installation_have_bounds() -> None:
    async with open_task_kit() as kit:
        await fill(kit, 2)
        bound = QueueBound(kit.db, kit.clock, 4, 3)
        await bound.admit(TENANT)
        assert (await refusal(bound, TENANT)).code == "rate_limited"
        await bound.admit("other")
        assert (await refusal(bound, "other")).code == "overloaded"


async def test_claimed_tasks_make_room_with_the_next_count() -> None:
    async with open_task_kit() as kit:
        await fill(kit, 2)
        bound = QueueBound(kit.db, kit.clock, 0, 2)
        assert (await refusal(bound, TENANT)).code == "rate_limited"
        await kit.claim()
        assert (await refusal(bound, TENANT)).code == "rate_limited", "counted a moment ago"
        kit.clock.advance(REFRESH_SECONDS)
        await bound.admit(TENANT)


async def test_zero_is_no_bound() -> None:
    async with open_task_kit() as kit:
        await fill(kit, 3)
        bound = QueueBound(kit.db, kit.clock, 0, 0)
        for _ in range(5):
            await bound.admit(TENANT)


async def test_the_waiting_tasks_are_a_metric() -> None:
    metrics = Metrics("orchestrator")
    async with open_task_kit() as kit:
        await fill(kit, 3)
        await kit.claim()
        async with QueueBound(kit.db, kit.clock, 0, 0).watch(metrics, get_logger("orchestrator")):
            await wait_until(lambda: b"octollm_tasks_waiting 2.0" in metrics.text(), description="two tasks wait")
