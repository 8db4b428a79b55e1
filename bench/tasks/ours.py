"""Installations to measure, each in processes of its own, and what a client of one does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
from gateway_client import FINAL_STATUSES
from process_installation import ProcessInstallation, ServiceProcess
from redis_process import RedisProcess

from octollm.client import connect
from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import HttpClient
from octollm.storage.migrations import migrate_all
from octollm.testing import wait_until
from tasks.parts import ECHO

HERE = Path(__file__).parents[1]
ENVIRONMENT = {
    "OCTOLLM_MODEL": "openai:none",
    "OCTOLLM_MODEL_URL": "http://127.0.0.1:9/v1",
    "OCTOLLM_EMBEDDING_MODEL": "off",
    "OCTOLLM_RATE_LIMIT": "1000000/second",
    "OCTOLLM_LOG_LEVEL": "warning",
    "PYTHONPATH": f"{HERE}:{HERE.parent / 'tests' / 'support'}",
}
END_SECONDS = 300.0
_ENDED = f"SELECT count(*) FROM tasks WHERE status IN {FINAL_STATUSES!r}"


@dataclass
class System:
    """A running installation. ``count_ended`` reads the database, so that no service is asked meanwhile."""

    url: str
    key: str
    http: HttpClient
    count_ended: Callable[[], Awaitable[int]]
    pids: list[int] = field(default_factory=list)

    async def submit(self, *, planned: bool) -> str:
        body: dict[str, object] = {"goal": "echo this"}
        if not planned:
            body["assigned_arm"] = ECHO
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        answer = await self.http.send("POST", f"{self.url}/tasks", headers, msgspec.json.encode(body), seconds=60)
        assert answer.status == 201, answer.body
        return str(msgspec.json.decode(answer.body)["task_id"])

    async def read(self, path: str) -> dict[str, Any]:
        answer = await self.http.send(
            "GET", f"{self.url}{path}", {"authorization": f"Bearer {self.key}"}, None, seconds=60
        )
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body)

    def cpu_seconds(self) -> float:
        """Return the CPU time of its processes so far."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Flow:
    """Tasks run to their end: per second, the times of POST /tasks in ms, and CPU ms of the services for a task."""

    rate: float
    p50: float
    p99: float
    cpu: float


async def flow(system: System, tasks: int, in_flight: int, *, planned: bool) -> Flow:
    """Submit ``tasks`` with ``in_flight`` requests at a time, and wait until all have ended."""
    before, cpu = await system.count_ended(), system.cpu_seconds()
    times: list[float] = []
    left = tasks
    began = time.perf_counter()

    async def submit() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            at = time.perf_counter()
            await system.submit(planned=planned)
            times.append((time.perf_counter() - at) * 1000)

    await asyncio.gather(*(submit() for _ in range(in_flight)))
    async with asyncio.timeout(END_SECONDS):
        while await system.count_ended() - before < tasks:
            await asyncio.sleep(0.01)
    took = time.perf_counter() - began
    times.sort()
    cpu = (system.cpu_seconds() - cpu) / tasks * 1000
    return Flow(tasks / took, times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))], cpu)


async def first_step(system: System) -> float:
    """Submit one task, and return the ms from the request to the start of its step, by the clock that all share."""
    began = time.time()
    task_id = await system.submit(planned=False)
    async with asyncio.timeout(END_SECONDS):
        while True:
            (step, *_) = msgspec.convert((await system.read(f"/tasks/{task_id}"))["steps"], list[_Step]) or [_Step()]
            if step.started_at is not None and step.finished_at is not None:
                return (datetime.fromisoformat(step.started_at).timestamp() - began) * 1000
            await asyncio.sleep(0.02)


class _Step(msgspec.Struct):
    started_at: str | None = None
    finished_at: str | None = None


