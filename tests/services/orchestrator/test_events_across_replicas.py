"""An event that one replica commits reaches the streams of every replica without a poll."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from databases import Backend
from redis_process import RedisProcess

from octollm.clock import SystemClock, Uuid7Generator
from octollm.events import EventBus, EventLog, LogTail, OutboxPolicy, OutboxPublisher
from octollm.services.orchestrator import events_api
from octollm.services.orchestrator.events_api import EventsApi
from octollm.storage import RedisKeys, open_database, open_redis
from octollm.storage.migrations import migrate
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
KEYS = RedisKeys()
NEVER = 3600.0
"""The polls would find an event, too; so they do not happen."""


class Replica:
    """What an orchestrator has for events, over connections of its own."""

    def __init__(self, api: EventsApi, publisher: OutboxPublisher) -> None:
        self._api = api
        self.publisher = publisher

    async def commit(self, task_id: str) -> None:
        async with self._api.db.transaction() as tx:
            await self._api.log.append(
                tx,
                "task.started",
                subject=f"task/{task_id}",
                tenant="t",
                source="orchestrator",
                data={"task_id": task_id},
            )

    async def follow(self) -> AsyncIterator[bytes]:
        """Return a stream of the tenant's events that has begun."""
        stream = self._api._stream("t", 0)
        assert (await anext(stream)).startswith(b":")
        return stream


@contextlib.asynccontextmanager
async def open_replica(url: str, redis_url: str) -> AsyncGenerator[Replica]:
    policy = OutboxPolicy(lease=3 * NEVER, poll=NEVER)
    async with open_database(url, clock=CLOCK) as db, open_redis(redis_url) as redis:
        log = EventLog(db, CLOCK, IDS)
        async with (
            LogTail(redis, KEYS, log) as tail,
            OutboxPublisher(db, log, redis, CLOCK, IDS, keys=KEYS, policy=policy) as publisher,
        ):
            bus = EventBus(redis, KEYS, CLOCK, IDS)
            yield Replica(EventsApi(db, log, bus, tail, CLOCK, asyncio.Event()), publisher)


async def next_task(stream: AsyncIterator[bytes]) -> str:
    async with asyncio.timeout(30):
        lines = (await anext(stream)).decode().splitlines()
    (data,) = (line.removeprefix("data:") for line in lines if line.startswith("data:"))
    return msgspec.json.decode(data)["data"]["task_id"]


@pytest.fixture
def redis_process(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process
    process.kill()


@pytest.mark.redis
async def test_an_event_reaches_the_streams_of_every_replica_without_a_poll(
    backend: Backend, redis_process: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_api, "POLL_SECONDS", NEVER)
    url = f"sqlite:///{tmp_path}/events.db" if backend.base is None else backend.url("octollm_orchestrator")
    async with open_database(url, clock=CLOCK) as db:
        await migrate(db, "orchestrator")
    async with open_replica(url, redis_process.url) as leader:
        await wait_until(lambda: leader.publisher.health.is_leader, description="one numbers the events", timeout=20)
        async with open_replica(url, redis_process.url) as other:
            streams = [await replica.follow() for replica in (leader, other)]
            for number, writer in enumerate((leader, other, other, leader)):
                # The streams wait, since each has had everything before.
                reads = [asyncio.create_task(next_task(stream)) for stream in streams]
                await writer.commit(f"task-{number}")
                assert await asyncio.gather(*reads) == [f"task-{number}"] * 2
            assert not other.publisher.health.is_leader
