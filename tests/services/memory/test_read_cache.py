"""The cache of reads: hits of both levels, races of reads and writes, and a Redis that is lost, slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis as redis_py
from redis_process import RedisProcess

from octollm.clock import Clock, SystemClock, Uuid7Generator
from octollm.services.memory import cache as module
from octollm.services.memory.cache import L1_TTL_SECONDS, MAX_VALUE_BYTES, CacheScope, ReadCache
from octollm.storage import RedisClient
from octollm.storage.keys import CACHE_TTL_SECONDS, RedisKeys
from octollm.storage.redis import open_redis
from octollm.telemetry import Metrics
from octollm.testing import wait_until

SCOPE = CacheScope("acme", ("fact", "", "capital"))
WIDE = CacheScope("acme", ("facts",))


class ShiftedClock(SystemClock):
    """The system's clock, which a test sets forward."""

    def __init__(self) -> None:
        self.shift = 0.0

    def now(self) -> float:
        return super().now() + self.shift

    def monotonic(self) -> float:
        return super().monotonic() + self.shift


@dataclass
class Table:
    """What SQL is here: a value that is committed, and how often it was read."""

    value: bytes = b"1"
    reads: int = 0
    gate: asyncio.Event | None = None
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> tuple[bytes, float]:
        self.reads += 1
        value = self.value
        if self.gate is not None:
            # The snapshot is taken; its reader is slow.
            self.waiting.set()
            await self.gate.wait()
        return value, float("inf")


@dataclass
class Replica:
    cache: ReadCache
    metrics: Metrics
    table: Table

    async def load(self, *scopes: CacheScope) -> bytes:
        return await self.cache.load(("x",), scopes or (WIDE, SCOPE), self.table.read)

    async def write(self, value: bytes) -> None:
        async with self.cache.invalidating(SCOPE):
            self.table.value = value

    def lookups(self, level: str, outcome: str) -> float:
        return (
            self.metrics.registry.get_sample_value(
                "octollm_cache_lookups_total", {"service": "memory", "level": level, "outcome": outcome}
            )
            or 0.0
        )

    async def wait_listening(self) -> None:
        async def healthy() -> bool:
            return self.cache._events is not None and (await self.cache.check_health()).ok  # pyright: ignore[reportPrivateUsage]

        await wait_until(healthy, description="the replica follows the invalidations", timeout=20)


@contextlib.asynccontextmanager
async def replica(redis: RedisClient | None, keys: RedisKeys, table: Table, clock: Clock) -> AsyncGenerator[Replica]:
    metrics = Metrics("memory")
    cache = ReadCache(redis, keys=keys, service="memory", clock=clock, ids=Uuid7Generator(clock), metrics=metrics)
    async with cache:
        made = Replica(cache, metrics, table)
        if redis is not None:
            await made.wait_listening()
        yield made


