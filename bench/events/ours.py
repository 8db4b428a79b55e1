"""The event log of this project on PostgreSQL: transactions with events, the outbox, and durable subscribers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import structlog

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.subscriptions import SubscriptionSpec
from octollm.events import (
    DurableSubscription,
    DurableSubscriptions,
    EventDraft,
    EventLog,
    LogTail,
    OutboxPolicy,
    OutboxPublisher,
)
from octollm.events.outbox import FaultHook
from octollm.storage import Database, RedisKeys, open_database, open_redis
from octollm.storage.migrations import migrate

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
SPEC = SubscriptionSpec(("events:task:*",))
SUBJECTS = 200
WRITERS = 5
TENANT = "acme"


@dataclass(frozen=True)
class Measured:
    """Events a second, and µs of CPU for each in this process and in PostgreSQL (0 where that cannot be read)."""

    rate: float
    cpu: float
    server_cpu: float


class Meter:
    """Measures what happens within ``async with``."""

    def __init__(self, db: Database, count: int) -> None:
        self._db = db
        self._count = count

    async def __aenter__(self) -> Meter:
        self._server = await self._server_seconds()
        self._cpu, self._began = time.process_time(), time.perf_counter()
        return self

    async def __aexit__(self, *_error: object) -> None:
        elapsed, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        server = max(0.0, await self._server_seconds() - self._server)
        per_event = 1e6 / self._count
        self.measured = Measured(self._count / elapsed, cpu * per_event, server * per_event)

    async def _server_seconds(self) -> float:
        """Return the CPU of the server's processes for this database, when the server runs on this machine."""
        assert self._db.direct_pool is not None
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        return sum(_cpu_seconds(pid) for (pid,) in await self._db.direct_pool.fetch(query))


