from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from events_kit import CLOCK, IDS, QUICK, MakePublisher, Write
from redis_process import RedisProcess
from sqlalchemy import text

from octollm.contracts.events import Event
from octollm.events import EventBus, EventLog, Gap, OutboxPolicy
from octollm.storage.engines import Database
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import PubSub, RedisClient, open_redis
from octollm.testing import wait_until


async def listen(redis: RedisClient, *channels: str) -> PubSub:
    pubsub = redis.pubsub()
    await pubsub.subscribe(*channels)
    for _ in channels:
        assert (message := await pubsub.receive(5.0)) is not None
        assert message.subscribed
    return pubsub


async def take(pubsub: PubSub, count: int) -> list[Any]:
    found: list[Any] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            message = await pubsub.receive(1.0)
            if message is not None:
                found.append(json.loads(message.data))
    return found


async def test_each_event_is_published_on_its_channel_and_to_the_watchers_of_its_task(
    redis: RedisClient, keys: RedisKeys, make_publisher: MakePublisher, write: Write
) -> None:
    names = [keys.channel("events:task:completed"), keys.watch("task-1")]
    listeners = [await listen(redis, name) for name in names]
    async with make_publisher(redis):
        await write("task.completed", duration_ms=1234)
        (event,), (watched,) = [await take(listener, 1) for listener in listeners]
    assert event["event_type"] == "task.completed"
    assert event["source"] == "orchestrator"
    assert event["data"] == {"task_id": "task-1", "status": "completed", "duration_ms": 1234}
    assert event["timestamp"].endswith("Z")
    assert (event["seq"], event["prev"], event["version"], event["tenant"]) == (1, 0, 1, "t")
    assert watched == event
    for listener in listeners:
        await listener.close()


async def test_everything_comes_once_and_in_order(
    redis: RedisClient, bus: EventBus, make_publisher: MakePublisher, write: Write
) -> None:
    gaps: list[Gap] = []
    async with bus.subscribe("events:*", on_gap=gaps.append) as events, make_publisher(redis):
        async with asyncio.timeout(20):
            await asyncio.gather(*(write(task_id=f"task-{n % 5}") for n in range(100)))
            found = [await anext(events) for _ in range(100)]
    assert [event.seq for event in found] == list(range(1, 101))
    assert gaps == []


