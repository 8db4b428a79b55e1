"""A headless Chromium, driven by the DevTools protocol over a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from websockets.asyncio.client import ClientConnection, connect

from octollm.testing import wait_until

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)


def chromium() -> str:
    """Return the browser; without one the test is skipped, in CI it fails."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found is not None:
            return found
    if os.environ.get("CI"):
        pytest.fail("Chromium is needed and not installed.")
    pytest.skip("Chromium is not installed.")


class Tab:
    """One page. What it logs as an error, a blocked script for example, is kept in ``errors``."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []

    async def read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                self._waiting.pop(message["id"]).set_result(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])

    async def do(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(20):
            answer = await self._waiting[number]
        assert "error" not in answer, answer
        return answer["result"]

    async def run(self, script: str) -> Any:
        answer = await self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str, description: str, timeout: float = 15.0) -> None:
        await wait_until(lambda: self.run(f"Boolean({script})"), description=description, timeout=timeout)

    async def size(self, width: int, height: int, *, dark: bool = False, mobile: bool = False) -> None:
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.do("Emulation.setEmulatedMedia", features=[scheme])

    async def shot(self, path: Path) -> None:
        answer = await self.do("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def running_chromium(folder: Path) -> Iterator[str]:
    """Run a browser with a profile of its own; yield the address of its DevTools (``ws://…``)."""
    process = subprocess.Popen(
        [chromium(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        file = folder / "DevToolsActivePort"

        async def is_up() -> bool:
            return file.exists() and len(file.read_text().split()) == 2

        with start_blocking_portal() as portal:
            portal.call(partial(wait_until, is_up, description="Chromium is up", timeout=30))
        port, path = file.read_text().split()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        process.terminate()
        process.wait()


@contextlib.asynccontextmanager
async def open_tab(devtools: str) -> AsyncIterator[Tab]:
    """Open a tab that shares no cookie and no cache with another one."""
    host = devtools.partition("/devtools/")[0]
    async with connect(devtools, proxy=None, max_size=None, compression=None) as root:
        context = await _ask(root, "Target.createBrowserContext", {"disposeOnDetach": True})
        target = await _ask(root, "Target.createTarget", {"url": "about:blank", **context})
        page = f"{host}/devtools/page/{target['targetId']}"
        async with connect(page, proxy=None, max_size=None, compression=None) as socket:
            tab = Tab(socket)
            reading = asyncio.create_task(tab.read())
            for domain in ("Page", "Runtime", "Log"):
                await tab.do(f"{domain}.enable")
            yield tab
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """Open a browser with a profile of its own and yield its first tab."""
    running = running_chromium(folder)
    devtools = await asyncio.to_thread(running.__enter__)
    try:
        async with open_tab(devtools) as tab:
            yield tab
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


async def _ask(socket: ClientConnection, method: str, parameters: dict[str, object]) -> dict[str, Any]:
    await socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        message = json.loads(await socket.recv())
        if message.get("id") == 1:
            return message["result"]
