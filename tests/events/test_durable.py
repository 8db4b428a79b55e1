"""Durable subscriptions in process: nothing lost, in order per subject, retried, dead-lettered, shared by a group."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import structlog
from events_kit import CLOCK, IDS, MakePublisher, Write
from sqlalchemy import delete, select, update

from octollm.contracts.subscriptions import DeadLetter, Lag, SubscriptionSpec
from octollm.errors import OctoError
from octollm.events import (
    AckHints,
    DeliveryPolicy,
    DurableSubscription,
    DurableSubscriptions,
    EventBus,
    EventLog,
    LogTail,
    QueuedDelivery,
    RejectDelivery,
    RetryDelivery,
)
from octollm.events.handlers import Handler
from octollm.events.leases import PartitionLease
from octollm.events.log_tail import TailWindow
from octollm.events.sequencer import Sequencer
from octollm.storage import Database
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import RedisClient
from octollm.storage.tables import delayed_subjects, events, subscription_consumers, subscription_partitions
from octollm.testing import wait_until

FAST = DeliveryPolicy(lease=2.0, renew=0.05, poll=0.05)
SPEC = SubscriptionSpec(("events:task:*",), max_attempts=3, retry_first=0.01, retry_limit=0.02)


@pytest.fixture
async def durable(
    db: Database, log: EventLog, redis: RedisClient, keys: RedisKeys
) -> AsyncIterator[DurableSubscriptions]:
    async with LogTail(redis, keys, log) as tail:
        yield DurableSubscriptions.build(db, log, tail, CLOCK, IDS, structlog.get_logger())


def subscribe(
    durable: DurableSubscriptions, spec: SubscriptionSpec = SPEC, name: str = "billing"
) -> DurableSubscription:
    return durable.open(name, spec, start="earliest", policy=FAST)


@contextlib.asynccontextmanager
async def handling(events: DurableSubscription, handler: Handler) -> AsyncGenerator[None]:
    """Handle events while the block runs."""
    runner = asyncio.create_task(events.run(handler))
    try:
        yield
    finally:
        runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await runner


async def letters(durable: DurableSubscriptions, count: int) -> list[DeadLetter]:
    found: list[DeadLetter] = []

    async def as_many() -> bool:
        found[:] = await durable.subscriptions.list_dead_letters("system")
        return len(found) == count

    await wait_until(as_many, description=f"{count} dead letters", timeout=20)
    return found


async def caught_up(durable: DurableSubscriptions) -> Lag:
    found: list[Lag] = []

    async def is_caught_up() -> bool:
        found[:] = [view.lag for view in await durable.subscriptions.list_views("system")]
        return found[0].positions == 0

    await wait_until(is_caught_up, description="no lag", timeout=20)
    return found[0]


def fail_first(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: OctoError) -> None:
    """Let the first call of a method fail."""
    original = getattr(owner, name)

    async def call(*arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return await original(*arguments, **options)

    failures = [error]
    monkeypatch.setattr(owner, name, call)


async def take(events: DurableSubscription, count: int) -> list[int]:
    async with asyncio.timeout(20):
        return [(await anext(events)).seq for _ in range(count)]


async def test_the_bus_has_it_under_a_name(
    redis: RedisClient,
    keys: RedisKeys,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
) -> None:
    bus = EventBus(redis, keys, CLOCK, IDS, durable)
    async with bus.subscribe("events:task:*", durable="billing") as events, make_publisher(redis):
        await write("task.completed")
        async with asyncio.timeout(10):
            event = await anext(events)
    assert event.event_type == "task.completed"


async def test_an_acknowledgement_wakes_the_polls_of_every_replica(redis: RedisClient, keys: RedisKeys) -> None:
    here, there, other = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with AckHints(redis, keys, "a") as one, AckHints(redis, keys, "b") as two:
        with one.waiting("s-1", here), two.waiting("s-1", there), two.waiting("s-2", other):

            def is_heard() -> bool:
                # Again and again: the other replica may not listen yet.
                one.announce("s-1")
                return there.is_set()

            await wait_until(is_heard, description="the other replica is woken")
            assert here.is_set()
            assert not other.is_set()


async def test_a_bus_without_the_log_has_none(bus: EventBus) -> None:
    with pytest.raises(OctoError) as refused:
        bus.subscribe("events:task:*", durable="billing")
    assert refused.value.code == "not_configured"


async def test_one_that_is_opened_while_the_database_is_away_waits_for_it(
    redis: RedisClient,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Before it has its row, and between the row and the lease.
    for owner, name in ((durable.subscriptions, "put"), (durable.leases, "join")):
        fail_first(monkeypatch, owner, name, OctoError("It is away.", code="unavailable"))
    async with make_publisher(redis), subscribe(durable) as events:
        await write()
        assert await take(events, 1) == [1]


async def test_it_continues_after_what_was_acknowledged(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        async with subscribe(durable) as events:
            for n in range(10):
                await write(task_id=f"task-{n}")
            first = await take(events, 10)
        for n in range(10):
            await write(task_id=f"task-{n}")
        assert await publisher.flush(10)
        async with subscribe(durable) as events:
            second = await take(events, 10)
    assert sorted(first + second) == list(range(1, 21))


async def test_what_was_not_acknowledged_comes_again(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis):
        await write()
        for _ in range(2):
            with pytest.raises(asyncio.CancelledError):
                async with subscribe(durable) as events:
                    assert await take(events, 1) == [1]
                    raise asyncio.CancelledError
        async with subscribe(durable) as events:
            assert await take(events, 1) == [1]


async def test_each_subject_is_in_order_while_others_are_handled_at_the_same_time(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    seen: dict[str, list[int]] = defaultdict(list)
    busy: set[str] = set()
    most = 0

    async def handle(delivery: QueuedDelivery) -> None:
        nonlocal most
        subject = delivery.event.subject
        assert subject not in busy
        busy.add(subject)
        most = max(most, len(busy))
        await asyncio.sleep(0.001)
        busy.discard(subject)
        seen[subject].append(delivery.event.version)

    await asyncio.gather(*(write(task_id=f"task-{n % 10}") for n in range(200)))
    async with make_publisher(redis), subscribe(durable) as events, handling(events, handle):
        await wait_until(lambda: sum(map(len, seen.values())) >= 200, description="all events", timeout=20)
    assert all(versions == list(range(1, 21)) for versions in seen.values())
    assert most > 1


async def test_a_failed_event_stops_its_subject_only_and_then_becomes_a_dead_letter(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    handled: list[tuple[str, int]] = []
    attempts: list[int] = []

    async def handle(delivery: QueuedDelivery) -> None:
        if delivery.event.data.get("progress") == 13:
            attempts.append(delivery.attempt)
            raise ValueError("a secret: hunter2")
        handled.append((delivery.event.subject, delivery.event.version))

    async with make_publisher(redis), subscribe(durable) as events, handling(events, handle):
        await write(task_id="task-a")
        await write(task_id="task-a", progress=13)
        for _ in range(3):
            await write(task_id="task-a")
            await write(task_id="task-b")
        await wait_until(lambda: len(handled) == 7, description="every other event", timeout=20)
        lag = await caught_up(durable)
    assert attempts == [1, 2, 3]
    assert [version for subject, version in handled if subject == "task/task-a"] == [1, 3, 4, 5]
    (letter,) = await letters(durable, 1)
    assert (letter.state, letter.attempts, letter.reason) == ("dead", 3, "ValueError")
    assert letter.event.version == 2
    assert (lag.positions, lag.dead, lag.delayed) == (0, 1, 0)


async def test_a_handler_says_when_to_try_again_and_when_not(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    seen: list[tuple[int, int]] = []

    async def handle(delivery: QueuedDelivery) -> None:
        seen.append((delivery.event.seq, delivery.attempt))
        if delivery.event.seq == 1 and delivery.attempt < 3:
            raise RetryDelivery("busy", after=0.02)
        if delivery.event.seq == 2:
            raise RejectDelivery("it is no order")

    async with make_publisher(redis), subscribe(durable) as events, handling(events, handle):
        await write(task_id="task-a")
        await write(task_id="task-b")
        await wait_until(lambda: (1, 3) in seen and (2, 1) in seen, description="the attempts", timeout=20)
        (letter,) = await letters(durable, 1)
    assert sorted(seen) == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert (letter.event.seq, letter.reason) == (2, "it is no order")


async def test_with_hold_a_poison_event_stops_its_subject_until_somebody_decides(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    handled: list[int] = []
    broken = True

    async def handle(delivery: QueuedDelivery) -> None:
        if delivery.event.seq == 1 and broken:
            raise RejectDelivery("not yet")
        handled.append(delivery.event.seq)

    spec = SubscriptionSpec(("events:task:*",), on_poison="hold")
    async with make_publisher(redis), subscribe(durable, spec) as events, handling(events, handle):
        for name in ("task-a", "task-b", "task-a"):
            await write(task_id=name)
        await wait_until(lambda: handled, description="the other subject", timeout=20)
        (letter,) = await letters(durable, 1)
        assert letter.state == "held"

        async def is_behind() -> bool:
            (view,) = await durable.subscriptions.list_views("system")
            return (view.lag.held, view.lag.positions) == (1, 3)

        # The third event may be numbered only now.
        await wait_until(is_behind, description="one subject is held, and three events are not handled for good")
        broken = False
        await durable.subscriptions.retry_dead_letter("system", letter.id)
        await wait_until(lambda: handled == [2, 1, 3], description="the held subject, in order", timeout=20)
    assert await durable.subscriptions.list_dead_letters("system") == []


@pytest.mark.parametrize("decision", ["retry", "retry, which fails", "drop", "retry, then drop"])
async def test_a_held_event_that_retention_deleted_is_not_lost(
    redis: RedisClient,
    db: Database,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    decision: str,
) -> None:
    handled: list[int] = []
    attempts: list[int] = []
    broken = True

    async def handle(delivery: QueuedDelivery) -> None:
        if delivery.event.seq == 1:
            attempts.append(delivery.attempt)
            if broken:
                raise RejectDelivery("not yet")
        handled.append(delivery.event.seq)

    spec = SubscriptionSpec(("events:task:*",), on_poison="hold")
    async with make_publisher(redis), subscribe(durable, spec) as subscription, handling(subscription, handle):
        for name in ("task-a", "task-b", "task-a"):
            await write(task_id=name)
        await wait_until(lambda: handled, description="the other subject", timeout=20)
        (letter,) = await letters(durable, 1)
        # Beyond twice the limits of retention: the dead letter has the only copy.
        async with db.transaction() as tx:
            await tx.execute(delete(events).where(events.c.seq == 1))
        if decision == "retry, which fails":
            await durable.subscriptions.retry_dead_letter("system", letter.id)
            await wait_until(lambda: len(attempts) == 2, description="another attempt", timeout=20)

            async def is_held() -> bool:
                return [each.state for each in await letters(durable, 1)] == ["held"]

            await wait_until(is_held, description="it is held again", timeout=20)
            assert set(handled) == {2}
        if decision == "retry, then drop":
            await durable.subscriptions.retry_dead_letter("system", letter.id)
            await durable.subscriptions.drop_dead_letter("system", letter.id)
        elif decision == "drop":
            await durable.subscriptions.drop_dead_letter("system", letter.id)
        else:
            broken = False
            await durable.subscriptions.retry_dead_letter("system", letter.id)
        expected = [2, 3] if "drop" in decision else [2, 1, 3]
        # A consumer that is not scheduled for seconds loses its lease, and an event may come twice then.
        await wait_until(
            lambda: list(dict.fromkeys(handled)) == expected, description="the held subject, in order", timeout=20
        )
    assert await durable.subscriptions.list_dead_letters("system") == []


async def test_a_dead_letter_is_delivered_again_on_request_or_dropped(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    handled: list[int] = []
    broken = True

    async def handle(delivery: QueuedDelivery) -> None:
        if broken:
            raise RejectDelivery("broken")
        handled.append(delivery.event.seq)

    store = durable.subscriptions
    async with make_publisher(redis), subscribe(durable) as events, handling(events, handle):
        await write(task_id="task-a")
        await write(task_id="task-b")
        first, second = await letters(durable, 2)
        broken = False
        await store.retry_dead_letter("system", first.id)
        await store.drop_dead_letter("system", second.id)
        await letters(durable, 0)
    assert handled == [first.event.seq]
    with pytest.raises(OctoError) as refused:
        await store.retry_dead_letter("system", second.id)
    assert refused.value.code == "dead_letter_not_found"


async def test_an_exception_in_the_loop_counts_as_a_failed_attempt(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis):
        await write(task_id="task-a")
        await write(task_id="task-b")
        for _ in range(SPEC.max_attempts):
            with pytest.raises(ValueError, match="poison"):
                async with subscribe(durable) as events:
                    async for event in events:
                        if event.seq == 1:
                            raise ValueError("poison")
        async with subscribe(durable) as events:
            remaining = asyncio.create_task(anext(events))
            await wait_until(lambda: events.held_partitions, description="the partitions")
            (letter,) = await durable.subscriptions.list_dead_letters("system")
            remaining.cancel()
    assert letter.event.seq == 1


async def test_consumers_share_the_partitions_and_take_over(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis), subscribe(durable) as one:
        assert len(one.held_partitions) == 64
        async with subscribe(durable) as two:
            await wait_until(
                lambda: len(one.held_partitions) == len(two.held_partitions) == 32, description="shares", timeout=20
            )
            assert not one.held_partitions & two.held_partitions
            (view,) = await durable.subscriptions.list_views("system")
            assert [consumer.partitions for consumer in view.consumers] == [32, 32]
        await wait_until(lambda: len(one.held_partitions) == 64, description="taking over", timeout=20)
        await write()
        assert await take(one, 1) == [1]


async def test_a_consumer_that_died_before_the_clock_was_set_back_keeps_no_partition(
    db: Database, durable: DurableSubscriptions
) -> None:
    subscription = await durable.subscriptions.put("system", "billing", SPEC, event_tenant=None, start="earliest")
    await durable.leases.join(subscription, "dead", 5.0)
    assert len((await durable.leases.join(subscription, "heir", 5.0)).leases) == 0
    async with db.transaction() as tx:
        of_the_dead = subscription_consumers.c.consumer == "dead"
        await tx.execute(update(subscription_consumers).where(of_the_dead).values(lease_until=CLOCK.now() + 3600))
    assert len((await durable.leases.join(subscription, "heir", 5.0)).leases) == 64


async def test_an_acknowledgement_under_an_old_fence_is_not_saved(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis), subscribe(durable) as events:
        await write()
        async with asyncio.timeout(10):
            delivery = await events.take()
        await durable.subscriptions.replay("system", "billing", after=0)
        await events.ack(delivery)
        async with asyncio.timeout(10):
            again = await events.take()
        assert again.event == delivery.event
        assert again.ack != delivery.ack
        await events.ack(again)


async def test_replay_delivers_again_from_a_position_or_a_time(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    store = durable.subscriptions
    async with make_publisher(redis), subscribe(durable) as events:
        for n in range(6):
            await write(task_id=f"task-{n}")
        assert sorted(await take(events, 6)) == [1, 2, 3, 4, 5, 6]
        assert await store.replay("system", "billing", after=3) == 3
        assert sorted(await take(events, 3)) == [4, 5, 6]
        assert await store.replay("system", "billing", time="2020-01-01T00:00:00Z") == 0
        assert sorted(await take(events, 6)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("after", "time"),
    [(99, None), (None, "yesterday"), (None, None), (0, "2020-01-01T00:00:00Z"), (None, "2020-01-01")],
)
async def test_a_replay_from_nowhere_is_refused(
    durable: DurableSubscriptions, after: int | None, time: str | None
) -> None:
    await durable.subscriptions.put("t", "billing", SPEC, event_tenant="t")
    with pytest.raises(OctoError) as refused:
        await durable.subscriptions.replay("t", "billing", after=after, time=time)
    assert refused.value.code == "invalid_body"


async def test_the_log_is_needed_from_the_lowest_position_on(
    redis: RedisClient, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    store = durable.subscriptions
    assert await store.lowest_position() is None
    async with make_publisher(redis) as publisher:
        async with subscribe(durable) as events:
            for n in range(4):
                await write(task_id=f"task-{n}")
            await take(events, 4)

        async def all_handled() -> bool:
            return await store.lowest_position() == 4

        async with subscribe(durable):
            await wait_until(all_handled, description="the cursor at the end", timeout=20)
        for n in range(3):
            await write(task_id=f"task-{n}")
        assert await publisher.flush(10)
    assert await store.lowest_position() == 4
    await store.delete("system", "billing")
    assert await store.lowest_position() is None


async def gaps(log: EventLog) -> list[dict[str, object]]:
    return [event.data for event in await log.read(0, tenant="system", types=["log.gap"])]


async def delete_through(db: Database, position: int) -> None:
    async with db.transaction() as tx:
        await tx.execute(delete(events).where(events.c.seq <= position))


async def test_a_position_whose_events_were_deleted_is_a_gap_and_it_goes_on(
    redis: RedisClient,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    db: Database,
    log: EventLog,
) -> None:
    await durable.subscriptions.put("system", "billing", SPEC, event_tenant=None, start="earliest")
    async with make_publisher(redis) as publisher:
        for n in range(6):
            await write(task_id=f"task-{n}")
        assert await publisher.flush(10)
        await delete_through(db, 4)
        async with subscribe(durable) as found:
            assert await take(found, 2) == [5, 6]
        assert await publisher.flush(10)
    assert await gaps(log) == [
        {"reader": "subscription/billing", "after": 0, "through": 4, "reason": "position_expired"}
    ]


async def test_a_position_that_is_deleted_under_a_consumer_is_a_gap_and_it_goes_on(
    redis: RedisClient,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    db: Database,
    log: EventLog,
) -> None:
    # Its reader is not running yet when the events go, and has nothing of them in memory.
    small = DeliveryPolicy(lease=30.0, renew=20.0, poll=0.05)
    async with make_publisher(redis) as publisher:
        async with durable.open("billing", SPEC, start="earliest", policy=small) as found:
            for loop in found._loops[1:]:
                await loop.aclose()
            for n in range(6):
                await write(task_id=f"task-{n}")
            assert await publisher.flush(10)
            await delete_through(db, 4)
            durable.tail.window = TailWindow()
            reader = asyncio.create_task(_scan(found))
            assert await take(found, 2) == [5, 6]
            reader.cancel()
        assert await publisher.flush(10)
    assert [gap["through"] for gap in await gaps(log)] == [4]


async def _scan(found: DurableSubscription) -> None:
    while True:
        await found._reader.read_round()


@pytest.mark.parametrize("over_http", [True, False])
async def test_a_position_beyond_the_end_of_the_log_is_a_gap_and_it_goes_on(
    redis: RedisClient,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    db: Database,
    log: EventLog,
    over_http: bool,
) -> None:
    await durable.subscriptions.put("system", "billing", SPEC, event_tenant=None, start="earliest")
    async with make_publisher(redis) as publisher:
        for n in range(3):
            await write(task_id=f"task-{n}")
        assert await publisher.flush(10)
        async with db.transaction() as tx:
            await tx.execute(update(subscription_partitions).values(position=999_999))
        if over_http:
            row = await durable.subscriptions.find("system", "billing")
            polled = await durable.pull.poll(str(row["id"]), "one", 10)
            assert sorted(delivery.event.seq for delivery in polled) == [1, 2, 3]
        else:
            async with subscribe(durable) as found:
                assert sorted(await take(found, 3)) == [1, 2, 3]
        assert await publisher.flush(10)
    assert await gaps(log) == [
        {"reader": "subscription/billing", "after": 999_999, "through": 0, "reason": "position_unknown"}
    ]


async def test_without_redis_it_reads_the_log(
    durable: DurableSubscriptions, redis: RedisClient, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        for n in range(30):
            await write(task_id=f"task-{n}")
        assert await publisher.flush(10)
    async with subscribe(durable) as events:
        assert sorted(await take(events, 30)) == list(range(1, 31))


async def test_one_that_is_up_to_date_reads_the_log_when_redis_falls_silent(
    db: Database, durable: DurableSubscriptions, redis: RedisClient, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis), subscribe(durable) as events:
        await write()
        assert await take(events, 1) == [1]
        assert durable.tail.window.last == 1
    async with subscribe(durable) as events:
        await write()
        # By a publisher elsewhere that Redis takes nothing from: nobody here hears of it.
        sequencer = Sequencer(db, holder="elsewhere", lease_seconds=60)
        lease = await sequencer.acquire()
        assert lease is not None
        await sequencer.assign(lease.fence, 10)
        assert await take(events, 1) == [2]


async def test_a_new_subscription_begins_at_the_end_unless_told_otherwise(
    durable: DurableSubscriptions, redis: RedisClient, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await write()
        assert await publisher.flush(10)
        async with durable.open("late", SPEC, policy=FAST) as events:
            await write()
            assert await take(events, 1) == [2]


async def test_subscriptions_of_a_tenant_are_bounded(
    durable: DurableSubscriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octollm.events.subscriptions.MAX_SUBSCRIPTIONS", 2)
    for name in ("a", "b", "a"):
        await durable.subscriptions.put("t", name, SPEC, event_tenant="t")
    with pytest.raises(OctoError) as refused:
        await durable.subscriptions.put("t", "c", SPEC, event_tenant="t")
    assert refused.value.code == "quota_exhausted"
    await durable.subscriptions.put("u", "c", SPEC, event_tenant="u")


async def test_a_retry_does_not_wait_for_a_clock_that_was_set_back(
    redis: RedisClient, db: Database, durable: DurableSubscriptions, make_publisher: MakePublisher, write: Write
) -> None:
    async with make_publisher(redis) as publisher:
        await write()
        assert await publisher.flush(10)
        async with subscribe(durable) as events:
            await events.nack(await events.take(), RuntimeError())
        async with db.transaction() as tx:
            # As after the clock was set back by an hour.
            await tx.execute(update(delayed_subjects).values(due_at=delayed_subjects.c.due_at + 3600))
        async with subscribe(durable) as events:
            assert await take(events, 1) == [1]


async def test_past_the_bound_of_delayed_subjects_a_partition_waits_and_nothing_is_lost(
    redis: RedisClient,
    durable: DurableSubscriptions,
    make_publisher: MakePublisher,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("octollm.events.deliveries.MAX_DELAYED_SUBJECTS", 2)
    handled: list[int] = []
    away = True

    async def handle(delivery: QueuedDelivery) -> None:
        if away:
            raise RetryDelivery("away", after=0.05)
        handled.append(delivery.event.seq)

    spec = SubscriptionSpec(("events:task:*",), max_attempts=100, retry_first=0.01, retry_limit=0.02)
    async with make_publisher(redis), subscribe(durable, spec) as events, handling(events, handle):
        for n in range(12):
            await write(task_id=f"task-{n % 6}")

        async def two_delayed() -> bool:
            return (await durable.subscriptions.list_views("system"))[0].lag.delayed >= 2

        await wait_until(two_delayed, description="two delayed subjects", timeout=20)
        away = False
        await wait_until(lambda: len(handled) == 12, description="every event", timeout=20)
    assert sorted(handled) == list(range(1, 13))


async def test_positions_of_several_consumers_are_saved_at_once_and_each_learns_of_its_own(
    durable: DurableSubscriptions, db: Database
) -> None:
    ids = [await durable.subscriptions.put("system", name, SPEC, event_tenant=None) for name in ("a", "b")]
    held = [await durable.leases.join(each, "consumer", 60.0) for each in ids]
    moved = [[PartitionLease(n, m.leases[n].fence, m.leases[n].position + 5) for n in (0, 1)] for m in held]
    # Taken over meanwhile, under another fence.
    moved[1][1] = PartitionLease(1, moved[1][1].fence - 1, 99)
    saved = await asyncio.gather(
        *(durable.leases.settle(each, "consumer", leases) for each, leases in zip(ids, moved, strict=True)),
        durable.leases.settle(ids[0], "another", moved[0]),
    )
    assert saved == [{0, 1}, {0}, set()]
    partitions = subscription_partitions
    for each, expected in zip(ids, ([5, 5], [5, 0]), strict=True):
        async with db.read() as connection:
            query = select(partitions.c.position).where(partitions.c.subscription_id == each)
            rows = await connection.all(query.order_by(partitions.c.partition).limit(2))
        assert [row["position"] for row in rows] == expected


async def test_events_in_hand_of_several_consumers_are_saved_at_once_and_each_learns_of_its_own(
    durable: DurableSubscriptions, db: Database
) -> None:
    ids = [await durable.subscriptions.put("system", name, SPEC, event_tenant=None) for name in ("a", "b")]
    held = [(await durable.leases.join(each, "consumer", 60.0)).leases for each in ids]
    save = durable.leases.save_suspects

    def moved(which: int, number: int, position: int, fence: int = 0) -> PartitionLease:
        return PartitionLease(number, held[which][number].fence + fence, position)

    saved = await asyncio.gather(
        save(ids[0], "consumer", moved(0, 0, 5), "first"),
        save(ids[0], "consumer", moved(0, 0, 6), "second"),
        save(ids[0], "another", moved(0, 1, 7), "of another"),
        # Taken over meanwhile: the late one does not take the place of the one before it.
        save(ids[1], "consumer", moved(1, 0, 8), "in hand"),
        save(ids[1], "consumer", moved(1, 0, 9, fence=-1), "late"),
    )
    assert saved == [True, True, False, True, False]
    assert await save(ids[1], "consumer", moved(1, 0, 2), None)  # a position never goes back
    partitions = subscription_partitions
    async with db.read() as connection:
        rows = await connection.all(select(partitions).where(partitions.c.partition < 2))
    found = {(ids.index(r["subscription_id"]), r["partition"]): (r["suspects"], r["position"]) for r in rows}
    assert found == {(0, 0): ("second", 6), (0, 1): (None, 0), (1, 0): (None, 8), (1, 1): (None, 0)}
