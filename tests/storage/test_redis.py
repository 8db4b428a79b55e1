from __future__ import annotations

import asyncio

import pytest
from burner_redis import BurnerRedis

from octollm.errors import OctoError, SettingError
from octollm.storage import redis_memory
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import MAX_BLOCK_MS, MemoryServers, PubSub, PubSubMessage, RedisClient, open_redis
from octollm.testing import wait_until


async def messages(pubsub: PubSub, count: int) -> list[PubSubMessage]:
    found: list[PubSubMessage] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            message = await pubsub.receive(1.0)
            if message is not None:
                found.append(message)
    return found


def test_the_commands_we_need_are_there() -> None:
    assert [name for name in redis_memory.COMMANDS if not hasattr(BurnerRedis, name)] == []


async def test_ping(redis: RedisClient) -> None:
    await redis.ping()


async def test_values(redis: RedisClient, keys: RedisKeys) -> None:
    key = keys.text("t")
    assert await redis.get(key) is None
    assert await redis.ttl(key) == -2
    assert await redis.set(key, b"\x00\xff", ttl=100)
    assert await redis.get(key) == b"\x00\xff"
    assert 90 < await redis.ttl(key) <= 100
    assert not await redis.set(key, b"other", ttl=100, only_if_absent=True)
    assert await redis.get(key) == b"\x00\xff"
    assert await redis.delete(key, f"{key}x") == 1
    assert await redis.delete() == 0
    assert await redis.set(key, b"new", ttl=100, only_if_absent=True)


async def test_a_value_expires(redis: RedisClient, keys: RedisKeys) -> None:
    key = keys.text("t")
    await redis.set(key, b"1", ttl=1)

    async def gone() -> bool:
        return await redis.get(key) is None

    await wait_until(gone, description="the value expired", timeout=5)


async def test_streams(redis: RedisClient, keys: RedisKeys) -> None:
    key = keys.text("task-1")
    assert list(await redis.stream_read(key, after="0", count=10)) == []
    ids = [await redis.stream_add(key, {"n": str(n), "é": "ü"}, maxlen=100, ttl=60) for n in range(5)]
    found = await redis.stream_read(key, after="0", count=3)
    assert [(entry.id, entry.fields["n"]) for entry in found] == list(zip(ids[:3], "012", strict=True))
    assert found[0].fields["é"] == "ü"
    assert [entry.fields["n"] for entry in await redis.stream_read(key, after=ids[3], count=10)] == ["4"]
    assert 50 < await redis.ttl(key) <= 60


async def test_a_stream_is_bounded(redis: RedisClient, keys: RedisKeys) -> None:
    key = keys.text("task-1")
    for number in range(500):
        await redis.stream_add(key, {"n": str(number)}, maxlen=50, ttl=60)
    kept = await redis.stream_read(key, after="0", count=1000)
    assert 50 <= len(kept) <= 250
    assert kept[-1].fields["n"] == "499"


async def test_reading_a_stream_waits_for_an_entry(redis: RedisClient, keys: RedisKeys) -> None:
    key = keys.text("task-1")
    reading = asyncio.ensure_future(redis.stream_read(key, after="0", count=10, block_ms=MAX_BLOCK_MS))
    await asyncio.sleep(0)
    await redis.stream_add(key, {"n": "1"}, maxlen=10, ttl=60)
    assert [entry.fields["n"] for entry in await reading] == ["1"]


async def test_waiting_for_an_entry_has_an_end(redis: RedisClient, keys: RedisKeys) -> None:
    assert list(await redis.stream_read(keys.text("task-1"), after="0", count=10, block_ms=20)) == []


async def test_a_cancelled_read_leaves_the_client_usable(redis: RedisClient, keys: RedisKeys) -> None:
    for number in range(40):
        reading = asyncio.ensure_future(redis.stream_read(keys.text("x"), after="0", count=1, block_ms=MAX_BLOCK_MS))
        for _ in range(number % 8):
            await asyncio.sleep(0)
        reading.cancel()
        done, _ = await asyncio.wait([reading], timeout=0.3)
        assert done, "the cancellation was lost"
        await redis.set(keys.text(str(number)), str(number).encode(), ttl=60)
        assert await redis.get(keys.text(str(number))) == str(number).encode()


