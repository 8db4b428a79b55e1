"""DBOS with the same three-step workflow on the same PostgreSQL, in a process of its own.

Without our HTTP hop a step is a function; with it, each step calls a plain HTTP service in another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import uvicorn
from dbos import DBOS
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tasks.parts import STEPS

HERE = Path(__file__).parents[1]


async def _echo(request: Request) -> Response:
    return JSONResponse({"output": (await request.json())["goal"]})


def serve(port: int) -> None:
    """Serve what a step calls."""
    app = Starlette(routes=[Route("/execute", _echo, methods=["POST"])])
    uvicorn.run(app, port=port, log_config=None, access_log=False)


async def work(database_url: str, port: int) -> None:
    """Run workflows by order of the standard input: how many, and whether their steps call over HTTP."""
    DBOS(config={"name": "bench", "system_database_url": database_url, "log_level": "ERROR"})
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=16))

    @DBOS.step()
    async def plain(number: int, before: str) -> str:
        return f"{before} work {number}"

    @DBOS.step()
    async def called(number: int, before: str) -> str:
        answer = await client.post("/execute", json={"goal": f"{before} work {number}"})
        return str(answer.json()["output"])

    @DBOS.workflow()
    async def workflow(over_http: bool) -> str:
        text = ""
        for number in range(STEPS):
            text = await (called if over_http else plain)(number, text)
        return text

    DBOS.launch()
    loop = asyncio.get_running_loop()
    print("up", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        left = order["workflows"]
        cpu, began = time.process_time(), time.perf_counter()

        async def run() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                handle = await DBOS.start_workflow_async(workflow, order["over_http"])  # noqa: B023
                await handle.get_result()

        await asyncio.gather(*(run() for _ in range(order["in_flight"])))
        took = time.perf_counter() - began
        used = (time.process_time() - cpu) / order["workflows"] * 1000
        print(json.dumps({"rate": order["workflows"] / took, "cpu": used}), flush=True)


class Dbos:
    """The running process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def flow(self, workflows: int, in_flight: int, *, over_http: bool) -> tuple[float, float]:
        """Run workflows; return how many a second, and the CPU ms of its process for each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"workflows": workflows, "in_flight": in_flight, "over_http": over_http}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(300):
            found = json.loads(await self._process.stdout.readline())
        return found["rate"], found["cpu"]


@contextlib.asynccontextmanager
async def dbos(folder: Path, database_url: str, port: int) -> AsyncGenerator[Dbos]:
    """Run DBOS, and what its steps call."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent / 'tests' / 'support'}"}
    with (folder / "dbos.log").open("wb") as log:
        echo = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tasks.peers", "serve", str(port), env=environment, stdout=log, stderr=log
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tasks.peers", "work", database_url, str(port)),
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(120):
            while (line := await process.stdout.readline()).strip() != b"up":
                assert line, (folder / "dbos.log").read_text()[-3000:]
        yield Dbos(process)
    finally:
        for each in (process, echo):
            if each.returncode is None:
                each.kill()
                await each.wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        asyncio.run(work(sys.argv[2], int(sys.argv[3])))
