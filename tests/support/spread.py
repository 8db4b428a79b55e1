"""Every service in a process of its own, one or several of each, which a test may kill, stop and start again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import httpx
from ports import free_shift

from octollm.contracts.services import SERVICES
from octollm.rpc.tls import client_context
from octollm.testing import wait_until

REPLICA_SHIFT = 300
"""Between the ports of two replicas."""


def scheme_of(environment: Mapping[str, str]) -> str:
    return "https" if "OCTOLLM_TLS_CERT" in environment else "http"


def trusting(environment: Mapping[str, str]) -> ssl.SSLContext | bool:
    """Return what a client of these processes believes and shows."""
    if scheme_of(environment) == "http":
        return True
    files = (Path(environment[f"OCTOLLM_TLS_{name}"]) for name in ("CA", "CERT", "KEY"))
    return client_context(*files)


class Replica:
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
            async with httpx.AsyncClient(timeout=10, verify=trusting(self.environment)) as client:
                with contextlib.suppress(httpx.HTTPError):
                    return (await client.get(f"{self.url}/ready")).status_code == 200
            return False

        await wait_until(answers, description=f"{self.name} on {self.port} is ready", timeout=60, interval=0.1)

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


class Spread:
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
                Replica(name, port, self.environment, folder / f"{name}-{number}.log")
                for number, port in enumerate(ports[name])
            ]
            for name in SERVICES
        }

    def all(self) -> list[Replica]:
        return [replica for replicas in self.replicas.values() for replica in replicas]

    @property
    def doors(self) -> list[str]:
        return [replica.url for replica in self.replicas["reflex"]]

    @property
    def key(self) -> str:
        """Return the first user's API key."""
        return (self.home / "keys" / "local.key").read_text().strip()

    def client(self, door: int = 0) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.doors[door],
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=30,
            verify=trusting(self.environment),
        )

    async def start(self) -> None:
        for replica in self.all():
            await replica.start()
        await asyncio.gather(*(replica.ready() for replica in self.all()))

    def logs(self) -> str:
        """Return the end of every log, for a failure's message."""
        return "\n".join(f"== {replica.log.name}\n{replica.log.read_text()[-1500:]}" for replica in self.all())


@contextlib.asynccontextmanager
async def spread_out(folder: Path, environment: Mapping[str, str], *, replicas: int = 1) -> AsyncGenerator[Spread]:
    """Start every process, and kill what is left of them at the end."""
    spread = Spread(folder, environment, replicas=replicas)
    try:
        await spread.start()
        yield spread
    finally:
        await asyncio.gather(*(replica.kill() for replica in spread.all()))
