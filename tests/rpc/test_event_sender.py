"""A service's own events: queued, sent in order, repeated while the orchestrator is away, and never without a bound."""

from __future__ import annotations

import asyncio

import pytest

from octollm.contracts.events import Event
from octollm.contracts.observability import DependencyStatus
from octollm.errors import OctoError
from octollm.resilience import Backoff, Ejection, Recovery
from octollm.rpc import event_sender as sending
from octollm.rpc.event_sender import MAX_BUFFERED, EventSender
from octollm.rpc.health import DependencyWatch
from octollm.telemetry import Metrics, get_logger
from octollm.testing import ManualClock, wait_until

CLOCK = ManualClock()


class Ids:
    def __init__(self) -> None:
        self.count = 0

    def hex(self) -> str:
        self.count += 1
        return f"{self.count:032x}"


class Orchestrator:
    """Takes events, or refuses them with ``error``."""

    def __init__(self) -> None:
        self.accepted: list[Event] = []
        self.tries = 0
        self.error: OctoError | None = None

    async def deliver(self, event: Event) -> None:
        self.tries += 1
        if self.error is not None:
            raise self.error
        self.accepted.append(event)

    def types(self) -> list[str]:
        return [event.event_type for event in self.accepted]


@pytest.fixture
def orchestrator() -> Orchestrator:
    return Orchestrator()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("memory")


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch, orchestrator: Orchestrator, metrics: Metrics) -> EventSender:
    monkeypatch.setattr(sending, "SEND_BACKOFF", Backoff(0.001, 0.002))
    made = EventSender("memory", CLOCK, Ids(), log=get_logger("memory"), metrics=metrics)  # type: ignore[arg-type]
    made.deliver = orchestrator.deliver
    return made


def count(metrics: Metrics, outcome: str) -> float:
    labels = {"service": "memory", "outcome": outcome}
    return metrics.registry.get_sample_value("octollm_events_sent_total", labels) or 0


async def test_events_are_sent_in_order(sender: EventSender, orchestrator: Orchestrator, metrics: Metrics) -> None:
    async with sender.run():
        sender.emit_lifecycle("system.started", release="1")
        sender.emit("cache.invalidated", {"key": "facts/x"}, tenant="acme", subject="cache/facts")
        await wait_until(lambda: len(orchestrator.accepted) == 2, description="both events")
    started, invalidated = orchestrator.accepted
    assert (started.tenant, started.subject) == ("system", "service/memory")
    assert started.data == {"service": "memory", "instance": sender.instance, "release": "1"}
    assert (invalidated.tenant, invalidated.subject, invalidated.source) == ("acme", "cache/facts", "memory")
    assert count(metrics, "sent") == 2


@pytest.mark.parametrize("event_type", ["task.completed", "token.revoked", "webhook.dead", "task.invented"])
def test_a_type_that_the_service_is_no_producer_of_is_refused(sender: EventSender, event_type: str) -> None:
    with pytest.raises(ValueError, match="not declared as a producer"):
        sender.emit(event_type, {})


async def test_an_outage_keeps_the_order_and_loses_nothing(sender: EventSender, orchestrator: Orchestrator) -> None:
    orchestrator.error = OctoError("away", code="unavailable")
    async with sender.run():
        sender.emit_lifecycle("system.started")
        await wait_until(lambda: orchestrator.tries > 2, description="further attempts")
        sender.emit_lifecycle("system.degraded", reason="r")
        orchestrator.error = None
        await wait_until(lambda: len(orchestrator.accepted) == 2, description="both events")
    assert orchestrator.types() == ["system.started", "system.degraded"]


async def test_the_oldest_is_dropped_and_counted_when_too_many_wait(
    sender: EventSender, orchestrator: Orchestrator, metrics: Metrics
) -> None:
    for number in range(MAX_BUFFERED + 3):
        sender.emit("cache.invalidated", {"key": str(number)})
    async with sender.run():
        await wait_until(lambda: len(orchestrator.accepted) == MAX_BUFFERED, description="what was kept")
    assert orchestrator.accepted[0].data == {"key": "3"}
    assert count(metrics, "dropped") == 3


async def test_a_refused_event_is_dropped_and_the_next_one_sent(
    sender: EventSender, orchestrator: Orchestrator, metrics: Metrics
) -> None:
    orchestrator.error = OctoError("no", code="scope_missing")
    async with sender.run():
        sender.emit_lifecycle("system.started")
        await wait_until(lambda: count(metrics, "dropped") == 1, description="the refusal")
        orchestrator.error = None
        sender.emit_lifecycle("system.degraded", reason="r")
        await wait_until(lambda: orchestrator.types() == ["system.degraded"], description="the next event")


async def test_the_end_sends_what_waits_and_counts_what_is_lost(
    sender: EventSender, orchestrator: Orchestrator, metrics: Metrics
) -> None:
    async with sender.run():
        pass
    async with sender.run():
        await asyncio.sleep(0)
        sender.emit_lifecycle("system.drained")
    assert orchestrator.types() == ["system.drained"]
    orchestrator.error = OctoError("away", code="unavailable")
    async with sender.run():
        sender.emit_lifecycle("system.drained")
    assert count(metrics, "dropped") == 1


async def test_a_service_without_an_orchestrator_sends_nothing(sender: EventSender, metrics: Metrics) -> None:
    sender.deliver = None
    async with sender.run():
        sender.emit_lifecycle("system.started")
    assert count(metrics, "dropped") == 0


async def test_a_breaker_has_one_event_for_each_change(sender: EventSender, orchestrator: Orchestrator) -> None:
    async with sender.run():
        sender.record_breaker("judge", Ejection("http://j:1", "failing", 5.0))
        sender.record_breaker("judge", Ejection("http://j:1", "failing", 10.0, reopened=True))
        sender.record_breaker("judge", Recovery("http://j:1"))
        await wait_until(lambda: len(orchestrator.accepted) == 2, description="both changes")
    opened, closed = orchestrator.accepted
    assert opened.event_type == "breaker.opened"
    assert opened.data == {"service": "judge", "instance": "http://j:1", "reason": "failing", "seconds": 5.0}
    assert (closed.event_type, closed.data) == ("breaker.closed", {"service": "judge", "instance": "http://j:1"})


async def test_a_dependency_is_reported_once_for_each_outage() -> None:
    state = DependencyStatus(ok=True)
    reported: list[tuple[str, str]] = []

    async def check() -> DependencyStatus:
        return state

    watch = DependencyWatch({"redis": check}, CLOCK, lambda *told: reported.append(told), get_logger("memory"))
    await watch.observe()
    state = DependencyStatus(ok=False, detail="it is away")
    await watch.observe()
    await watch.observe()
    assert reported == [("redis", "it is away")]
    state = DependencyStatus(ok=True)
    await watch.observe()
    state = DependencyStatus(ok=False, detail="away again")
    await watch.observe()
    assert reported == [("redis", "it is away"), ("redis", "away again")]
