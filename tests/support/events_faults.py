"""What goes wrong in a run of faults on events: each function is one fault, at the stage of `events_stage.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time

import redis.asyncio as redis_py
from events_stage import Happen, Size, Stage, let_time_pass

from octollm.testing import wait_until

FAULT_POINTS = ("acquired", "numbering", "numbered", "publishing", "published", "saved")


async def kill_redis(stage: Stage) -> None:
    """Kill Redis, and start it again, several times."""
    for _ in range(stage.size.times):
        stage.redis.kill()
        await stage.pause(0.2)
        await asyncio.to_thread(stage.redis.start)
        await stage.pause(1)


async def pause_redis(stage: Stage) -> None:
    """Redis accepts connections and answers nothing for a while."""
    stage.redis.pause()
    try:
        await asyncio.sleep(stage.size.pause)
    finally:
        stage.redis.resume()
    await stage.pause(1)


async def command_redis(stage: Stage, *command: str) -> None:
    """Give Redis a command several times."""
    async with redis_py.Redis.from_url(stage.redis.url) as client:
        for _ in range(stage.size.times):
            await client.execute_command(*command)
            await stage.pause(0.7)


async def flush_redis(stage: Stage) -> None:
    """Delete everything in Redis, several times."""
    await command_redis(stage, "FLUSHALL")


async def kill_clients(stage: Stage) -> None:
    """Close the connections of all subscribers, several times."""
    await command_redis(stage, "CLIENT", "KILL", "TYPE", "pubsub")


async def kill_publishers(stage: Stage) -> None:
    """Kill publishers at each step between a commit and the saved cursor; each kills itself there."""
    processes = stage.processes
    names = [f"publisher-{point}" for point in FAULT_POINTS]
    for name, point in zip(names, FAULT_POINTS, strict=True):
        processes.start(name, role="publisher", die_at=point)
    # Each of them gets the lease in turn, for the others that have it die.
    for name in ("publisher-a", "publisher-b"):
        processes.kill(name)
    for name in names:
        await processes.wait_for_death(name)
    for name in ("publisher-a", "publisher-b"):
        processes.start(name)


async def stall_publishers(stage: Stage) -> None:
    """Publishers stop at any step for longer than their lease, and go on in the belief to hold it."""
    names = ("publisher-a", "publisher-b")
    for name in names:
        stage.processes.restart(name, stall=True)
    await stage.pause(2 * stage.size.times)
    for name in names:
        # In the middle of whatever it does, besides the steps.
        stage.processes.signal(name, signal.SIGSTOP)
        await stage.outlast(1.5)
        stage.processes.signal(name, signal.SIGCONT)
    for name in names:
        stage.processes.restart(name, stall=False)


async def disorder_messages(stage: Stage) -> None:
    """Publish what was published again: twice, in another order, and with parts left out."""
    until = time.monotonic() + stage.size.times
    async with redis_py.Redis.from_url(stage.redis.url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe("octollm:log", "events:*")
        heard: list[tuple[str, bytes]] = []
        own: set[bytes] = set()
        while time.monotonic() < until:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.2)
            if message is None or message["data"] in own:
                continue
            heard.append((message["channel"].decode(), message["data"]))
            if len(heard) < 40:
                continue
            batch, heard = heard, heard[20:]
            stage.chance.shuffle(batch)
            for channel, data in batch[:20]:
                found = json.loads(data)
                if isinstance(found, list) and len(found) > 2:
                    stage.chance.choice([found.reverse, found.pop, lambda f=found: f.pop(1)])()
                body = json.dumps(found, separators=(",", ":")).encode()
                own |= {body, data}
                await client.publish(channel, body)
            if len(own) > 10_000:
                own.clear()


async def poison(stage: Stage) -> None:
    """Events that no handler can handle."""
    for _ in range(stage.size.times):
        stage.poison += 1
        await stage.pause(0.3)


async def kill_subscribers(stage: Stage) -> None:
    """Kill the replicas of the durable subscribers in turn: acknowledgements that were not saved are lost."""
    for number in range(stage.size.times):
        stage.processes.restart("durable-" + "ab"[number % 2])
        await stage.pause(2)


async def sleep_an_hour(stage: Stage) -> None:
    """One subscriber is away, its clock an hour on when it returns; others are suspended, and so are live ones."""
    processes = stage.processes
    processes.kill("durable-alone")
    for name in ("durable-b", "ephemeral"):
        processes.signal(name, signal.SIGSTOP)
    # Longer than the lease of its partitions, and than Redis suffers a subscriber that does not read.
    await stage.outlast(4.5)
    for name in ("durable-b", "ephemeral"):
        processes.signal(name, signal.SIGCONT)
    processes.start("durable-alone", offset=3600.0)
    await stage.pause(1)


async def set_clocks_back(stage: Stage) -> None:
    """Set every process's wall clock back by ten minutes, at different times, and restart some."""
    names = ["publisher-a", "publisher-b", "durable-a", "durable-b", "ephemeral"]
    stage.chance.shuffle(names)
    for name in names:
        stage.processes.signal(name, signal.SIGUSR1)
        stage.clock.step_back()
        await stage.pause(0.5)
    stage.processes.restart("publisher-a", offset=-7200.0)
    await stage.pause(1)


