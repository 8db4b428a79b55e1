"""`octollm up` as a process of its own, which a test may kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
from ports import free_shift


class UpProcess:
    """One installation; started again it goes on with the same home and ports."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.shift = free_shift()
        self.url = f"http://127.0.0.1:{8000 + self.shift}"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
        self.environment = {
            **plain,
            "OCTOLLM_HOME": str(home),
            "OCTOLLM_PORT_OFFSET": str(self.shift),
            "NO_COLOR": "1",
            **environment,
        }
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "octollm",
            "up",
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60), httpx.AsyncClient() as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(self.url + "/ready")).status_code == 200:
                        return
                if self._process.returncode is not None:
                    output = await self._process.stdout.read() if self._process.stdout else b""
                    raise AssertionError(f"octollm up ended: {output.decode()}")
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """End it as by kill -9."""
        self.process.kill()
        await self.process.wait()

    async def interrupt(self) -> float:
        """Send Ctrl-C and return the seconds until it ended."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            await self.process.wait()
        return loop.time() - begin
