from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, get_args

import pytest
from events_kit import CLOCK, IDS, QUICK, MakePublisher, Write
from redis_process import RedisProcess
from sqlalchemy import text, update

from octollm.contracts.events import Event
from octollm.events import EventBus, EventLog, Gap, OutboxPolicy, OutboxPublisher
from octollm.events.outbox import FaultHook, FaultPoint
from octollm.storage import Database, Transaction
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import PubSub, RedisClient, open_redis
from octollm.storage.tables import relay_state
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
        await write(step="x" * 100)
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
            await tx.execute(text("UPDATE relay_state SET fence = fence + 1, lease_until = lease_until + 30"))
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


class CrashError(Exception):
    """What a fault hook raises: the process is gone, nothing of it goes on."""


def crash_at(point: FaultPoint, after: int = 1) -> tuple[FaultHook, asyncio.Event]:
    """Return a hook that ends the publisher when it reaches ``point`` for the ``after``-th time, at every step then."""
    crashed = asyncio.Event()
    count = 0

    async def hook(reached: FaultPoint) -> None:
        nonlocal count
        count += reached == point
        if count >= after:
            crashed.set()
            raise CrashError

    return hook, crashed


@pytest.fixture
async def memory_redis() -> AsyncIterator[RedisClient]:
    async with open_redis("memory://") as client:
        yield client


POINTS: tuple[FaultPoint, ...] = get_args(FaultPoint)


@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_any_step_loses_nothing_and_keeps_the_order(
    memory_redis: RedisClient, keys: RedisKeys, db: Database, log: EventLog, write: Write, point: FaultPoint
) -> None:
    policy = OutboxPolicy(poll=0.02, lease=0.3, backoff_initial=0.01, backoff_max=0.05, batch=3)
    listener = await listen(memory_redis, keys.channel("events:task:progress"))
    for number in range(8):
        await write(task_id=f"task-{number % 2}")
    hook, crashed = crash_at(point)
    first = OutboxPublisher(db, log, memory_redis, CLOCK, IDS, keys=keys, policy=policy, fault_hook=hook)
    await first.__aenter__()
    async with asyncio.timeout(10):
        await crashed.wait()
    # The dead one does not release its lease: the next one waits for its end. Its loops end at their next step.
    first.wake()
    for number in range(4):
        await write(task_id=f"task-{number % 2}")
    async with OutboxPublisher(db, log, memory_redis, CLOCK, IDS, keys=keys, policy=policy) as second:
        assert await second.flush(10)
        assert second.health.lag == 0
    received = [json.loads(message.data) for message in await drain(listener)]
    # At least once: repeats have the same id and position, and come in order.
    firsts = list({event["seq"]: event["id"] for event in received}.items())
    assert [seq for seq, _id in firsts] == list(range(1, 13))
    assert [id_ for _seq, id_ in firsts] == [event.id for event in await log.read(0, tenant=None)]
    assert all({event["id"] for event in received if event["seq"] == seq} == {id_} for seq, id_ in firsts)
    await listener.close()


async def drain(pubsub: PubSub) -> list[Any]:
    found = []
    while (message := await pubsub.receive(0.2)) is not None:
        found.append(message)
    return found


async def test_a_commit_of_another_replica_wakes_the_one_that_publishes(
    redis: RedisClient, keys: RedisKeys, db: Database, write: Write, make_publisher: MakePublisher
) -> None:
    # The poll alone would take a minute.
    slow = OutboxPolicy(poll=60, lease=180)
    elsewhere = EventLog(db, CLOCK, IDS)
    async with make_publisher(redis, policy=slow) as leader:
        await write()
        assert await leader.flush(10)
        standby = OutboxPublisher(db, elsewhere, redis, CLOCK, IDS, keys=keys, policy=slow)
        listener = await listen(redis, keys.channel("events:task:started"))
        # The leader listens for hints by now: its own subscription was confirmed before this one.
        async with standby:
            async with db.transaction() as tx:
                await elsewhere.append(
                    tx, "task.started", subject="task/x", tenant="t", source="o", data={"task_id": "x"}
                )
            [event] = await take(listener, 1)
    assert event["data"] == {"task_id": "x"}
    await listener.close()