async def restart_postgres(stage: Stage) -> None:
    """Kill PostgreSQL and start it again. Processes that start meanwhile wait for it."""
    assert stage.postgres is not None
    for _ in range(max(1, stage.size.times // 3)):
        await asyncio.to_thread(stage.postgres.kill)
        for name in ("publisher-b", "durable-b"):
            stage.processes.restart(name)
        await stage.pause(0.5)
        await asyncio.to_thread(stage.postgres.start)
        await stage.pause(2)


async def fill_disk(stage: Stage) -> None:
    """Fill the disk until the database refuses to write, and free it."""
    assert stage.disk is not None
    ballast = stage.disk / "ballast"
    for _ in range(max(1, stage.size.times // 2)):
        refused = stage.refused
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        await wait_until(lambda known=refused: stage.refused > known, description="the disk is full", timeout=30)
        await stage.pause(2)
        ballast.unlink()
        await stage.pause(1)


async def kill_host(stage: Stage) -> None:
    """Kill the process that has everything, several times."""
    for _ in range(stage.size.times):
        stage.processes.restart("host")
        await stage.pause(2)


async def set_host_back(stage: Stage) -> None:
    """Set the clock of the process back, and that of the writer; then kill it, so that its leases stay behind."""
    stage.processes.signal("host", signal.SIGUSR1)
    stage.clock.step_back()
    await stage.pause(2)
    stage.processes.restart("host", offset=-3600.0)
    stage.clock.offset = -3600.0
    await stage.pause(2)


Fault = tuple[str, float, Happen]
"""A name, about how many seconds it takes, and what happens."""


def postgres_faults(size: Size) -> list[Fault]:
    """Return the faults of a run on PostgreSQL, with several processes."""
    return [
        ("nothing", 1, let_time_pass),
        ("Redis killed", 1.5 * size.times, kill_redis),
        ("Redis paused", size.pause + 1, pause_redis),
        ("Redis flushed", 0.7 * size.times, flush_redis),
        ("subscribers' connections killed", 0.7 * size.times, kill_clients),
        ("publisher killed at each step", 12, kill_publishers),
        ("two publishers with the lease", 2 * size.times + 3, stall_publishers),
        ("messages twice and out of order", size.times, disorder_messages),
        ("poison event", 0.3 * size.times, poison),
        ("durable subscribers killed", 2 * size.times, kill_subscribers),
        ("subscriber away for an hour", 6, sleep_an_hour),
        ("clocks going backwards", 4, set_clocks_back),
        ("PostgreSQL restarted", 1 * size.times, restart_postgres),
    ]


def sqlite_faults(size: Size) -> list[Fault]:
    """Return the faults of a run on SQLite, with one process and a writer."""
    return [
        ("disk full", 2 * size.times, fill_disk),
        ("process killed", 2 * size.times, kill_host),
        ("clock going backwards", 4, set_host_back),
    ]
