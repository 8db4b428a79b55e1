"""Every service in a process of its own, one or several of each, which a test may kill, stop and start again.

PostgreSQL and Redis may be the test's own as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gateway_client import wait_for_task
from ports import free_shift
from postgres_process import PostgresProcess
from redis_process import RedisProcess
from scripts import NOTES, SALES

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.rpc.tls import client_context
from octollm.storage.migrations import migrate_all
from octollm.testing import wait_until
from octollm.testing.fake_model import ModelScript, scripted_model

GOALS: list[tuple[str, dict[str, str]]] = [
    ("Write a Python function double(number) with tests", {}),
    ("How many rows have amount > 100, and their total?", {"sales.csv": SALES}),
    ("How often does it retry?", {"notes.md": NOTES}),
]
REPLICA_SHIFT = 300
"""Between the ports of two replicas."""


def scheme_of(environment: Mapping[str, str]) -> str:
    return "https" if "OCTOLLM_TLS_CERT" in environment else "http"


def trusted_context(environment: Mapping[str, str]) -> ssl.SSLContext | bool:
    """Return what a client of these processes believes and shows."""
    if scheme_of(environment) == "http":
        return True
    files = (Path(environment[f"OCTOLLM_TLS_{name}"]) for name in ("CA", "CERT", "KEY"))
    return client_context(*files)


class ServiceProcess:
    """One process of a service; started again it has the same address."""

    def __init__(
        self, name: str, port: int, environment: Mapping[str, str], log: Path, *, address: str = "127.0.0.1"
    ) -> None:
        self.name = name
        self.port = port
        self.address = address
        self.environment = {**environment, "OCTOLLM_PORT": str(port), "OCTOLLM_HOST": address}
        self.scheme = scheme_of(environment)
        self.log = log
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}:{self.port}"

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from octollm.cli import main; main()",
                "serve",
                self.name,
                env=self.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ready(self) -> None:
        """Wait until it says that it is ready."""

        async def answers() -> bool:
            assert self.process is not None
            assert self.process.returncode is None, self.log.read_text()[-2000:]
            async with httpx.AsyncClient(timeout=10, verify=trusted_context(self.environment)) as client:
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(f"{self.url}/ready")).status_code == 200
            return False

        await wait_until(answers, description=f"{self.name} on {self.port} is ready", timeout=120, interval=0.1)

    async def kill(self) -> None:
        """End it, and all that it started, as by kill -9."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None or process.returncode is not None:
            return 0
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        try:
            async with asyncio.timeout(40):
                return await process.wait()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


class ProcessInstallation:
    """An installation of processes on loopback that share a home's keys."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, replicas: int = 1) -> None:
        self.home = folder / "home"
        shift = free_shift()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
        ports = {
            name: [info.port + shift + REPLICA_SHIFT * number for number in range(replicas)]
            for name, info in SERVICES.items()
        }
        urls = {
            f"OCTOLLM_{name.upper()}_URL": ",".join(
                f"{scheme_of(environment)}://127.0.0.1:{port}" for port in ports[name]
            )
            for name in SERVICES
        }
        self.environment = {
            **kept,
            "OCTOLLM_HOME": str(self.home),
            "OCTOLLM_PORT_OFFSET": str(shift),
            "OCTOLLM_SHUTDOWN_GRACE": "2",
            "NO_COLOR": "1",
            **urls,
            **environment,
        }
        folder.mkdir(exist_ok=True)
        self.replicas = {
            name: [
                ServiceProcess(name, port, self.environment, folder / f"{name}-{number}.log")
                for number, port in enumerate(ports[name])
            ]
            for name in SERVICES
        }

    def all(self) -> list[ServiceProcess]:
        return [replica for replicas in self.replicas.values() for replica in replicas]

    @property
    def gateways(self) -> list[str]:
        return [replica.url for replica in self.replicas["reflex"]]

    @property
    def key(self) -> str:
        """Return the first user's API key."""
        return (self.home / "keys" / "local.key").read_text().strip()

    def client(self, gateway: int = 0) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.gateways[gateway],
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=30,
            verify=trusted_context(self.environment),
        )

    async def start(self) -> None:
        for replica in self.all():
            await replica.start()
        await asyncio.gather(*(replica.ready() for replica in self.all()))

    def logs(self) -> str:
        """Return the end of every log, for a failure's message."""
        return "\n".join(f"== {replica.log.name}\n{replica.log.read_text()[-1500:]}" for replica in self.all())


@contextlib.asynccontextmanager
async def start_processes(
    folder: Path, environment: Mapping[str, str], *, replicas: int = 1
) -> AsyncGenerator[ProcessInstallation]:
    """Start every process, and kill what is left of them at the end."""
    installation = ProcessInstallation(folder, environment, replicas=replicas)
    try:
        await installation.start()
        yield installation
    finally:
        await asyncio.gather(*(replica.kill() for replica in installation.all()))


@dataclass(frozen=True)
class PrivateServers:
    """Two servers that a test may kill and start again, and the settings that name them and a scripted model."""

    postgres: PostgresProcess
    redis: RedisProcess
    environment: dict[str, str]


@contextlib.asynccontextmanager
async def private_servers(folder: Path, script: ModelScript) -> AsyncGenerator[PrivateServers]:
    """Start both servers and the model, and end them at the end."""
    postgres = PostgresProcess()
    redis = RedisProcess(folder)
    try:
        postgres.start()
        redis.start()
        await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": postgres.url}, ()), SystemClock())
        async with scripted_model(script) as model:
            environment = {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_REDIS_URL": redis.url,
                "OCTOLLM_DATABASE_URL": postgres.url,
            }
            yield PrivateServers(postgres, redis, environment)
    finally:
        redis.kill()
        postgres.close()


async def complete_goal(
    installation: ProcessInstallation, goal: str, files: dict[str, str], gateway: int = 0
) -> dict[str, Any]:
    """Give a goal to a gateway that stays, and return its task once it has ended."""
    listed = [{"name": name, "text": text} for name, text in files.items()]
    async with installation.client(gateway) as client:
        body = {"goal": goal, "context": {"files": listed}}
        submitted = await client.post("/tasks", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        assert submitted.status_code == 201, submitted.text
        return await wait_for_task(client, submitted.json()["task_id"], seconds=90)
