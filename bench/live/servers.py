"""The two servers: the gateway with an orchestrator behind it, and a bare ``websockets`` server that only sends."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop
from gateway_kit import start_gateway
from reconnect_kit import UNLIMITED
from websockets.asyncio.server import ServerConnection, broadcast, serve

Emit = Callable[[int], Awaitable[None]]


def pin(core: int) -> None:
    """Keep this process on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def serve_on_core(run: Callable[[Connection], None], pipe: Connection, core: int) -> None:
    """Run a server in this process, on a core of its own."""
    pin(core)
    run(pipe)


def _usage() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"cpu": used.ru_utime + used.ru_stime, "bytes": pages * os.sysconf("SC_PAGE_SIZE")}


async def _obey(pipe: Connection, emit: Emit) -> None:
    """Do what the driver says: send so many events at such a rate (0: as fast as they go), or tell the usage."""
    loop = asyncio.get_running_loop()
    number = 0
    while True:
        command, *arguments = await loop.run_in_executor(None, pipe.recv)
        if command == "usage":
            pipe.send(_usage())
        elif command == "emit":
            count, rate = arguments
            began = time.perf_counter()
            for turn in range(count):
                if rate and (wait := began + turn / rate - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                number += 1
                await emit(number)
                await asyncio.sleep(0)
            pipe.send("done")
        else:
            return


def run_gateway(pipe: Connection) -> None:
    """Serve the gateway. An event is one of the task, as the orchestrator publishes it over Redis."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with start_gateway(Path(folder), **UNLIMITED) as gateway:
                await gateway.script.emit("task.accepted", goal="a goal", progress=0)
                await gateway.script.emit("step.started", step="s1", title="S", arm="coder", attempt=1, run=1)
                pipe.send(gateway.port)

                async def emit(_number: int) -> None:
                    await gateway.script.emit("task.progress", progress=1, at=time.perf_counter())

                await _obey(pipe, emit)

    uvloop.run(run())


def run_bare(pipe: Connection) -> None:
    """Serve sockets that get each event by :func:`websockets.asyncio.server.broadcast`, and do nothing else."""
    sockets: set[ServerConnection] = set()

    async def handle(socket: ServerConnection) -> None:
        sockets.add(socket)
        try:
            await socket.wait_closed()
        finally:
            sockets.discard(socket)

    async def run() -> None:
        async with serve(handle, "127.0.0.1", 0, compression=None) as server:
            pipe.send(next(iter(server.sockets)).getsockname()[1])

            async def emit(number: int) -> None:
                data = {"event_type": "task.progress", "progress": 1, "at": time.perf_counter()}
                frame = {
                    "task_id": "t",
                    "type": "progress",
                    "seq": number,
                    "timestamp": "",
                    "progress": 1,
                    "data": data,
                }
                broadcast(sockets, json.dumps(frame))

            await _obey(pipe, emit)

    uvloop.run(run())
