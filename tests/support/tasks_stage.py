"""Where faults on tasks happen: private servers, the processes of `tasks_process.py`, and what is outside of them.

Every connection between processes goes through a relay, which may cut it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import asyncpg
import httpx
import msgspec
import tasks_outside
import tasks_process
from ports import free_port
from postgres_process import PostgresProcess
from redis_process import RedisProcess
from tasks_checker import ENDS, Run

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.storage.migrations import migrate_all
from octollm.testing import wait_until

ARMS = tuple(tasks_process.KINDS)
Groups = Mapping[str, tuple[tuple[str, ...], int]]
GROUPS: Groups = {
    "orchestrator": (("orchestrator",), 3),
    "models": (("models",), 2),
    "arms": (("planner", "judge", *ARMS), 2),
    "reflex": (("reflex",), 1),
}
"""The services of a process, and how many there are of it."""
SMALL_GROUPS: Groups = {
    "orchestrator": (("orchestrator",), 3),
    "arms": (("models", "planner", "judge", *ARMS), 2),
    "reflex": (("reflex",), 1),
}
"""The same in fewer processes, which start sooner."""
START_SECONDS = 120
TASK_SECONDS = 90.0
END_SECONDS = 240.0
SETTLE_SECONDS = 90.0
"""Longer than an orphaned reservation stays open."""


class Processes:
    """The processes of a run by name. Each is killed as by kill -9; started again, it has the same addresses."""

    def __init__(self, folder: Path, common: Mapping[str, str], outside: str, urls: Mapping[str, list[str]]) -> None:
        self._folder = folder
        self._common = dict(common)
        self._outside = outside
        self._urls = urls
        self._services: dict[str, dict[str, dict[str, str]]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._joins: dict[str, str] = {}
        self._wrong: set[str] = set()
        self.sessions: list[int] = []
        self.died: list[str] = []

    @property
    def names(self) -> list[str]:
        """The processes that may be started."""
        return list(self._services)

    def declare(self, name: str, ports: Mapping[str, int], number: int) -> None:
        """Have a process that serves on these ports; ``number`` counts those that serve the same."""
        self._services[name] = {
            service: {
                **self._common,
                "OCTOLLM_PORT": str(port),
                "OCTOLLM_ADVERTISE_URL": self._urls[service][number],
            }
            for service, port in ports.items()
        }

    def start(self, name: str, offset: float = 0.0) -> None:
        """Start a process, with a wall clock that is wrong by ``offset`` seconds."""
        if name in self._running:
            return
        self.ready_file(name).unlink(missing_ok=True)
        services = {
            service: {**settings, **self._joins_of(service)} for service, settings in self._services[name].items()
        }
        options = tasks_process.Options(services=services, outside=self._outside, offset=offset)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OCTOLLM_")}
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    tasks_process.__file__,
                    msgspec.json.encode(options).decode(),
                    str(self.ready_file(name)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, **self._common},
                start_new_session=True,
            )
        self._running[name] = process
        (self._wrong.add if offset else self._wrong.discard)(name)
        self.sessions.append(process.pid)

    def _joins_of(self, service: str) -> dict[str, str]:
        return {"OCTOLLM_ENROLMENT_TOKEN": self._joins[service]} if service in self._joins else {}

    def join(self, service: str, token: str) -> None:
        """Have an arm enrol with a token."""
        self._joins[service] = token

    def is_wrong(self, name: str) -> bool:
        """Return whether a process was started with a wrong clock."""
        return name in self._wrong

    def mostly_serve(self) -> bool:
        """Return whether more than half of the processes have started and serve."""
        return 2 * sum(self.ready_file(name).exists() for name in self._running) > len(self._services)

    def ready_file(self, name: str) -> Path:
        """Return the file that is there once the process serves."""
        return self._folder / f"{name}.ready"

    async def wait_ready(self, names: Sequence[str]) -> None:
        """Wait until these serve."""
        for name in names:
            log = self._folder / f"{name}.log"

            def there(name: str = name, log: Path = log) -> bool:
                process = self._running[name]
                assert process.poll() is None, log.read_text()[-3000:]
                return self.ready_file(name).exists()

            await wait_until(there, description=f"{name} serves", timeout=START_SECONDS, interval=0.1)

    def kill(self, name: str) -> None:
        """Kill a process, also one that is stopped."""
        process = self._running.pop(name, None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process that runs."""
        if name in self._running:
            self._running[name].send_signal(number)

    def revive(self) -> None:
        """Start again what has ended by itself, as a supervisor does, and note it."""
        for name, process in tuple(self._running.items()):
            # One with a wrong clock may give up, for nobody believes what it signs.
            if process.poll() is not None and not self.is_wrong(name):
                self.died.append(f"{name} ended by itself with {process.returncode}")
                del self._running[name]
                self.start(name)

    async def stop(self) -> list[str]:
        """Ask every process to end; return the names of those that did not in time."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        late: list[str] = []
        for name, process in tuple(self._running.items()):
            try:
                await wait_until(lambda p=process: p.poll() is not None, description=f"{name} ends", timeout=30)
            except AssertionError:
                late.append(name)
        return late

    def close(self) -> None:
        """Kill every process."""
        for name in tuple(self._running):
            self.kill(name)


@dataclass
class Stage:
    """What a run has."""

    folder: Path
    chance: random.Random
    postgres: PostgresProcess
    redis: RedisProcess
    processes: Processes
    client: httpx.AsyncClient
    outside: httpx.AsyncClient
    connection: asyncpg.Pool
    submitted: list[str] = field(default_factory=list[str])

    OUTAGES = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)

    async def control(self, **change: object) -> None:
        """Change what goes wrong outside."""
        await self.outside.post("/control", json=change)

    async def send(self, method: str, path: str, body: object = None, key: str | None = None) -> httpx.Response | None:
        """Send a request to the gateway; return ``None`` when it is away, or the answer lost."""
        headers = {} if key is None else {"Idempotency-Key": key}
        try:
            return await self.client.request(method, path, json=body, headers=headers)
        except httpx.HTTPError:
            return None

    async def submit(self, body: Mapping[str, object]) -> str:
        """Submit a task, as a client that repeats its request with one key until it is acknowledged."""
        key = uuid.uuid4().hex
        while True:
            answer = await self.send("POST", "/tasks", body, key)
            if answer is not None and answer.status_code == 201:
                self.submitted.append(answer.json()["task_id"])
                return self.submitted[-1]
            assert answer is None or answer.status_code in (401, 409, 429, 500, 502, 503, 504), answer.text
            await asyncio.sleep(0.2)

    async def open_tasks(self) -> dict[str, str]:
        """Return the status of each task that has not ended."""
        rows = await self.connection.fetch(
            "SELECT task_id, status FROM octollm_orchestrator.tasks WHERE kind = 'task' AND NOT status = ANY($1)", ENDS
        )
        return {row["task_id"]: row["status"] for row in rows}

    async def wait_until_writing(self, task_id: str) -> None:
        """Wait until the model writes for a task, or for a sub-task of it."""
        query = "SELECT task_id FROM octollm_orchestrator.tasks WHERE $1 IN (task_id, parent_task_id)"

        async def writes() -> bool:
            state = (await self.outside.get("/state")).json()
            return bool({row["task_id"] for row in await self.connection.fetch(query, task_id)} & {*state["writing"]})

        await wait_until(writes, description=f"the model writes for {task_id}", timeout=60)

    async def attend(self) -> None:
        """Approve what waits, and let go on what is paused, until cancelled: what a person does."""
        while True:
            await asyncio.sleep(0.3)
            with contextlib.suppress(*self.OUTAGES):
                for task_id, status in (await asyncio.wait_for(self.open_tasks(), 3)).items():
                    if status == "waiting":
                        await self.send("POST", f"/tasks/{task_id}/approval", {"decision": "approve"})
                    elif status == "paused":
                        await self.send("POST", f"/tasks/{task_id}/resume")

    async def settle(self) -> None:
        """Wait until every task has ended and nothing is reserved, or until that is overdue, which the checker says."""

        async def ended() -> bool:
            self.processes.revive()
            with contextlib.suppress(*self.OUTAGES):
                return not await self.open_tasks()
            return False

        async def settled() -> bool:
            query = "SELECT count(*) FROM octollm_orchestrator.reservations WHERE state = 'open'"
            with contextlib.suppress(*self.OUTAGES):
                return await self.connection.fetchval(query) == 0
            return False

        for reached, seconds in ((ended, END_SECONDS), (settled, SETTLE_SECONDS)):
            with contextlib.suppress(AssertionError):
                await wait_until(reached, description=reached.__name__, timeout=seconds, interval=0.2)

    async def finish(self, name: str) -> Path:
        """Stop every process, and describe the run for the checker."""
        late = await self.processes.stop()
        assert not late, f"{late} did not end"
        state = (await self.outside.get("/state")).json()
        run = Run(
            name,
            self.postgres.url,
            str(self.folder / "effects.jsonl"),
            self.submitted,
            [arm for arm, kind in tasks_process.KINDS.items() if kind == "at_most_once"],
            self.processes.sessions,
            state["active"],
        )
        file = self.folder / "run.json"
        file.write_text(json.dumps(asdict(run)))
        return file


@contextlib.contextmanager
def _outside(options: tasks_outside.Options):
    process = subprocess.Popen([sys.executable, tasks_outside.__file__, json.dumps(asdict(options))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def open_stage(folder: Path, seed: int, groups: Groups = GROUPS) -> AsyncGenerator[Stage]:
    """Start everything, enrol the arms, and kill what is left at the end."""
    folder.mkdir(exist_ok=True, parents=True)
    postgres, redis = PostgresProcess(), RedisProcess(folder / "redis")
    taken: set[int] = set()

    def port_of_its_own() -> int:
        # Free ones are found before any of them is bound.
        while (port := free_port()) in taken:
            pass
        taken.add(port)
        return port

    ports = {
        f"{group}-{number}": {service: port_of_its_own() for service in services}
        for group, (services, count) in groups.items()
        for number in range(1, count + 1)
    }
    relays: dict[str, int] = {}
    urls: dict[str, list[str]] = {}
    for found in ports.values():
        for service, port in found.items():
            relay = port_of_its_own()
            relays[str(relay)] = port
            urls.setdefault(service, []).append(f"http://127.0.0.1:{relay}")
    place = port_of_its_own()
    outside = f"http://127.0.0.1:{place}"
    options = tasks_outside.Options(str(folder), place, relays, seed)
    processes: Processes | None = None
    try:
        postgres.start()
        redis.start()
        await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": postgres.url}, ()), SystemClock())
        common = {
            "OCTOLLM_HOME": str(folder / "home"),
            "OCTOLLM_MODEL": "openai:chaos",
            "OCTOLLM_MODEL_URL": f"{outside}/v1",
            "OCTOLLM_REDIS_URL": redis.url,
            "OCTOLLM_DATABASE_URL": postgres.url,
            "OCTOLLM_STARTUP_TIMEOUT": str(START_SECONDS),
            "OCTOLLM_SHUTDOWN_GRACE": "2",
            # It takes what is sent to it, for nobody reads the traces here.
            "OCTOLLM_MONITOR_URL": outside,
            "OCTOLLM_RATE_LIMIT": "1000000/minute",
            "OCTOLLM_ALLOWED_HOSTS": urls["reflex"][0].removeprefix("http://"),
            **{f"OCTOLLM_{name.upper()}_URL": ",".join(found) for name, found in urls.items() if name not in ARMS},
        }
        processes = Processes(folder, common, outside, urls)
        for name, found in ports.items():
            processes.declare(name, found, int(name.rpartition("-")[2]) - 1)
        with _outside(options):
            async with _clients(folder, processes, urls, outside, postgres) as (client, control, connection):
                yield Stage(folder, random.Random(seed), postgres, redis, processes, client, control, connection)
    finally:
        if processes is not None:
            processes.close()
        redis.kill()
        postgres.close()


@contextlib.asynccontextmanager
async def _clients(
    folder: Path, processes: Processes, urls: Mapping[str, list[str]], outside: str, postgres: PostgresProcess
) -> AsyncGenerator[tuple[httpx.AsyncClient, httpx.AsyncClient, asyncpg.Pool]]:
    first = [name for name in processes.names if not name.startswith("arms")]
    for name in first:
        processes.start(name)
    await processes.wait_ready(first)
    key = (folder / "home" / "keys" / "local.key").read_text().strip()
    authorization = {"Authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=urls["reflex"][0], headers=authorization, timeout=20) as client,
        httpx.AsyncClient(base_url=outside, timeout=20) as control,
        asyncpg.create_pool(postgres.url, min_size=0, max_size=4, command_timeout=20) as connection,
    ):
        for arm in ARMS:
            answer = await client.post("/joins", json={"name": arm, "calls": list(tasks_process.CALLS)})
            assert answer.status_code == 201, answer.text
            processes.join(arm, answer.json()["secret"])
        for name in (name for name in processes.names if name not in first):
            processes.start(name)
            if name.endswith("-1"):
                # They share the key, with which the first enrols.
                await processes.wait_ready([name])
        yield client, control, connection
