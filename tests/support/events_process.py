"""A process of a run of faults on events: :func:`start_process` with :class:`Options`.

``publisher`` publishes the log, ``durable`` has one replica of each durable subscription, ``ephemeral`` has
subscriptions to Redis, and ``host`` has all of these. Subscribers append a line to their file for whatever reaches
them, before it is acknowledged; `events_checker.py` reads these files.

SIGUSR1 sets the process's wall clock back by ten minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import structlog

from octollm.clock import SystemClock, Uuid7Generator
from octollm.concurrency import retry_outage
from octollm.contracts.subscriptions import SubscriptionSpec
from octollm.events import (
    DeliveryPolicy,
    DurableSubscriptions,
    EventBus,
    EventLog,
    Gap,
    LogTail,
    OutboxPolicy,
    OutboxPublisher,
    QueuedDelivery,
    RejectDelivery,
)
from octollm.resilience import Backoff
from octollm.storage import Database, RedisClient, RedisKeys, open_database, open_redis

T = TypeVar("T")
PATTERNS = ("events:task:*", "events:step:*")
OUTBOX = OutboxPolicy(lease=1.0, backoff_max=1.0)
DELIVERY = DeliveryPolicy(lease=3.0, renew=0.5)
STEP_BACK_SECONDS = 600.0
SLOW_SECONDS = 0.5
STALL_SECONDS = 1.5
"""Longer than the sequencer's lease: meanwhile another publisher takes it."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a process does. ``die_at`` kills a publisher at a fault point; ``stall`` stops it at points now and then."""

    role: Literal["publisher", "durable", "ephemeral", "host"]
    database: str
    redis: str
    file: str = ""
    durable: tuple[str, ...] = ()
    ephemeral: tuple[str, ...] = ()
    offset: float = 0.0
    die_at: str = ""
    stall: bool = False
    seed: int = 0
    lease: float = DELIVERY.lease


class SteppingClock(SystemClock):
    """A wall clock that is set back on request; the monotonic clock is the system's."""

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def now(self) -> float:
        return super().now() + self.offset

    def step_back(self, *_: object) -> None:
        self.offset -= STEP_BACK_SECONDS


class Recorder:
    """Appends lines to the file of a process. Each is with the kernel before an event is acknowledged."""

    def __init__(self, file: str) -> None:
        self._file = Path(file).open("a", buffering=1)  # noqa: SIM115  open until the process is killed

    def write(self, *values: object) -> None:
        # One clock for every process on Linux, which no fault sets.
        self._file.write(json.dumps([*values, time.monotonic()]) + "\n")


class Faults:
    """What goes wrong inside a publisher, at the points that :class:`OutboxPublisher` reaches."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._random = random.Random(options.seed)
        self._reached = 0

    async def __call__(self, point: str) -> None:
        self._reached += 1
        # Not at once, but amid its work; the lease it acquires once.
        if point == self._options.die_at and (self._reached > 3 or point == "acquired"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._options.stall and self._random.random() < 0.02:
            # The whole process stops, as by a full swap or a suspended machine, and believes to hold the lease after.
            time.sleep(STALL_SECONDS)


def end_process(how: str) -> None:
    """End as a crash of a library or a lack of memory does: with no chance to write anything."""
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


async def subscribe_durably(name: str, durable: DurableSubscriptions, recorder: Recorder, lease: float) -> None:
    """Handle events of a durable subscription until the process is killed."""
    spec = SubscriptionSpec(PATTERNS, max_attempts=2, retry_first=0.01, retry_limit=0.01)

    async def handle(delivery: QueuedDelivery) -> None:
        event = delivery.event
        if event.data.get("poison"):
            raise RejectDelivery("poison")
        if how := event.data.get("deadly"):
            end_process(str(how))
        if event.data.get("slow"):
            # Work that is under way whenever another event ends the process.
            await asyncio.sleep(SLOW_SECONDS)
        recorder.write("durable", name, event.seq, event.id, event.subject, event.version)

    policy = replace(DELIVERY, lease=lease)
    async with durable.open(name, spec, start="earliest", policy=policy) as events:
        await events.run(handle)


async def read_head(db: Database, log: EventLog) -> int:
    """Return the position of the last event."""
    async with db.read() as snapshot:
        _oldest, head = await log.read_bounds(snapshot)
    return head


async def outlast_outage(work: Callable[[], Awaitable[T]]) -> T:
    """Wait for what is away at the start, as `octollm serve` does: a fault may be under way, or begin just then."""
    return await retry_outage(work, Backoff(0.1, 1.0), name="start", log=structlog.get_logger())


async def subscribe(name: str, bus: EventBus, log: EventLog, db: Database, recorder: Recorder) -> None:
    """Record events and gaps of a live subscription until the process is killed."""

    def on_gap(gap: Gap) -> None:
        recorder.write("gap", name, gap.reason, gap.after, gap.channel)

    async with contextlib.AsyncExitStack() as stack:
        listening = lambda: stack.enter_async_context(bus.subscribe(*PATTERNS, on_gap=on_gap))  # noqa: E731
        events = await outlast_outage(listening)
        # What is numbered from here on is published while it listens.
        recorder.write("ready", name, await outlast_outage(lambda: read_head(db, log)))
        async for event in events:
            recorder.write("event", name, event.seq, event.id)


async def main(options: Options) -> None:
    """Run the role until the process is killed."""
    clock = SteppingClock(options.offset)
    signal.signal(signal.SIGUSR1, clock.step_back)
    ids = Uuid7Generator(clock)
    keys = RedisKeys()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    async with contextlib.AsyncExitStack() as stack:
        db = await outlast_outage(lambda: stack.enter_async_context(open_database(options.database, clock=clock)))
        redis: RedisClient = await stack.enter_async_context(open_redis(options.redis))
        log = EventLog(db, clock, ids)
        if options.role in ("publisher", "host"):
            publisher = OutboxPublisher(
                db, log, redis, clock, ids, keys=keys, policy=OUTBOX, fault_hook=Faults(options)
            )
            await stack.enter_async_context(publisher)
        work: list[Any] = []
        if options.file:
            recorder = Recorder(options.file)
            tail = await stack.enter_async_context(LogTail(redis, keys, log))
            durable = DurableSubscriptions.build(db, log, tail, clock, ids, structlog.get_logger())
            bus = EventBus(redis, keys, clock, ids, durable)
            work += [subscribe_durably(name, durable, recorder, options.lease) for name in options.durable]
            work += [subscribe(name, bus, log, db, recorder) for name in options.ephemeral]
        await asyncio.gather(*work, asyncio.Event().wait())


def run(options: Options, errors: str) -> None:
    """Run in a process of its own, whose output goes to the file ``errors``."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    asyncio.run(main(options))


# Forked from a process that has imported what takes long: a start takes milliseconds instead of seconds of CPU time.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["octollm.events", "sqlalchemy.dialects.postgresql.asyncpg", "aiosqlite", "redis.asyncio"]
)


def start_process(options: Options, errors: Path) -> ForkServerProcess:
    """Start a process; its exit code is -9 when it was killed."""
    process = _SERVER.Process(target=run, args=(options, str(errors)), daemon=True)
    process.start()
    return process
