"""Redis Cluster, Sentinel, and servers that accept connections and say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis_process import RedisClusterProcesses, RedisProcess, RedisSentinelProcesses

from octollm.errors import OctoError, SettingError
from octollm.storage import redis as redis_module
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import LISTEN_SECONDS, RESPONSE_SECONDS, RedisClient, open_redis
from octollm.storage.redis_protocol import PubSub
from octollm.storage.redis_topology import RedisAddress, parse_address
from octollm.testing import wait_until

NOTICED_SECONDS = 15.0
"""How long a server that hangs may go unnoticed."""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis+cluster://a:1,b:2", RedisAddress(tls=False, hosts=(("a", 1), ("b", 2)))),
        ("rediss+cluster://a", RedisAddress(tls=True, hosts=(("a", 6379),))),
        ("redis+cluster://u:p%40ss@[::1]:7/0", RedisAddress(False, (("::1", 7),), "u", "p@ss")),
        ("redis+cluster://:secret@[::1]", RedisAddress(False, (("::1", 6379),), None, "secret")),
        ("redis+sentinel://a,b:2/main", RedisAddress(False, (("a", 26379), ("b", 2)), master="main")),
        (
            "redis+sentinel://:p@a/main/3?sentinel_password=s",
            RedisAddress(False, (("a", 26379),), None, "p", "main", 3, None, "s"),
        ),
    ],
)
def test_a_url_names_hosts_credentials_and_master(url: str, expected: RedisAddress) -> None:
    assert parse_address(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://user:secret@",
        "redis+cluster://a:0",
        "redis+cluster://a:secret",
        "redis+cluster://a:1/2",
        "redis+sentinel://a:1",
        "redis+sentinel://a:1/main/x",
        "redis+sentinel://a:1/main/0/1",
    ],
)
async def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        async with open_redis(url):
            pass
    assert "secret" not in str(caught.value)


async def subscribed(client: RedisClient, pattern: str) -> PubSub:
    pubsub = client.pubsub()
    await pubsub.psubscribe(pattern)
    message = await pubsub.receive(5)
    assert message is not None
    assert message.subscribed
    return pubsub


@pytest.fixture
def private_cluster(tmp_path: Path) -> Iterator[RedisClusterProcesses]:
    processes = RedisClusterProcesses(tmp_path)
    try:
        processes.start()
        yield processes
    finally:
        processes.kill()


@pytest.mark.redis
async def test_channels_of_a_cluster_survive_the_death_of_the_node_that_they_go_through(
    private_cluster: RedisClusterProcesses, keys: RedisKeys
) -> None:
    async with open_redis(private_cluster.url) as client:
        channel = keys.channel("events:task:completed")
        for node in private_cluster.nodes:  # a subscription through each node gets what one node was sent
            pubsub = await subscribed(client, keys.channel("events:*"))
            await client.publish([(channel, str(n).encode()) for n in range(50)])
            found = [await pubsub.receive(5) for _ in range(50)]
            assert [message.data for message in found if message is not None] == [str(n).encode() for n in range(50)]
            await pubsub.close()
            del node
        private_cluster.nodes[0].kill()

        async def works() -> bool:
            try:
                listener = await subscribed(client, keys.channel("events:*"))
                await client.publish([(channel, b"after")])
            except OctoError as error:
                assert error.code == "unavailable"
                return False
            message = await listener.receive(0.3)
            await listener.close()
            return message is not None and message.data == b"after"

        await wait_until(works, description="messages pass through the nodes that are left", timeout=15)


@pytest.fixture
def private_sentinel(tmp_path: Path) -> Iterator[RedisSentinelProcesses]:
    processes = RedisSentinelProcesses(tmp_path)
    try:
        processes.start()
        yield processes
    finally:
        processes.kill()


@pytest.mark.redis
async def test_the_new_master_is_found_after_a_failover(
    private_sentinel: RedisSentinelProcesses, keys: RedisKeys
) -> None:
    async with open_redis(private_sentinel.url) as client:
        pubsub = await subscribed(client, keys.channel("events:*"))
        await client.set(keys.text("t"), b"1", ttl=100)
        private_sentinel.master.kill()
        with pytest.raises(OctoError):  # the subscription ends: it must not hide what it missed
            while True:
                await pubsub.receive(1)
        with contextlib.suppress(OctoError):
            await pubsub.close()

        async def works() -> bool:
            try:
                return await client.set(keys.text("u"), b"2", ttl=100)
            except OctoError as error:
                assert error.code == "unavailable"
                return False

        await wait_until(works, description="the replica is the master", timeout=20)
        again = await subscribed(client, keys.channel("events:*"))
        await client.publish([(keys.channel("events:x:y"), b"after")])
        message = await again.receive(5)
        assert message is not None
        assert message.data == b"after"
        await again.close()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the limits a tenth, so that a test does not wait for them."""
    for name in ("IDLE_PROBE_SECONDS", "LISTEN_SECONDS", "RESPONSE_SECONDS", "CONNECT_SECONDS"):
        monkeypatch.setattr(redis_module, name, getattr(redis_module, name) / 10)


def test_the_limits_add_up_to_less_than_what_is_promised() -> None:
    # A ping after one idle time, the failure after two; the loop looks once for each LISTEN_SECONDS.
    assert 2 * redis_module.IDLE_PROBE_SECONDS + 2 * LISTEN_SECONDS < NOTICED_SECONDS
    assert RESPONSE_SECONDS < NOTICED_SECONDS


@contextlib.asynccontextmanager
async def silent_relay(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A relay to a server that, once its event is set, goes on reading and passes on nothing."""
    swallows = asyncio.Event()
    connections: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not swallows.is_set():
                writer.write(data)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(relay(reader, writer)))

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            upstream_writer.close()
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], swallows
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


@pytest.mark.redis
@pytest.mark.parametrize("fault", ["stopped", "swallowing"])
async def test_a_server_that_says_nothing_is_noticed(
    tmp_path: Path, keys: RedisKeys, short_timeouts: None, fault: str
) -> None:
    process = RedisProcess(tmp_path)
    process.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            port, swallows = await stack.enter_async_context(silent_relay(process.port))
            client = await stack.enter_async_context(open_redis(f"redis://127.0.0.1:{port}/0"))
            pubsub = await subscribed(client, keys.channel("events:*"))
            await client.ping()
            process.pause() if fault == "stopped" else swallows.set()
            began = time.monotonic()
            with pytest.raises(OctoError) as command:
                await client.publish([(keys.channel("events:x:y"), b"1")])
            with pytest.raises(OctoError) as listening:
                while True:
                    assert await pubsub.receive(30) is None
            assert time.monotonic() - began < NOTICED_SECONDS / 10 + 3
            assert command.value.code == listening.value.code == "unavailable"
            # A new subscription is not confirmed, and that is noticed as well.
            with pytest.raises(OctoError) as fresh:
                again = client.pubsub()
                await again.psubscribe(keys.channel("events:*"))
                assert await again.receive(30) is None
            assert fresh.value.code == "unavailable"
            if fault == "stopped":
                process.resume()
            swallows.clear()

            async def works() -> bool:
                try:
                    await client.ping()
                except OctoError:
                    return False
                return True

            await wait_until(works, description="the client goes on", timeout=10)
            for each in (pubsub, again):
                with contextlib.suppress(OctoError):
                    await each.close()
    finally:
        process.kill()