async def test_batches_are_bounded_and_join_up(
    redis: RedisClient,
    keys: RedisKeys,
    make_publisher: MakePublisher,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(30):
        await write(progress="x" * 100)
    batches: list[list[bytes]] = []
    publish = redis.publish

    async def record(messages: Sequence[tuple[str, bytes]]) -> None:
        await publish(messages)
        batches.append([payload for channel, payload in messages if channel.startswith(keys.channel("events:"))])

    monkeypatch.setattr(redis, "publish", record)
    async with make_publisher(redis, policy=OutboxPolicy(poll=0.05, batch=12, batch_bytes=1500)) as publisher:
        assert await publisher.flush(10)
    assert len(batches) > 3
    assert all(sum(map(len, batch)) <= 1500 for batch in batches)
    assert [json.loads(payload)["seq"] for batch in batches for payload in batch] == list(range(1, 31))


async def test_a_relay_goes_on_where_the_last_one_stopped(
    redis: RedisClient, bus: EventBus, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await write()
        assert await publisher.flush(5)
        assert publisher.health.last_published == 1
    await write()
    async with bus.subscribe("events:task:*") as events, make_publisher(redis):
        async with asyncio.timeout(5):
            assert (await anext(events)).seq == 2


async def test_of_two_relays_one_works_and_the_other_takes_over(
    redis: RedisClient, bus: EventBus, make_publisher: MakePublisher, write: Write
) -> None:
    async with bus.subscribe("events:task:*") as events, make_publisher(redis) as first:
        await wait_until(lambda: first.health.is_leader, description="the first one holds")
        async with make_publisher(redis) as second:
            await write()
            assert (await anext(events)).seq == 1
            assert not second.health.is_leader
            assert second.health.degraded is None
            await first.__aexit__(None, None, None)
            await wait_until(lambda: second.health.is_leader, description="the second one takes over")
            await write()
            async with asyncio.timeout(5):
                assert (await anext(events)).seq == 2


async def test_a_relay_whose_lease_was_taken_steps_back(
    db: Database, redis: RedisClient, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await wait_until(lambda: publisher.health.is_leader, description="it holds")
        async with db.transaction() as tx:
            await tx.execute(text("UPDATE relay_state SET fence = fence + 1, lease_until = lease_until + 1000"))
        await write()
        await wait_until(lambda: not publisher.health.is_leader, description="it steps back")
        assert publisher.health.degraded is None


async def test_a_write_of_another_process_is_found_without_a_wake(
    db: Database, redis: RedisClient, bus: EventBus, make_publisher: MakePublisher
) -> None:
    elsewhere = EventLog(db, CLOCK, IDS)
    async with bus.subscribe("events:task:*") as events, make_publisher(redis):
        async with db.transaction() as tx:
            await elsewhere.append(tx, "task.started", subject="task/x", tenant="t", source="o", data={"task_id": "x"})
        async with asyncio.timeout(5):
            assert (await anext(events)).seq == 1


async def test_trouble_with_the_database_shows_and_passes(
    db: Database, redis: RedisClient, bus: EventBus, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await wait_until(lambda: publisher.health.is_leader, description="it holds")
        async with db.transaction() as tx:
            await tx.execute(text("ALTER TABLE channels RENAME TO hidden"))
        await write()
        await wait_until(lambda: publisher.health.degraded, description="the trouble shows")
        async with db.transaction() as tx:
            await tx.execute(text("ALTER TABLE hidden RENAME TO channels"))
        assert await publisher.flush(5)
        await wait_until(lambda: publisher.health.degraded is None, description="the trouble has passed")


async def test_a_fault_of_the_program_is_not_swallowed(
    redis: RedisClient, make_publisher: MakePublisher, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(messages: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(redis, "publish", broken)
    with pytest.raises(ZeroDivisionError):
        async with make_publisher(redis) as publisher:
            await write()
            await wait_until(lambda: publisher.health.degraded, description="the crash shows")
            assert publisher.health.degraded == "Background loop 'outbox publishing' stopped: ZeroDivisionError."
            with pytest.raises(ZeroDivisionError):
                await publisher.flush(5)


async def test_numbering_goes_on_without_redis(make_publisher: MakePublisher, log: EventLog, write: Write) -> None:
    async with open_redis("redis://127.0.0.1:1/0") as nowhere, make_publisher(nowhere) as publisher:
        for _ in range(5):
            await write()
        await wait_until(lambda: publisher.health.last_sequenced == 5, description="all have a number")
        await wait_until(lambda: publisher.health.degraded, description="it says what is wrong")
        assert "Redis does not answer" in (publisher.health.degraded or "")
        assert publisher.health.last_published == 0
        assert not await publisher.flush(0.05)
        assert len(await log.read(0, tenant="t")) == 5


async def test_nothing_is_lost_when_redis_is_killed(
    redis_process: RedisProcess, keys: RedisKeys, log: EventLog, make_publisher: MakePublisher, write: Write
) -> None:
    """A listener that reads the log at each gap has every event once and in order, over three kills."""
    total, seen = 300, []
    behind = asyncio.Event()

    async def follow(redis: RedisClient) -> None:
        def missed(gap: Gap) -> None:
            behind.set()

        async with EventBus(redis, keys, CLOCK, IDS).subscribe("events:*", on_gap=missed) as events:
            ready.set()
            pending: asyncio.Task[Event] = asyncio.ensure_future(anext(events))
            while len(seen) < total:
                gap = asyncio.ensure_future(behind.wait())
                await asyncio.wait([pending, gap], return_when=asyncio.FIRST_COMPLETED)
                gap.cancel()
                if behind.is_set():
                    behind.clear()
                    seen.extend(event.seq for event in await log.read(seen[-1] if seen else 0, tenant=None))
                if pending.done():
                    event = pending.result()
                    if event.seq > (seen[-1] if seen else 0):
                        seen.append(event.seq)
                    pending = asyncio.ensure_future(anext(events))
            pending.cancel()

    ready = asyncio.Event()
    async with open_redis(redis_process.url) as redis, make_publisher(redis, policy=QUICK) as publisher:
        following = asyncio.create_task(follow(redis))
        await ready.wait()
        for number in range(total):
            await write(task_id=f"task-{number % 7}")
            if number in (50, 150, 250):
                redis_process.kill()
            if number in (100, 200):
                redis_process.start()
        await wait_until(
            lambda: publisher.health.last_sequenced == total, description="all have a number while Redis is down"
        )
        assert publisher.health.last_published < total
        await wait_until(lambda: publisher.health.degraded, description="it says what is wrong")
        redis_process.start()
        assert await publisher.flush(20)
        await wait_until(lambda: publisher.health.degraded is None, description="the trouble has passed")
        async with asyncio.timeout(20):
            await following
    assert seen == list(range(1, total + 1))


async def test_the_cursor_stands_still_while_redis_is_down(
    redis_process: RedisProcess, keys: RedisKeys, make_publisher: MakePublisher, write: Write
) -> None:
    async with open_redis(redis_process.url) as redis:
        async with make_publisher(redis) as publisher:
            await write()
            assert await publisher.flush(5)
            redis_process.kill()
            for _ in range(10):
                await write()
            await wait_until(lambda: publisher.health.last_sequenced == 11, description="all have a number")
            assert publisher.health.last_published == 1
        redis_process.start()
        listener = await listen(redis, keys.watch("task-1"))
        async with make_publisher(redis):
            positions = [event["seq"] for event in await take(listener, 10)]
        assert positions == list(range(2, 12))
        await listener.close()