def _cpu_seconds(pid: object) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Log:
    """A log in a database of its own, and what follows it."""

    db: Database
    events: EventLog
    durable: DurableSubscriptions
    publisher: OutboxPublisher
    written: int = 0
    committed: dict[int, float] = field(default_factory=dict[int, float])
    """The time of the commit by the event's number."""

    async def write(self, count: int) -> None:
        """Commit one transaction with ``count`` events."""
        first, self.written = self.written, self.written + count
        async with self.db.transaction() as tx:
            subject = f"task-{first % SUBJECTS}"
            await self.events.append_all(
                tx,
                [
                    EventDraft(
                        "task.progress",
                        subject=f"task/{subject}",
                        tenant=TENANT,
                        source="bench",
                        data={"task_id": subject, "progress": 1, "number": number},
                    )
                    for number in range(first, first + count)
                ],
            )
        now = time.perf_counter()
        self.committed.update((number, now) for number in range(first, first + count))

    async def write_all(self, count: int, per_transaction: int) -> None:
        """Commit ``count`` events by a few writers at a time."""
        transactions = iter(range(count // per_transaction))

        async def writer() -> None:
            for _ in transactions:
                await self.write(per_transaction)

        await asyncio.gather(*(writer() for _ in range(WRITERS)))

    @contextlib.asynccontextmanager
    async def subscribe(self, start: str = "latest") -> AsyncGenerator[DurableSubscription]:
        """Subscribe to everything that :meth:`write` writes, and delete the subscription at the end."""
        name = f"bench-{uuid.uuid4().hex[:12]}"
        try:
            async with self.durable.open(name, SPEC, event_tenant=TENANT, start=start) as events:  # type: ignore[arg-type]
                yield events
        finally:
            await self.durable.subscriptions.delete("system", name)


@contextlib.asynccontextmanager
async def open_log(
    database_url: str, redis_url: str, fault_hook: FaultHook | None = None, policy: OutboxPolicy | None = None
) -> AsyncGenerator[Log]:
    """Make a database on a server, open a log in it, and drop it at the end."""
    more: Any = {"policy": policy, "fault_hook": fault_hook}
    name = f"octollm_bench_{uuid.uuid4().hex[:8]}"
    admin = await asyncpg.connect(database_url)
    await admin.execute(f"CREATE DATABASE {name}")
    url = f"{database_url.rpartition('/')[0]}/{name}?search_path=octollm_orchestrator"
    keys = RedisKeys(prefix=f"{name}:")
    try:
        async with open_database(url, clock=CLOCK) as db, open_redis(redis_url) as redis:
            await migrate(db, "orchestrator")
            log = EventLog(db, CLOCK, IDS)
            async with (
                LogTail(redis, keys, log) as tail,
                OutboxPublisher(db, log, redis, CLOCK, IDS, keys=keys, **more) as publisher,
            ):
                durable = DurableSubscriptions.build(db, log, tail, CLOCK, IDS, structlog.get_logger())
                yield Log(db, log, durable, publisher)
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@contextlib.asynccontextmanager
async def handling(events: DurableSubscription, count: int, found: list[int]) -> AsyncGenerator[asyncio.Event]:
    """Handle events, and set the event that is yielded when ``count`` were; ``found`` gets their numbers."""
    done = asyncio.Event()

    async def handle(delivery: Any) -> None:
        found.append(delivery.event.data["number"])
        if len(found) == count:
            done.set()

    runner = asyncio.create_task(events.run(handle, concurrency=4))
    try:
        yield done
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)


async def latencies(log: Log, count: int, pause: float) -> list[float]:
    """Return the seconds from the commit of each of ``count`` transactions to its handler."""
    found: list[float] = []
    done = asyncio.Event()

    async def handle(delivery: Any) -> None:
        # The handler may run before the writer's coroutine goes on after its commit.
        now = time.perf_counter()
        found.append(max(0.0, now - log.committed.get(delivery.event.data["number"], now)))
        if len(found) == count:
            done.set()

    async with log.subscribe() as events:
        runner = asyncio.create_task(events.run(handle))
        for _ in range(count):
            await log.write(1)
            await asyncio.sleep(pause)
        await asyncio.wait_for(done.wait(), 30)
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
    return found


async def _never(_point: str) -> None:
    await asyncio.Event().wait()


async def publish(database_url: str, redis_url: str, per_transaction: int, count: int) -> Measured:
    """Measure transactions alone, whose events nobody numbers, publishes or handles."""
    async with open_log(database_url, redis_url, _never) as log:
        await log.write_all(per_transaction * WRITERS, per_transaction)  # warm
        async with Meter(log.db, count) as meter:
            await log.write_all(count, per_transaction)
        return meter.measured


async def throughput(log: Log, subscribers: int, per_transaction: int, count: int) -> tuple[float, Measured]:
    """Return events/s committed, and what it took until every subscriber had handled and acknowledged all."""
    async with contextlib.AsyncExitStack() as stack:
        waiting: list[asyncio.Event] = []
        for _ in range(subscribers):
            events = await stack.enter_async_context(log.subscribe())
            waiting.append(await stack.enter_async_context(handling(events, count, [])))
        began = time.perf_counter()
        async with Meter(log.db, count) as meter:
            await log.write_all(count, per_transaction)
            written = time.perf_counter() - began
            await asyncio.wait_for(asyncio.gather(*(done.wait() for done in waiting)), 120)
    return count / written, meter.measured


async def catch_up(log: Log, count: int) -> Measured:
    """Measure a subscriber that handles ``count`` events from the beginning of the log, while nothing is written."""
    async with log.subscribe("earliest") as events, Meter(log.db, count) as meter, handling(events, count, []) as done:
        await asyncio.wait_for(done.wait(), 120)
    return meter.measured


async def recovery(database_url: str, redis_url: str, lease: float) -> float:
    """Return the seconds from a commit to its handler after the publisher died without giving up its lease."""
    dead = asyncio.Event()

    async def die(_point: str) -> None:
        if dead.is_set():
            await asyncio.Event().wait()

    policy = OutboxPolicy(lease=lease)
    async with (
        open_log(database_url, redis_url, die, policy) as log,
        open_redis(redis_url) as redis,
        log.subscribe() as events,
        handling(events, 2, []) as done,
    ):
        await log.write(1)
        await log.publisher.flush(30)
        dead.set()
        began = time.perf_counter()
        await log.write(1)
        keys = RedisKeys(prefix=f"bench-{uuid.uuid4().hex[:8]}:")
        async with OutboxPublisher(log.db, log.events, redis, CLOCK, IDS, keys=keys, policy=policy):
            await asyncio.wait_for(done.wait(), 60)
            return time.perf_counter() - began
