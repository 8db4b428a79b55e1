"""Peers that do the same job: bare Redis Pub/Sub, Redis Streams with a group, and JetStream synced at each write."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import redis.asyncio as redis_py
from nats.js.api import ConsumerConfig

PAYLOAD = {
    "event_type": "task.progress",
    "source": "bench",
    "data": {"task_id": "task-1", "progress": 1},
    "pad": "x" * 200,
}


async def redis_pubsub(url: str, count: int, pause: float) -> tuple[list[float], float]:
    """Return the latencies of single publishes, and events/s of publishes in tens. Nothing is stored."""
    client = redis_py.Redis.from_url(url)
    channel = f"bench-{uuid.uuid4().hex}"
    found: list[float] = []
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        await pubsub.get_message(timeout=5)

        async def listen(until: int) -> None:
            while len(found) < until:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
                if message is not None:
                    found.append(time.perf_counter() - json.loads(message["data"])["at"])

        listener = asyncio.create_task(listen(count))
        for _ in range(count):
            await client.publish(channel, json.dumps(PAYLOAD | {"at": time.perf_counter()}))
            await asyncio.sleep(pause)
        await listener
        latencies, found[:] = list(found), []
        total = count * 10
        listener = asyncio.create_task(listen(total))
        began = time.perf_counter()
        for _ in range(total // 10):
            pipe = client.pipeline(transaction=False)
            for _ in range(10):
                pipe.publish(channel, json.dumps(PAYLOAD | {"at": time.perf_counter()}))
            await pipe.execute()
        await listener
        rate = total / (time.perf_counter() - began)
    await client.aclose()
    return latencies, rate


async def redis_streams(url: str, count: int, pause: float) -> tuple[list[float], float]:
    """Return the same of a stream with a group and acknowledgements. Redis is not asked to sync its writes."""
    client = redis_py.Redis.from_url(url)
    stream = f"bench-{uuid.uuid4().hex}"
    await client.xgroup_create(stream, "g", mkstream=True)
    found: list[float] = []

    async def listen(until: int) -> None:
        while len(found) < until:
            reply: Any = await client.xreadgroup("g", "c", {stream: ">"}, count=100, block=1000)
            for _name, entries in reply:
                for _entry, fields in entries:
                    found.append(time.perf_counter() - json.loads(fields[b"e"])["at"])
                await client.xack(stream, "g", *(entry for entry, _fields in entries))

    listener = asyncio.create_task(listen(count))
    for _ in range(count):
        await client.xadd(stream, {"e": json.dumps(PAYLOAD | {"at": time.perf_counter()})})
        await asyncio.sleep(pause)
    await listener
    latencies, found[:] = list(found), []
    total = count * 10
    listener = asyncio.create_task(listen(total))
    began = time.perf_counter()
    for _ in range(total // 10):
        pipe = client.pipeline(transaction=False)
        for _ in range(10):
            pipe.xadd(stream, {"e": json.dumps(PAYLOAD | {"at": time.perf_counter()})})
        await pipe.execute()
    await listener
    rate = total / (time.perf_counter() - began)
    await client.delete(stream)
    await client.aclose()
    return latencies, rate


def nats_syncs() -> bool:
    """Return whether the server can sync each write: from version 2.10 on."""
    binary = shutil.which("nats-server")
    if binary is None:
        raise FileNotFoundError("nats-server is not installed")
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = text.rsplit("v", 1)[1].split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


@contextlib.contextmanager
def nats_server(folder: Path) -> Generator[str]:
    """Run a private NATS server, whose streams sync each write to the disk where the server has that setting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "nats.conf"
    sync = ", sync_interval: always" if nats_syncs() else ""
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}/js"{sync} }}\n')
    process = subprocess.Popen(["nats-server", "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


async def jetstream(count: int, pause: float) -> tuple[list[float], float, float]:
    """Return latencies from the publish's acknowledgement on, events/s of ten at a time, and the catch-up rate."""
    with tempfile.TemporaryDirectory() as folder, nats_server(Path(folder)) as url:
        client = await nats.connect(url)
        js = client.jetstream()
        await js.add_stream(name="bench", subjects=["bench.>"])
        found: list[float] = []
        stored: dict[int, float] = {}

        async def listen(name: str, until: int) -> None:
            subscription = await js.pull_subscribe("bench.>", durable=name, config=ConsumerConfig(max_ack_pending=1000))
            while len(found) < until:
                with contextlib.suppress(nats.errors.TimeoutError):
                    for message in await subscription.fetch(100, timeout=1):
                        number = json.loads(message.data)["at"]
                        found.append(max(0.0, time.perf_counter() - stored.get(number, time.perf_counter())))
                        await message.ack()

        async def publish(number: int) -> None:
            await js.publish(f"bench.{number % 200}", json.dumps(PAYLOAD | {"at": number}).encode())
            stored[number] = time.perf_counter()

        listener = asyncio.create_task(listen("one", count))
        for number in range(count):
            await publish(number)
            await asyncio.sleep(pause)
        await asyncio.wait_for(listener, 60)
        latencies, found[:] = list(found), []
        total = count * 10
        listener = asyncio.create_task(listen("one", total))
        began = time.perf_counter()
        for first in range(0, total, 50):
            await asyncio.gather(*(publish(number) for number in range(first, first + 50)))
        await asyncio.wait_for(listener, 120)
        rate = total / (time.perf_counter() - began)
        found.clear()
        began = time.perf_counter()
        await asyncio.wait_for(listen("two", total + count), 120)
        caught_up = (total + count) / (time.perf_counter() - began)
        await client.close()
    return latencies, rate, caught_up