@contextlib.asynccontextmanager
async def embedded(folder: Path, port_offset: int) -> AsyncGenerator[System]:
    """Run everything in one process, on SQLite."""
    home = folder / "home"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")},
        **ENVIRONMENT,
        "OCTOLLM_HOME": str(home),
        "OCTOLLM_PORT_OFFSET": str(port_offset),
    }
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tasks.embedded", env=environment, stdout=asyncio.subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(120):
            assert (await process.stdout.readline()).strip() == b"up", (folder / "log").read_text()[-3000:]
        (database,) = home.rglob("orchestrator*.db")
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:

            async def count_ended() -> int:
                return int(connection.execute(_ENDED).fetchone()[0])

            async with Http1Client() as http:
                key = (home / "keys" / "local.key").read_text().strip()
                yield System(f"http://127.0.0.1:{8000 + port_offset}", key, http, count_ended, [process.pid])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _BenchProcess(ServiceProcess):
    """A process of the benchmark's own parts."""

    command: tuple[str, ...] = ()

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )


async def _healthy(process: ServiceProcess) -> None:
    async def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=5) as client:
                return (await client.get(f"{process.url}/health")).status_code == 200
        return False

    await wait_until(answers, description=f"{process.name} answers", timeout=60, interval=0.1)


@contextlib.asynccontextmanager
async def apart(folder: Path, database_url: str, workers: int) -> AsyncGenerator[System]:
    """Run a process for each service that a task needs, ``workers`` of the orchestrator, on PostgreSQL and Redis."""
    folder.mkdir(exist_ok=True)
    redis = RedisProcess(folder)
    await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": database_url}, tuple(SERVICES)), SystemClock())
    processes: list[ServiceProcess] = []
    try:
        redis.start()
        environment = {
            **ENVIRONMENT,
            "OCTOLLM_MODEL": "embedded",  # it is not loaded: there is no process of models
            "OCTOLLM_REDIS_URL": redis.url,
            "OCTOLLM_DATABASE_URL": database_url,
        }
        installation = ProcessInstallation(folder / "apart", environment, replicas=workers)
        # The others wait for the orchestrator's keys, which the first of them makes.
        first, *others = installation.replicas["orchestrator"]
        await first.start()
        processes.append(first)
        await first.ready()
        planner = installation.replicas["planner"][0]
        own = _BenchProcess("planner", planner.port, planner.environment, planner.log)
        own.command = (sys.executable, "-m", "tasks.parts")
        more = [*others, own, *(installation.replicas[name][0] for name in ("monitor", "judge", "reflex"))]
        # One address for each of the services that have one process.
        for each in (*more, first):
            for name in SERVICES.keys() - {"orchestrator"}:
                variable = f"OCTOLLM_{name.upper()}_URL"
                each.environment[variable] = each.environment[variable].partition(",")[0]
        for each in more:
            await each.start()
            processes.append(each)
        # The gateway is not ready: it waits for the services that nothing here needs.
        await asyncio.gather(*(_healthy(each) if each.name == "reflex" else each.ready() for each in more))
        async with connect(installation.gateways[0], installation.key) as client:
            token = await client.admin.create_enrolment_token(ECHO, calls=(), lifetime_seconds=600)
        echo = _BenchProcess(
            ECHO,
            planner.port + 50,
            {**planner.environment, "OCTOLLM_ENROLMENT_TOKEN": token.secret},
            folder / "echo.log",
        )
        echo.command = (sys.executable, "-c", "from octollm.cli import main; main()", "serve", "tasks.parts:arm")
        await echo.start()
        processes.append(echo)
        await echo.ready()
        connection = await asyncpg.connect(database_url)
        try:
            found = await connection.fetchval(
                "SELECT schema FROM (SELECT table_schema AS schema FROM"
                " information_schema.tables WHERE table_name = 'model_journal') AS found"
            )
            statement = _ENDED.replace("FROM tasks", f'FROM "{found}".tasks')

            async def count_ended() -> int:
                return int(await connection.fetchval(statement))

            pids = [each.process.pid for each in processes if each.process is not None]
            async with Http1Client() as http:
                system = System(installation.gateways[0], installation.key, http, count_ended, pids)

                async def is_listed() -> bool:
                    return ECHO in [each["name"] for each in (await system.read("/arms"))["arms"]]

                await wait_until(is_listed, description="the arm is listed", timeout=60, interval=0.1)
                yield system
        finally:
            await connection.close()
    finally:
        for each in reversed(processes):
            await each.kill()
        redis.kill()