@pytest.fixture
def keys() -> RedisKeys:
    return RedisKeys(prefix=f"test-{uuid.uuid4().hex}:")


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture(params=["memory", pytest.param("server", marks=pytest.mark.redis)])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisClient]:
    server = os.environ.get("OCTOLLM_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
    async with open_redis("memory://" if request.param == "memory" else server) as client:
        yield client


@pytest.fixture
async def pair(redis: RedisClient, keys: RedisKeys, clock: ShiftedClock) -> AsyncIterator[tuple[Replica, Replica]]:
    table = Table()
    async with replica(redis, keys, table, clock) as one, replica(redis, keys, table, clock) as other:
        yield one, other


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.kill()


async def test_a_value_is_read_once_for_all_replicas(pair: tuple[Replica, Replica]) -> None:
    one, other = pair
    assert [await one.load(), await one.load(), await other.load(), await other.load()] == [b"1"] * 4
    assert one.table.reads == 1
    assert (one.lookups("l1", "hit"), one.lookups("l1", "miss"), one.lookups("l2", "miss")) == (1, 1, 1)
    assert (other.lookups("l1", "hit"), other.lookups("l2", "hit"), other.lookups("l2", "miss")) == (1, 1, 0)


async def test_a_write_reaches_every_replica(pair: tuple[Replica, Replica]) -> None:
    one, other = pair
    for value in (b"2", b"3", b"4"):
        await one.load()
        await other.load()
        await one.write(value)
        assert await one.load() == value

        async def seen(value: bytes = value) -> bool:
            return await other.load() == value

        await wait_until(seen, description="the other replica sees the write")


async def test_a_wide_scope_reaches_all_in_it(pair: tuple[Replica, Replica]) -> None:
    one, other = pair
    await one.load()
    await other.load()
    async with other.cache.invalidating(WIDE):
        other.table.value = b"erased"
    assert await other.load() == b"erased"

    async def seen() -> bool:
        return await one.load() == b"erased"

    await wait_until(seen, description="the other replica sees it")


async def test_a_read_from_before_a_write_does_not_bring_the_old_value_back(pair: tuple[Replica, Replica]) -> None:
    one, other = pair
    one.table.gate = asyncio.Event()
    slow = asyncio.create_task(one.load())
    await one.table.waiting.wait()
    gate, one.table.gate = one.table.gate, None
    await other.write(b"2")
    gate.set()
    # Its caller asked before the write, and may get the old value; nobody after it does.
    assert await slow == b"1"
    assert await one.load() == b"2"
    assert await other.load() == b"2"


async def test_a_read_during_a_write_is_not_cached(pair: tuple[Replica, Replica]) -> None:
    one, other = pair
    await one.load()
    async with one.cache.invalidating(SCOPE):
        # Not committed yet. The other replica has nothing in L1.
        assert await other.load() == b"1"
        assert other.table.reads == 2
        other.table.value = b"2"
    assert await one.load() == b"2"

    async def seen() -> bool:
        return await other.load() == b"2"

    await wait_until(seen, description="the other replica sees it")


async def test_a_failed_or_cancelled_write_invalidates_too(pair: tuple[Replica, Replica]) -> None:
    one, _other = pair
    await one.load()
    with pytest.raises(ConnectionError):
        async with one.cache.invalidating(SCOPE):
            one.table.value = b"2"
            raise ConnectionError("the commit may have taken effect")
    assert await one.load() == b"2"
    started = asyncio.Event()

    async def write() -> None:
        async with one.cache.invalidating(SCOPE):
            one.table.value = b"3"
            started.set()
            await asyncio.Event().wait()

    writing = asyncio.create_task(write())
    await started.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await one.load() == b"3"


async def test_l1_keeps_a_value_for_seconds_only(pair: tuple[Replica, Replica], clock: ShiftedClock) -> None:
    one, _other = pair
    await one.load()
    clock.shift += L1_TTL_SECONDS + 0.1
    await one.load()
    assert (one.lookups("l1", "hit"), one.lookups("l2", "hit")) == (0, 1)


async def test_a_value_holds_as_long_as_its_reader_said(pair: tuple[Replica, Replica], clock: ShiftedClock) -> None:
    one, other = pair

    async def read() -> tuple[bytes, float]:
        one.table.reads += 1
        return b"until noon", 2.0

    for each in (one, other, one):
        await each.cache.load(("y",), (SCOPE,), read)
    assert one.table.reads == 1
    clock.shift += 2.1
    await other.cache.load(("y",), (SCOPE,), read)
    assert one.table.reads == 2


async def test_a_large_value_is_not_cached(pair: tuple[Replica, Replica]) -> None:
    one, _other = pair
    one.table.value = b"x" * (MAX_VALUE_BYTES + 1)
    await one.load()
    await one.load()
    assert one.table.reads == 2


async def test_an_exception_is_not_cached(pair: tuple[Replica, Replica]) -> None:
    one, _other = pair

    async def fail() -> tuple[bytes, float]:
        raise KeyError("missing")

    with pytest.raises(KeyError):
        await one.cache.load(("x",), (WIDE, SCOPE), fail)
    assert await one.load() == b"1"


async def test_many_invalidations_drop_all_rather_than_grow(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _other = pair
    monkeypatch.setattr(module, "MAX_SCOPES", 3)
    await one.load()
    for number in range(5):
        async with one.cache.invalidating(CacheScope("acme", ("fact", "", f"n{number}"))):
            pass
    assert await one.load() == b"1"
    assert len(one.cache._invalidated) <= 3  # pyright: ignore[reportPrivateUsage]


async def test_without_redis_nothing_is_cached(keys: RedisKeys, clock: ShiftedClock) -> None:
    async with replica(None, keys, Table(), clock) as alone:
        await alone.load()
        await alone.write(b"2")
        assert await alone.load() == b"2"
        assert alone.table.reads == 2
        assert alone.cache.is_cleared


@pytest.mark.redis
async def test_no_text_of_a_user_is_in_redis_names(server: RedisProcess, clock: ShiftedClock) -> None:
    hostile = CacheScope("tenant {x}*\r\nFLUSHALL", ("fact", "../\x00", "a b"))
    async with open_redis(server.url) as redis, replica(redis, RedisKeys(), Table(), clock) as one:
        await one.load(hostile)
        await one.load(hostile)
        names = [name.decode() for name in redis_py.Redis.from_url(server.url).scan_iter()]
    assert len(names) == 2
    assert all(re.fullmatch(r"octollm:cache:\{[0-9a-f]{32}\}:(generation|value):[0-9a-f]{32}", name) for name in names)
    client = redis_py.Redis.from_url(server.url)
    assert all(client.ttl(name) > 0 for name in names)


@pytest.mark.redis
@pytest.mark.parametrize("fault", ["pause", "kill"])
async def test_a_lost_redis_costs_speed_and_no_truth(
    server: RedisProcess, clock: ShiftedClock, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REDIS_PAUSE_SECONDS", 0.05)
    table, keys = Table(), RedisKeys()
    async with (
        open_redis(server.url) as redis,
        replica(redis, keys, table, clock) as one,
        replica(redis, keys, table, clock) as other,
    ):
        await one.load()
        await other.load()
        process = server._process  # pyright: ignore[reportPrivateUsage]
        assert process is not None
        if fault == "pause":
            process.send_signal(signal.SIGSTOP)
        else:
            server.kill()
        # The write waits for Redis a moment only, and its own replica reads it back at once.
        async with asyncio.timeout(3):
            await one.write(b"2")
        assert await one.load() == b"2"
        assert not one.cache.is_cleared
        # The other one has not heard of it: what it has in L1 ends with its time.
        clock.shift += L1_TTL_SECONDS
        assert await other.load() == b"2"
        if fault == "pause":
            process.send_signal(signal.SIGCONT)
        else:
            server.start()
        # Neither the old value in a Redis that slept, nor what either replica has, comes back.
        for _ in range(20):
            assert await one.load() == b"2"
            assert await other.load() == b"2"
        await wait_until(lambda: one.cache.is_cleared, description="the invalidation was sent", timeout=20)
        await one.wait_listening()
        await other.wait_listening()
        await one.write(b"3")

        async def seen() -> bool:
            return await other.load() == b"3"

        await wait_until(seen, description="the other replica hears of writes again", timeout=20)


DYING_WRITER = """
import asyncio, os, signal, sys
from octollm.clock import SystemClock, Uuid7Generator
from octollm.services.memory.cache import CacheScope, ReadCache
from octollm.storage.keys import RedisKeys
from octollm.storage.redis import open_redis
from octollm.telemetry import Metrics

async def main():
    clock = SystemClock()
    async with open_redis(sys.argv[1]) as redis:
        cache = ReadCache(redis, keys=RedisKeys(), service="memory", clock=clock, ids=Uuid7Generator(clock),
                          metrics=Metrics("memory"))
        async with cache, cache.invalidating(CacheScope("acme", ("fact", "", "capital"))):
            # The commit took effect; the invalidation is still to come.
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.redis
async def test_a_writer_that_is_killed_after_its_commit_leaves_no_old_value_in_redis(
    server: RedisProcess, clock: ShiftedClock
) -> None:
    table = Table()
    async with open_redis(server.url) as redis, replica(redis, RedisKeys(), table, clock) as one:
        await one.load()
        await one.load()
        assert table.reads == 1
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING_WRITER, server.url)
        assert await process.wait() == -signal.SIGKILL
        table.value = b"2"
        # A replica that starts now, and this one when its L1 ends, read SQL.
        async with replica(redis, RedisKeys(), table, clock) as fresh:
            assert await fresh.load() == b"2"
        clock.shift += L1_TTL_SECONDS
        assert await one.load() == b"2"


@pytest.mark.redis
async def test_a_reader_beside_many_writes_is_at_most_the_write_in_flight_behind(
    server: RedisProcess, clock: ShiftedClock
) -> None:
    table, keys = Table(value=b"0"), RedisKeys()
    async with (
        open_redis(server.url) as redis,
        replica(redis, keys, table, clock) as one,
        replica(redis, keys, table, clock) as other,
    ):
        done = asyncio.Event()

        async def read(reader: Replica) -> None:
            while not done.is_set():
                committed = int(table.value)
                value = int(await reader.load())
                # Only its own replica hears of a write before the writer does.
                assert reader is other or value >= committed - 1
                await asyncio.sleep(0)

        readers = [asyncio.create_task(read(each)) for each in (one, other, one)]
        for number in range(1, 150):
            await one.write(str(number).encode())
            assert int(await one.load()) == number
        done.set()
        await asyncio.gather(*readers)

        async def seen() -> bool:
            return await other.load() == b"149"

        await wait_until(seen, description="the other replica has the last value")
        assert one.lookups("l1", "hit") + one.lookups("l2", "hit") > 0


def test_the_bounds_fit_together() -> None:
    assert L1_TTL_SECONDS < CACHE_TTL_SECONDS
    assert module.CACHE_WRITE_SECONDS < module.GENERATION_TTL_SECONDS
