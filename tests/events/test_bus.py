from __future__ import annotations

import asyncio

import msgspec
import pytest
from events_kit import CLOCK, IDS, MakePublisher, Write
from hypothesis import given
from hypothesis import strategies as st
from redis_process import RedisProcess

from octollm.contracts.events import Event, channel_of
from octollm.errors import OctoError
from octollm.events import EventBus, Gap
from octollm.events.bus import GapDetector
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import RedisClient, open_redis
from octollm.testing import wait_until


def event(seq: int, prev: int = 0, event_type: str = "task.progress") -> Event:
    return Event(
        event_type=event_type,
        timestamp="2025-11-10T10:30:00Z",
        source="o",
        data={},
        id=str(seq),
        tenant="t",
        subject="task/x",
        seq=seq,
        prev=prev,
        version=seq,
    )


async def send(redis: RedisClient, keys: RedisKeys, *events: Event) -> None:
    await redis.publish([(keys.channel(channel_of(e.event_type)), msgspec.json.encode(e)) for e in events])


async def test_a_subscriber_gets_what_is_published_while_it_listens(
    redis: RedisClient, bus: EventBus, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await write()
        assert await publisher.flush(5)
        async with bus.subscribe("events:task:*") as events:
            await write("task.completed")
            async with asyncio.timeout(5):
                found = await anext(events)
    assert (found.event_type, found.seq) == ("task.completed", 2)


async def test_an_event_that_is_not_kept_is_published_at_once(bus: EventBus) -> None:
    async with bus.subscribe("events:cache:*") as events:
        sent = await bus.publish("cache.invalidated", subject="cache/x", tenant="t", source="memory", data={"key": "x"})
        async with asyncio.timeout(5):
            assert await anext(events) == sent
    assert (sent.seq, sent.prev, sent.version) == (0, 0, 0)


@pytest.mark.parametrize(
    ("event_type", "data"), [("task.started", {"task_id": "x"}), ("cache.invalidated", {}), ("no.such", {})]
)
async def test_only_declared_events_that_are_not_durable_may_be_published(
    bus: EventBus, event_type: str, data: dict[str, object]
) -> None:
    with pytest.raises(OctoError) as caught:
        await bus.publish(event_type, subject="x", tenant="t", source="o", data=data)
    assert caught.value.code == "invalid_body"


async def test_a_missing_predecessor_is_told_before_the_event(
    redis: RedisClient, keys: RedisKeys, bus: EventBus
) -> None:
    order: list[object] = []
    async with bus.subscribe("events:task:*", on_gap=order.append) as events:
        await send(redis, keys, event(1), event(2, 1), event(2, 1), event(9, 7), event(10, 9))
        for _ in range(4):
            async with asyncio.timeout(5):
                order.append((await anext(events)).seq)
    assert order == [1, 2, Gap("missed", 2, "events:task:progress"), 9, 10]
    assert events.gaps == 1


async def test_what_is_no_event_is_counted_and_left_out(redis: RedisClient, keys: RedisKeys, bus: EventBus) -> None:
    channel = keys.channel("events:task:progress")
    async with bus.subscribe("events:task:*") as events:
        await redis.publish([(channel, b"no json"), (channel, b"{}"), (channel, b'{"task_id": "x"}')])
        await send(redis, keys, event(1, event_type="task.invented"), event(2))
        async with asyncio.timeout(5):
            assert (await anext(events)).seq == 2
    assert events.malformed == 4


async def test_a_slow_subscriber_is_told_what_it_missed_and_slows_nobody(
    redis: RedisClient, keys: RedisKeys, bus: EventBus
) -> None:
    gaps: list[Gap] = []
    async with bus.subscribe("events:*", on_gap=gaps.append, capacity=3) as slow, bus.subscribe("events:*") as quick:
        await send(redis, keys, *(event(n, n - 1) for n in range(1, 11)))
        async with asyncio.timeout(5):
            assert [(await anext(quick)).seq for _ in range(10)] == list(range(1, 11))
            await wait_until(lambda: slow._overflow_gap is not None, description="the queue is full")
            assert [(await anext(slow)).seq for _ in range(3)] == [1, 2, 3]
            waiting = asyncio.ensure_future(anext(slow))
            await wait_until(lambda: gaps, description="the gap is told without another event")
            await send(redis, keys, event(11, 10))
            assert (await waiting).seq == 11
    assert gaps == [Gap("overflow", 3)]


async def test_a_reconnect_is_told(redis_process: RedisProcess, keys: RedisKeys) -> None:
    gaps: list[Gap] = []
    async with open_redis(redis_process.url) as redis:
        bus = EventBus(redis, keys, CLOCK, IDS)
        async with bus.subscribe("events:task:*", on_gap=gaps.append) as events:
            await send(redis, keys, event(5))
            assert (await anext(events)).seq == 5
            waiting = asyncio.ensure_future(anext(events))
            redis_process.kill()
            await wait_until(lambda: events.degraded, description="it says what is wrong")
            redis_process.start()
            await wait_until(lambda: gaps, description="the reconnect is told")
            assert gaps == [Gap("reconnected", 5)]
            assert events.degraded is None
            await send(redis, keys, event(7, 6))
            async with asyncio.timeout(5):
                assert (await waiting).seq == 7


async def test_a_subscription_without_redis_is_refused(keys: RedisKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.events.bus.READY_SECONDS", 0.2)
    async with open_redis("redis://127.0.0.1:1/0") as redis:
        with pytest.raises(OctoError, match="Redis does not answer") as caught:
            async with EventBus(redis, keys, CLOCK, IDS).subscribe("events:*"):
                pass
    assert caught.value.code == "unavailable"


async def test_a_waiting_subscriber_can_be_cancelled(bus: EventBus) -> None:
    async with bus.subscribe("events:*") as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=1)
        assert done


@given(st.lists(st.sampled_from(["task.progress", "task.completed", "arm.healthy"]), max_size=30), st.data())
def test_a_follower_sees_each_loss_behind_the_first_event_of_a_channel(types: list[str], data: st.DataObject) -> None:
    latest: dict[str, int] = {}
    chain: list[Event] = []
    for seq, event_type in enumerate(types, start=1):
        chain.append(event(seq, latest.get(event_type, 0), event_type))
        latest[event_type] = seq
    arrives = [data.draw(st.sampled_from(["once", "twice", "never"])) for _ in chain]
    follower = GapDetector()
    seen: dict[str, int] = {}
    for item, how in zip(chain, arrives, strict=True):
        if how == "never":
            continue
        new, gap = follower.observe(item)
        assert new
        known = seen.get(item.event_type)
        lost = known is not None and item.prev != known
        assert gap == (Gap("missed", known or 0, channel_of(item.event_type)) if lost else None)
        seen[item.event_type] = item.seq
        if how == "twice":
            assert follower.observe(item) == (False, None)
    assert follower.latest == max(seen.values(), default=0)
