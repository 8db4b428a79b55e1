"""Small models, a wheel index in a folder and a local HTTP server, for the tests of this layer."""

from __future__ import annotations

import asyncio
import hashlib
import zipfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from octollm.llm.catalogue import HubSource, ModelEntry, WheelSource
from octollm.testing import wait_until

CONTENT = bytes(range(256)) * 4096 + b"the end"


def small_entry(name: str = "small", content: bytes = CONTENT, parts: int = 3) -> ModelEntry:
    """A catalogue entry for ``content``."""
    return ModelEntry(
        name=name,
        title=name,
        digest=hashlib.sha256(content).hexdigest(),
        size=len(content),
        licence="Apache-2.0",
        hub=HubSource("Maker/Small-GGUF", f"{name}.gguf"),
        wheels=WheelSource(f"{name}-model-part", parts, "1.0.0"),
    )


def pieces(content: bytes, parts: int) -> list[bytes]:
    """``content`` cut into ``parts`` pieces, the last the shortest."""
    length = -(-len(content) // parts)
    return [content[i * length : (i + 1) * length] for i in range(parts)]


def build_wheels(folder: Path, entry: ModelEntry, content: bytes = CONTENT) -> list[Path]:
    """Write the wheels that carry ``content``; importing one would be seen, since it raises."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels: list[Path] = []
    for number, data in enumerate(pieces(content, entry.wheels.parts), start=1):
        package = entry.wheels.package(number).replace("-", "_")
        wheel = folder / f"{package}-{entry.wheels.version}-py3-none-any.whl"
        info = f"{package}-{entry.wheels.version}.dist-info"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{package}/__init__.py", "raise RuntimeError('imported')\n")
            archive.writestr(f"{package}/data/{entry.wheels.file(number)}", data)
            archive.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {entry.wheels.package(number)}\nVersion: {entry.wheels.version}\n",
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        wheels.append(wheel)
    return wheels


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncGenerator[str]:
    """Serve ``app`` on a free loopback port; gives its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await wait_until(lambda: server.started or task.done(), description="the server listens")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
