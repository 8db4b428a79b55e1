from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from redis_process import RedisProcess

from octollm.events.pubsub import PubSubListener
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import RedisClient, open_redis
from octollm.storage.redis_protocol import PubSubMessage
from octollm.testing import wait_until


class Messages:
    """What a listener received, and how often it was connected."""

    def __init__(self) -> None:
        self.received: list[PubSubMessage] = []
        self.connections = 0
        self.crashes = 0

    def on_connected(self) -> None:
        self.connections += 1

    def on_crash(self) -> None:
        self.crashes += 1

    @property
    def published(self) -> Sequence[tuple[str, bytes]]:
        return [(message.name, message.data) for message in self.received if not message.subscribed]

    def listener(
        self, redis: RedisClient, *, channels: tuple[str, ...] = (), patterns: tuple[str, ...] = ()
    ) -> PubSubListener:
        return PubSubListener(
            "test",
            redis,
            self.received.append,
            channels=channels,
            patterns=patterns,
            on_connected=self.on_connected,
            on_crash=self.on_crash,
        )


async def test_it_receives_from_channels_and_patterns_once_all_are_confirmed(
    redis: RedisClient, keys: RedisKeys
) -> None:
    messages = Messages()
    log, watched, pattern = keys.log, keys.watch("a"), keys.channel("events:task:*")
    async with messages.listener(redis, channels=(log, watched), patterns=(pattern,)) as listener:
        assert not listener.is_confirmed(log)
        await wait_until(lambda: messages.connections, description="Redis confirms the names")
        assert all(listener.is_confirmed(name) for name in (log, watched, pattern))
        assert {message.name for message in messages.received if message.subscribed} == {log, watched, pattern}
        assert listener.degraded is None
        progress = keys.channel("events:task:progress")
        await redis.publish([(log, b"1"), (keys.watch("b"), b"2"), (watched, b"3"), (progress, b"4")])
        await wait_until(lambda: len(messages.published) == 3, description="the messages arrive")
        assert messages.published == [(log, b"1"), (watched, b"3"), (progress, b"4")]
    assert not listener.is_confirmed(log)
    assert messages.connections == 1
    assert messages.crashes == 0


async def test_channels_are_added_and_removed_while_it_listens(redis: RedisClient, keys: RedisKeys) -> None:
    messages = Messages()
    async with messages.listener(redis, channels=(keys.log,)) as listener:
        await listener.subscribe("early")  # there may be no connection yet
        await wait_until(lambda: listener.is_confirmed("early"), description="the early channel is confirmed")
        await listener.subscribe("late")
        await wait_until(lambda: listener.is_confirmed("late"), description="the late channel is confirmed")
        await listener.unsubscribe("early")
        assert not listener.is_confirmed("early")
        await redis.publish([("early", b"1"), ("late", b"2")])
        await wait_until(lambda: messages.published, description="the message arrives")
        assert messages.published == [("late", b"2")]
        assert messages.connections == 1, "a channel that is added later makes no new connection"


async def test_of_calls_that_wait_for_their_turn_the_last_state_counts(redis: RedisClient, keys: RedisKeys) -> None:
    messages = Messages()
    async with messages.listener(redis, channels=(keys.log,)) as listener:
        await wait_until(lambda: messages.connections, description="Redis confirms the names")
        await asyncio.gather(*(listener.subscribe("a"), listener.unsubscribe("a"), listener.subscribe("a")))
        await asyncio.gather(*(listener.subscribe("b"), listener.unsubscribe("b")))
        await wait_until(lambda: listener.is_confirmed("a"), description="the channel is confirmed")
        await redis.publish([("b", b"1"), ("a", b"2")])
        await wait_until(lambda: messages.published, description="the message arrives")
        assert messages.published == [("a", b"2")]
        assert not listener.is_confirmed("b")


async def test_a_new_connection_has_every_name(redis_process: RedisProcess, keys: RedisKeys) -> None:
    messages = Messages()
    async with (
        open_redis(redis_process.url) as redis,
        messages.listener(redis, channels=("a", "removed"), patterns=("p*",)) as listener,
    ):
        await wait_until(lambda: messages.connections == 1, description="Redis confirms the names")
        redis_process.kill()
        await wait_until(lambda: listener.degraded, description="it says what is wrong")
        assert not listener.is_confirmed("a")
        await listener.subscribe("added")
        await listener.unsubscribe("removed")
        redis_process.start()
        await wait_until(lambda: messages.connections == 2, description="it is connected again")
        assert listener.degraded is None
        assert [listener.is_confirmed(name) for name in ("a", "added", "p*", "removed")] == [True, True, True, False]
        await redis.publish([("removed", b"1"), ("a", b"2"), ("added", b"3"), ("pattern", b"4")])
        await wait_until(lambda: len(messages.published) == 3, description="the messages arrive")
        assert messages.published == [("a", b"2"), ("added", b"3"), ("pattern", b"4")]


async def test_without_redis_it_goes_on_trying_and_says_so(keys: RedisKeys) -> None:
    messages = Messages()
    async with (
        open_redis("redis://127.0.0.1:1/0") as nowhere,
        messages.listener(nowhere, channels=(keys.log,)) as listener,
    ):
        await wait_until(lambda: listener.degraded, description="it says what is wrong")
        await listener.subscribe("a")
        listener.raise_if_crashed()
    assert messages.connections == 0


async def test_a_subscription_that_redis_does_not_confirm_is_an_outage(
    redis: RedisClient, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octollm.events.pubsub.CONFIRM_SECONDS", 0.01)
    messages = Messages()
    listener = messages.listener(redis, channels=(keys.log,))
    # A name that is waited for and never sent.
    listener._patterns = (keys.channel("events:*"),)
    silent = redis.pubsub()
    monkeypatch.setattr(silent, "psubscribe", lambda *_patterns: asyncio.sleep(0))
    monkeypatch.setattr(redis, "pubsub", lambda: silent)
    async with listener:
        await wait_until(lambda: listener.degraded, description="it says what is wrong")
        assert listener.degraded == "Redis did not confirm a subscription."
    assert messages.connections == 0


async def test_a_callback_that_fails_ends_it_and_is_raised(redis: RedisClient, keys: RedisKeys) -> None:
    messages = Messages()

    def fail(_message: PubSubMessage) -> None:
        raise ZeroDivisionError

    listener = PubSubListener("test", redis, fail, channels=(keys.log,), on_crash=messages.on_crash)
    with pytest.raises(ZeroDivisionError):
        async with listener:
            await wait_until(lambda: messages.crashes, description="its end is reported")
            with pytest.raises(ZeroDivisionError):
                listener.raise_if_crashed()
    assert "ZeroDivisionError" in (listener.degraded or "")