async def test_readers_are_told_when_events_can_be_read(
    redis: RedisClient, log: EventLog, write: Write, make_publisher: MakePublisher
) -> None:
    found: list[int] = []
    numbered = asyncio.Event()
    remove = log.on_numbered(lambda _batch, _size: numbered.set())
    async with make_publisher(redis):
        await write()
        async with asyncio.timeout(5):
            await numbered.wait()
        found = [event.seq for event in await log.read(0, tenant="t")]
    assert found == [1]
    remove()


async def test_the_lag_grows_while_redis_is_away_and_ends_after_it(
    write: Write, redis_process: RedisProcess, make_publisher: MakePublisher
) -> None:
    async with open_redis(redis_process.url) as redis, make_publisher(redis) as publisher:
        await write()
        assert await publisher.flush(5)
        assert (publisher.health.lag, publisher.health.lag_seconds) == (0, 0.0)
        redis_process.kill()
        for _ in range(3):
            await write()
        await wait_until(lambda: publisher.health.lag == 3, description="three events wait")
        await wait_until(lambda: publisher.health.lag_seconds > 0.05, description="their time counts")
        redis_process.start()
        assert await publisher.flush(10)
        assert (publisher.health.lag, publisher.health.lag_seconds) == (0, 0.0)


SLOW = OutboxPolicy(poll=60, lease=180)
"""Nothing happens by time: only a commit makes the publisher number events."""


async def test_an_event_has_its_position_when_its_transaction_ends(
    redis: RedisClient, keys: RedisKeys, log: EventLog, write: Write, make_publisher: MakePublisher
) -> None:
    told: list[int] = []
    remove = log.on_numbered(lambda batch, _size: told.extend(event.seq for event in batch))
    listener = await listen(redis, keys.channel("events:task:progress"))
    async with make_publisher(redis, policy=SLOW) as publisher:
        await write()
        assert await publisher.flush(10)
        for _ in range(3):
            await write()
            assert told == [event.seq for event in await log.read(0, tenant="t")] == list(range(1, len(told) + 1))
        assert len(told) == 4
        assert await publisher.flush(10)
    assert [event["seq"] for event in await take(listener, 4)] == [1, 2, 3, 4]
    await listener.close()
    remove()


async def test_a_transaction_that_fails_after_its_events_were_numbered_gives_the_numbers_back(
    redis: RedisClient, db: Database, log: EventLog, write: Write, make_publisher: MakePublisher
) -> None:
    async def fail(_tx: Transaction) -> None:
        raise ZeroDivisionError

    async with make_publisher(redis, policy=SLOW) as publisher:
        await write()
        assert await publisher.flush(10)
        with pytest.raises(ZeroDivisionError):
            async with db.transaction() as tx:
                await log.append(tx, "task.started", subject="task/x", tenant="t", source="o", data={"task_id": "x"})
                tx.before_commit(fail)
        await write()
        await write()
        assert await publisher.flush(10)
        assert publisher.health.last_published == 3
    found = await log.read(0, tenant="t")
    assert [(event.seq, event.prev, event.event_type) for event in found] == [
        (1, 0, "task.progress"),
        (2, 1, "task.progress"),
        (3, 2, "task.progress"),
    ]


async def test_a_holder_whose_lease_was_taken_over_numbers_nothing_and_the_write_succeeds(
    redis: RedisClient, db: Database, log: EventLog, write: Write, make_publisher: MakePublisher
) -> None:
    async with make_publisher(redis, policy=OutboxPolicy(poll=0.05, lease=180)) as publisher:
        await write()
        assert await publisher.flush(10)
        async with db.transaction() as tx:
            state = relay_state.c
            await tx.execute(
                update(relay_state).values(fence=state.fence + 1, holder="another", lease_until=CLOCK.now() + 100)
            )
        await write()
        assert [event.seq for event in await log.read(0, tenant="t")] == [1]
        async with db.transaction() as tx:
            await tx.execute(update(relay_state).values(lease_until=0.0))
        assert await publisher.flush(10)
    assert [event.seq for event in await log.read(0, tenant="t")] == [1, 2]