async def test_publishing_to_channels_and_patterns_in_order(redis: RedisClient, keys: RedisKeys) -> None:
    one, two = redis.pubsub(), redis.pubsub()
    await one.subscribe(keys.channel("events:task:completed"))
    await two.psubscribe(keys.channel("events:task:*"))
    assert await messages(one, 1) == [PubSubMessage(keys.channel("events:task:completed"), b"", subscribed=True)]
    assert await messages(two, 1) == [PubSubMessage(keys.channel("events:task:*"), b"", subscribed=True)]
    await redis.publish(
        [
            (keys.channel("events:task:failed"), b"1"),
            (keys.channel("events:task:completed"), b"2"),
            (keys.channel("events:arm:registered"), b"3"),
            (keys.channel("events:task:completed"), b"4"),
        ]
    )
    assert [m.data for m in await messages(one, 2)] == [b"2", b"4"]
    assert [m.data for m in await messages(two, 3)] == [b"1", b"2", b"4"]
    await one.close()
    await two.close()


async def test_unsubscribing(redis: RedisClient, keys: RedisKeys) -> None:
    pubsub = redis.pubsub()
    await pubsub.subscribe(keys.watch("a"), keys.watch("b"))
    await messages(pubsub, 2)
    await pubsub.unsubscribe(keys.watch("a"))
    await redis.publish([(keys.watch("a"), b"a")])

    async def gone() -> bool:
        await redis.publish([(keys.watch("a"), b"a"), (keys.watch("b"), b"b")])
        first = await pubsub.receive(1.0)
        second = await pubsub.receive(0.05)
        return (first, second) == (PubSubMessage(keys.watch("b"), b"b"), None)

    await wait_until(gone, description="nothing more comes from a")
    await pubsub.close()


async def test_receiving_without_a_message_returns(redis: RedisClient, keys: RedisKeys) -> None:
    pubsub = redis.pubsub()
    await pubsub.subscribe(keys.cancel)
    await messages(pubsub, 1)
    assert await pubsub.receive(0.01) is None
    await pubsub.close()


async def test_an_entry_may_be_announced(redis: RedisClient, keys: RedisKeys) -> None:
    pubsub = redis.pubsub()
    await pubsub.subscribe(keys.watch("a"))
    await messages(pubsub, 1)
    await redis.stream_add(keys.text("a"), {"n": "1"}, maxlen=10, ttl=60, announce=(keys.watch("a"), b"text"))
    assert [m.data for m in await messages(pubsub, 1)] == [b"text"]
    await pubsub.close()


async def test_the_same_name_is_the_same_server_until_the_last_one_leaves() -> None:
    servers = MemoryServers()
    async with open_redis("memory://a", servers=servers) as one:
        await one.set("k", b"1", ttl=60)
        async with open_redis("memory://a", servers=servers) as two:
            assert await two.get("k") == b"1"
        async with open_redis("memory://b", servers=servers) as other:
            assert await other.get("k") is None
        async with open_redis("memory://a") as private:
            assert await private.get("k") is None
        assert await one.get("k") == b"1"
    async with open_redis("memory://a", servers=servers) as again:
        assert await again.get("k") is None


async def test_a_listener_that_does_not_read_is_closed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_memory, "MAX_PENDING", 10)
    async with open_redis("memory://") as client:
        pubsub = client.pubsub()
        await pubsub.subscribe("c")
        await client.publish([("c", b"x")] * 20)
        with pytest.raises(OctoError, match="too slowly") as caught:
            await pubsub.receive(1.0)
        assert caught.value.code == "unavailable"
        await pubsub.close()


async def test_closing_a_memory_server_ends_its_listeners() -> None:
    async with open_redis("memory://") as client:
        pubsub = client.pubsub()
        await pubsub.subscribe("c")
        await pubsub.receive(1.0)
        reading = asyncio.ensure_future(pubsub.receive(60.0))
        await asyncio.sleep(0)
    with pytest.raises(OctoError, match="closed"):
        await reading


async def test_a_server_that_is_not_there() -> None:
    async with open_redis("redis://127.0.0.1:1/0") as client:
        for call in (client.ping(), client.get("k"), client.publish([("c", b"x")]), client.pubsub().subscribe("c")):
            with pytest.raises(OctoError, match="does not answer") as caught:
                await call
            assert caught.value.code == "unavailable"


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.storage.redis.RESPONSE_SECONDS", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with open_redis(f"redis://127.0.0.1:{port}/0") as client:
        with pytest.raises(OctoError) as caught:
            await client.ping()
        assert caught.value.code == "unavailable"
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("url", ["http://x", "localhost:6379", "", "redis://host:notaport/0"])
async def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError):
        async with open_redis(url):
            pass


@pytest.mark.redis
async def test_a_wrong_password_is_said_and_not_shown(redis_url: str) -> None:
    url = redis_url.replace("redis://", "redis://nobody:hunter2@")
    async with open_redis(url) as client:
        with pytest.raises(OctoError, match="password") as caught:
            await client.ping()
    assert "hunter2" not in str(caught.value)
