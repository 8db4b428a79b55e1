"""Where faults on events happen: private servers, the processes of `events_process.py`, and a writer.

One fault follows the other. During each a share of the events is written, which carry its name; the next begins when
every durable subscriber has handled them. `events_checker.py` then compares records and database.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
from events_checker import Run
from events_process import Options, SteppingClock, start_process
from postgres_process import PostgresProcess
from redis_process import RedisProcess
from sqlalchemy import func, select

from octollm.clock import Uuid7Generator
from octollm.contracts.events import EVENT_CATALOGUE
from octollm.errors import OctoError
from octollm.events import EventDraft, EventLog, task_subject
from octollm.storage import Database, open_database
from octollm.storage.tables import (
    delayed_subjects,
    events,
    relay_state,
    subscription_consumers,
    subscription_partitions,
)
from octollm.testing import wait_until

TYPES = ("task.progress", "task.planned", "step.started", "step.completed")
SUBJECTS = 50
WRITERS = 2
DURABLE = tuple(f"durable-{number}" for number in range(1, 6))
EPHEMERAL = tuple(f"ephemeral-{number}" for number in range(1, 6))
# A subscriber that does not read fills this, and Redis then closes its connection.
REDIS_OPTIONS = ("--client-output-buffer-limit", "pubsub", "1mb", "512kb", "2")
CATCH_UP_SECONDS = 120.0
"""How long a fault may take to be over on a machine that is busy: a run that is sound is not decided by time."""


@dataclass(frozen=True)
class Size:
    """How much a run does: events in all, how often or long each fault is, events a second at most."""

    events: int
    times: int
    pause: float
    rate: float = 1000.0
    pace: float = 1.0
    """Factor of every pause that need not outlast a lease."""

    @classmethod
    def of(cls, number: int) -> Size:
        """Return the faults in full from 50,000 events on, and short ones below, unless ``PAUSE`` says how long."""
        full = number >= 50_000
        pause = float(os.environ.get("PAUSE", "60" if full else "1"))
        rate = float(os.environ.get("RATE", "1000"))
        return cls(number, 10 if full else 2, pause, rate, 1.0 if full else 0.3)


class Processes:
    """The processes of a run by name. Each is killed as by kill -9; started again, it has a new file."""

    def __init__(self, database: str, redis: str, folder: Path, seed: int) -> None:
        self._common = {"database": database, "redis": redis, "seed": seed}
        self._folder = folder
        self._options: dict[str, Options] = {}
        self._running: dict[str, ForkServerProcess] = {}
        self._files: dict[str, str] = {}
        self._started = 0

    def start(self, name: str, **options: Any) -> None:
        """Start a process, as last time but for ``options``."""
        known = msgspec.structs.asdict(self._options[name]) if name in self._options else self._common
        self._options[name] = msgspec.convert({**known, **options}, Options)
        self._started += 1
        made = self._options[name]
        if made.durable or made.ephemeral:
            self._files[name] = f"{name}-{self._started}.jsonl"
            made = msgspec.structs.replace(made, file=str(self._folder / self._files[name]))
        made = msgspec.structs.replace(made, seed=made.seed + self._started)
        self._running[name] = start_process(made, self._folder / f"{name}.err")

    def kill(self, name: str) -> None:
        """Kill a process, also one that is stopped."""
        process = self._running.pop(name)
        process.kill()
        process.join()

    def restart(self, name: str, **options: Any) -> None:
        """Kill a process and start it again, as last time but for ``options``."""
        self.kill(name)
        self.start(name, **options)

    def signal(self, name: str, number: int) -> None:
        """Send a signal."""
        pid = self._running[name].pid
        assert pid is not None
        os.kill(pid, number)

    async def wait_for_death(self, name: str) -> None:
        """Wait until a process has killed itself."""
        process = self._running[name]
        died = lambda: not process.is_alive()  # noqa: E731
        await wait_until(died, description=f"{name} killed itself", timeout=CATCH_UP_SECONDS)
        assert process.exitcode == -signal.SIGKILL, self._describe(name)
        del self._running[name]

    def _describe(self, name: str) -> str:
        """Say how a process ended, with the last lines that it wrote: first the error, which a long log would cut."""
        errors = (self._folder / f"{name}.err").read_text().splitlines()
        raised = [line for line in errors if line and not line[0].isspace()][-3:]
        return "\n".join([f"{name} ended with exit code {self._running[name].exitcode}", *raised, "", *errors[-60:]])

    def check(self) -> None:
        """Assert that no process has ended by itself: what it cannot bear is a fault of the product."""
        for name, process in self._running.items():
            assert process.is_alive(), self._describe(name)

    @property
    def alive(self) -> list[str]:
        """The files of the running processes."""
        return [self._files[name] for name in self._running if name in self._files]

    def close(self) -> None:
        """Kill every process."""
        for name in tuple(self._running):
            self.kill(name)


Happen = Callable[["Stage"], Awaitable[None]]


@dataclass
class Stage:
    """What a fault can reach."""

    db: Database
    clock: SteppingClock
    redis: RedisProcess
    processes: Processes
    size: Size
    chance: random.Random
    folder: Path
    postgres: PostgresProcess | None = None
    disk: Path | None = None
    poison: int = 0
    """Events to poison next."""
    refused: int = 0
    """Transactions that the database refused."""
    faults: list[str] = field(default_factory=list[str])

    async def pause(self, seconds: float) -> None:
        """Let some time pass: in a fault that is what it takes, and no condition ends it."""
        await self.outlast(seconds * self.size.pace)

    async def outlast(self, seconds: float) -> None:
        """Let a lease end."""
        await asyncio.sleep(seconds * self.chance.uniform(0.9, 1.1))

    async def write(self, fault: str, number: int, per_second: float, over: asyncio.Event) -> None:
        """Write at least ``number`` events, and go on until the fault is over."""
        log = EventLog(self.db, self.clock, Uuid7Generator(self.clock))
        started, written = time.monotonic(), 0
        while written < number or not over.is_set():
            ahead = started + written / per_second - time.monotonic()
            if written < number and ahead > 0:
                await asyncio.sleep(ahead)
            elif written >= number:
                # As many as were asked for, and few more: only so that the fault is not over an idle log.
                await asyncio.sleep(0.1)
            size, poisoned = self.chance.randint(1, 19), self.poison > 0
            try:
                async with self.db.transaction() as tx:
                    await log.append_all(tx, self._drafts(fault, size, poisoned=poisoned))
            except OctoError as error:
                assert error.code in ("unavailable", "overloaded"), error
                self.refused += 1
                await asyncio.sleep(0.05)
            else:
                written += size
                self.poison -= poisoned

    def _drafts(self, fault: str, size: int, *, poisoned: bool) -> list[EventDraft]:
        subject = f"task-{self.chance.randrange(SUBJECTS)}"
        drafts: list[EventDraft] = []
        for number in range(size):
            kind = EVENT_CATALOGUE[self.chance.choice(TYPES)]
            marks = {"fault": fault, "written": time.monotonic(), "poison": poisoned and number == 0}
            data = {**kind.example, "task_id": subject, **marks}
            drafts.append(EventDraft(kind.name, task_subject(subject), "faults", "orchestrator", data))
        return drafts

    async def run_fault(
        self, name: str, number: int, seconds: float, fault: Callable[[Stage], Awaitable[None]]
    ) -> None:
        """Write a share of the events while ``fault`` happens, and wait until all of them are handled."""
        over = asyncio.Event()

        async def happen() -> None:
            try:
                await fault(self)
            finally:
                over.set()

        self.faults.append(name)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(happen())
            for _ in range(WRITERS):
                rate = min(self.size.rate, number / (seconds * self.size.pace)) / WRITERS
                group.create_task(self.write(name, number // WRITERS, rate, over))
        # On failure the checker says what is missing.
        with contextlib.suppress(AssertionError):
            description = f"all events of {name}"
            await wait_until(self.is_caught_up, description=description, timeout=CATCH_UP_SECONDS, interval=0.1)
        self.processes.check()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    async def wait_for_subscribers(self, names: Sequence[str]) -> None:
        """Wait until every process has begun, so that the first fault does not measure how long that takes."""

        async def have_begun() -> bool:
            lines = [line for file in self.processes.alive for line in self._read_lines(file)]
            ready = sum(line.startswith('["ready"') for line in lines)
            async with self.db.read() as snapshot:
                made = await snapshot.scalar(select(func.count(subscription_consumers.c.subscription_id.distinct())))
            return ready == len(EPHEMERAL) and made == len(names)

        await wait_until(have_begun, description="every subscriber", timeout=90, interval=0.1)

    def _read_lines(self, file: str) -> list[str]:
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []

    async def is_caught_up(self) -> bool:
        """Return whether every durable subscription has handled all events."""
        try:
            async with self.db.read() as snapshot:
                if await snapshot.scalar(select(func.count()).select_from(events).where(events.c.seq.is_(None))):
                    return False
                if await snapshot.scalar(
                    select(func.count()).select_from(delayed_subjects).where(delayed_subjects.c.through.is_(None))
                ):
                    return False
                head = await snapshot.scalar(select(func.max(relay_state.c.numbered)))
                least = await snapshot.scalar(select(func.min(subscription_partitions.c.position)))
        except OctoError:
            return False
        return least is not None and least >= head

    async def finish(self, description: Run, groups: Sequence[str]) -> Path:
        """Write the last events, wait until live subscribers have heard of each channel, and describe the run."""
        await self.run_fault("nothing, at the end", 200, 1, let_time_pass)
        for name in groups:
            self.processes.signal(name, signal.SIGCONT)
        async with self.db.read() as snapshot:
            last = [
                await snapshot.scalar(select(func.max(events.c.seq)).where(events.c.event_type == kind))
                for kind in TYPES
            ]

        def all_heard() -> bool:
            heard = [line for file in self.processes.alive for line in self._read_lines(file)[-2000:]]
            return all(
                any(line.startswith(f'["event", "{name}", {seq},') for line in heard)
                for name in description.ephemeral
                for seq in last
            )

        with contextlib.suppress(AssertionError):
            await wait_until(all_heard, description="the last events heard live", timeout=30, interval=0.2)
        self.processes.check()
        file = self.folder / "run.json"
        file.write_text(json.dumps({**asdict(description), "alive": self.processes.alive}))
        return file


async def let_time_pass(stage: Stage) -> None:
    """Nothing happens."""
    await stage.pause(1)


@contextlib.asynccontextmanager
async def open_stage(folder: Path, database: str, size: Size, seed: int, **more: Any) -> AsyncGenerator[Stage]:
    """Start Redis, open the database, and kill every process at the end."""
    folder.mkdir(exist_ok=True)
    redis = RedisProcess(folder / "redis", *REDIS_OPTIONS)
    await asyncio.to_thread(redis.start)
    # Inherited: a process that has no handler yet must not end by the signal that sets its clock.
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    processes = Processes(database, redis.url, folder, seed)
    clock = SteppingClock(0.0)
    try:
        async with open_database(database, clock=clock) as db:
            yield Stage(db, clock, redis, processes, size, random.Random(seed), folder, **more)
    finally:
        processes.close()
        redis.kill()
        signal.signal(signal.SIGUSR1, before)
