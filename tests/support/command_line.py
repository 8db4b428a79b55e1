"""Running the command as its users do: a process of its own, with a home, ports and a folder of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from ports import free_shift

from octollm.contracts.services import SERVICES
from octollm.installation.home import find_running
from octollm.testing import wait_until

GOAL = "Write a Python function double(number) with tests"


@dataclass
class CompletedCommand:
    """How a process ended."""

    code: int
    out: str
    err: str


@dataclass
class CommandLine:
    """Where commands run. ``settings`` are further environment variables.

    With ``installation`` they use the home and the ports of that place, beside a working folder of their own.
    """

    root: Path
    settings: dict[str, str] = field(default_factory=dict)
    installation: CommandLine | None = None

    def __post_init__(self) -> None:
        self.shift = free_shift() if self.installation is None else self.installation.shift
        self.work = self.root / "work"
        for folder in (self.work, self.root / "tmp"):
            folder.mkdir()

    @property
    def home(self) -> Path:
        return self.root / "home" if self.installation is None else self.installation.home

    @property
    def gateway_url(self) -> str:
        scheme = "https" if "OCTOLLM_TLS_CERT" in self.settings else "http"
        return f"{scheme}://127.0.0.1:{8000 + self.shift}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """Return what a client of the gateway believes."""
        authority = self.settings.get("OCTOLLM_TLS_CA")
        return ssl.create_default_context(cafile=authority) if authority else True

    @property
    def left_behind(self) -> list[str]:
        """Return what is in the folder for temporary files."""
        return [path.name for path in (self.root / "tmp").iterdir()]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
        return {
            **kept,
            "OCTOLLM_HOME": str(self.home),
            "OCTOLLM_PORT_OFFSET": str(self.shift),
            "TMPDIR": str(self.root / "tmp"),
            "NO_COLOR": "1",
            **self.settings,
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", "from octollm.cli import main; main()", *arguments]

    async def start(self, *arguments: str, stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command(*arguments),
            cwd=self.work,
            env=self.environment(),
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def run(self, *arguments: str, seconds: float = 60, stdin: str | None = None) -> CompletedCommand:
        if stdin is None:
            return await self.end(await self.start(*arguments), seconds)
        process = await self.start(*arguments, stdin=asyncio.subprocess.PIPE)
        return await self.end(process, seconds, stdin.encode())

    async def end(
        self, process: asyncio.subprocess.Process, seconds: float = 60, stdin: bytes | None = None
    ) -> CompletedCommand:
        """Wait for the end; a process that does not end is killed and fails the test."""
        try:
            async with asyncio.timeout(seconds):
                out, err = await process.communicate(stdin)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        return CompletedCommand(process.returncode, out.decode(), err.decode())

    async def interrupt(self, process: asyncio.subprocess.Process, number: int = signal.SIGINT) -> CompletedCommand:
        process.send_signal(number)
        return await self.end(process, 20)

    async def up(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start `octollm up` and wait until the gateway says that all is ready."""
        process = await self.start("up", *arguments)

        async def ready() -> bool:
            assert process.returncode is None, (await process.communicate())[1].decode()
            running = await find_running(self.home)
            if running is None or running.pid != process.pid:
                return False
            async with httpx.AsyncClient(verify=self.verify) as client:
                try:
                    return (await client.get(f"{self.gateway_url}/ready")).status_code == 200
                except httpx.TransportError:
                    return False

        await wait_until(ready, description="the gateway is ready", timeout=60, interval=0.05)
        return process

    def ports_are_free(self) -> bool:
        """Say whether every port may be bound again."""
        for info in SERVICES.values():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", info.port + self.shift))
                except OSError:
                    return False
        return True

    def processes_left(self, pid: int) -> list[str]:
        """Return the processes of the session that a command began."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # Field 6 is the session (proc(5)); a zombie is over.
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(status.parent.name)
        return found
