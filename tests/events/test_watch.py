from __future__ import annotations

import asyncio

import pytest
from events_kit import MakePublisher, Write
from redis_process import RedisProcess

from octollm.events import Hint, TaskSubscription, TaskWatchHub
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import RedisClient, open_redis
from octollm.storage.text_stream import TextStream
from octollm.testing import wait_until

LONG = 3600.0
"""A timer that no test lives to see."""


async def settle(hub: TaskWatchHub, hints: TaskSubscription) -> None:
    """Wait until the subscription is in effect, and take the hint that says to look."""
    await wait_until(lambda: hub.is_listening(hints.task_id), description="hints come")
    async with asyncio.timeout(5):
        assert await anext(hints) == Hint(events=True, text=True)


async def test_a_watcher_looks_at_once_and_again_when_hints_come(redis: RedisClient, keys: RedisKeys) -> None:
    async with TaskWatchHub(redis, keys, poll_seconds=LONG) as hub, hub.subscribe("a") as hints:
        assert not hub.is_listening("a")
        async with asyncio.timeout(5):
            assert await anext(hints) == Hint(events=True, text=True)
            assert await anext(hints) == Hint(events=True, text=True)
        assert hub.is_listening("a")
    assert not hub.is_listening("a")


async def test_hints_come_for_events_and_text_of_the_task_alone(
    redis: RedisClient, keys: RedisKeys, make_publisher: MakePublisher, write: Write
) -> None:
    text = TextStream(redis, keys)
    async with (
        TaskWatchHub(redis, keys, poll_seconds=LONG) as hub,
        make_publisher(redis) as publisher,
        hub.subscribe("task-1") as one,
        hub.subscribe("task-2") as two,
    ):
        await settle(hub, one)
        await settle(hub, two)
        async with asyncio.timeout(5):
            await write(task_id="task-1")
            assert await anext(one) == Hint(events=True, text=False)
            await text.append("task-2", step="s", attempt=1, run=1, offset=0, text="x")
            assert await anext(two) == Hint(events=False, text=True)
        assert await publisher.flush(5)
        waiting = asyncio.ensure_future(anext(one))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        waiting.cancel()


async def test_hints_of_a_busy_watcher_become_one(redis: RedisClient, keys: RedisKeys) -> None:
    async with (
        TaskWatchHub(redis, keys, poll_seconds=LONG) as hub,
        hub.subscribe("a") as hints,
        hub.subscribe("a") as other,
    ):
        await settle(hub, hints)
        await redis.publish([(keys.watch("a"), b"{}")] * 10 + [(keys.watch("a"), b"text")])
        async with asyncio.timeout(5):
            while not (hint := await anext(other)).text or not hint.events:
                pass
        collected = {await anext(hints)}
        assert Hint(events=True, text=True) in collected or len(collected) == 1


async def test_a_timer_stands_in_for_lost_hints(redis: RedisClient, keys: RedisKeys) -> None:
    async with (
        TaskWatchHub(redis, keys, poll_seconds=LONG, quiet_poll_seconds=0.01) as hub,
        hub.subscribe("a") as hints,
    ):
        async with asyncio.timeout(5):
            for _ in range(5):
                assert await anext(hints) == Hint(events=True, text=True)


async def test_a_second_watcher_of_a_task_and_the_one_that_stays(redis: RedisClient, keys: RedisKeys) -> None:
    async with TaskWatchHub(redis, keys, poll_seconds=LONG) as hub, hub.subscribe("a") as stays:
        await settle(hub, stays)
        async with hub.subscribe("a") as leaves:
            assert await anext(leaves) == Hint(events=True, text=True)
        await redis.publish([(keys.watch("a"), b"text")])
        async with asyncio.timeout(5):
            assert await anext(stays) == Hint(events=False, text=True)
    assert hub._subscriptions == {}


async def test_without_redis_the_timer_goes_on(keys: RedisKeys) -> None:
    async with (
        open_redis("redis://127.0.0.1:1/0") as nowhere,
        TaskWatchHub(nowhere, keys, poll_seconds=0.01) as hub,
        hub.subscribe("a") as hints,
        asyncio.timeout(5),
    ):
        for _ in range(3):
            assert await anext(hints) == Hint(events=True, text=True)
        await wait_until(lambda: hub.degraded, description="it says what is wrong")


async def test_watching_goes_on_after_redis_was_killed(redis_process: RedisProcess, keys: RedisKeys) -> None:
    async with (
        open_redis(redis_process.url) as redis,
        TaskWatchHub(redis, keys, poll_seconds=LONG) as hub,
        hub.subscribe("a") as hints,
    ):
        await settle(hub, hints)
        redis_process.kill()
        await wait_until(lambda: hub.degraded, description="it says what is wrong")
        assert not hub.is_listening("a")
        async with hub.subscribe("b") as late:
            assert await anext(late) == Hint(events=True, text=True)
            redis_process.start()
            async with asyncio.timeout(10):
                assert await anext(hints) == Hint(events=True, text=True), "look again after the reconnect"
                assert await anext(late) == Hint(events=True, text=True)
                await redis.publish([(keys.watch("b"), b"text")])
                assert await anext(late) == Hint(events=False, text=True)


async def test_many_watchers_share_one_connection(redis: RedisClient, keys: RedisKeys) -> None:
    async with TaskWatchHub(redis, keys, poll_seconds=LONG) as hub:
        watches = [hub.subscribe(f"task-{n}") for n in range(300)]
        for watch in watches:
            await watch.__aenter__()
        for watch in watches:
            await settle(hub, watch)
        await redis.publish([(keys.watch(f"task-{n}"), b"text") for n in range(300)])
        async with asyncio.timeout(10):
            for watch in watches:
                assert await anext(watch) == Hint(events=False, text=True)
        for watch in watches:
            await watch.__aexit__(None, None, None)
    assert hub._subscriptions == {}


async def test_what_the_listener_died_of_reaches_the_watchers(
    redis: RedisClient, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(redis, "pubsub", broken)
    with pytest.raises(ZeroDivisionError):
        async with TaskWatchHub(redis, keys, poll_seconds=LONG) as hub, hub.subscribe("a") as hints, asyncio.timeout(5):
            async for _ in hints:
                pass
