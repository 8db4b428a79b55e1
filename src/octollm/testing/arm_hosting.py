"""Hosting what is on the bench of an arm: in memory, or on sockets of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from tempfile import TemporaryDirectory

from octollm.arm import Arm, build_arm
from octollm.config import read_settings
from octollm.llm.select import ModelChoice
from octollm.llm.types import ChatModel
from octollm.rpc.hosting import listen, serving
from octollm.rpc.service import Service
from octollm.services.models.service import models_service
from octollm.testing.fake_model import FakeModel
from octollm.testing.harness import LOCAL, Harness
from octollm.testing.in_memory import InMemoryHttp


@contextlib.asynccontextmanager
async def together(openings: Sequence[AbstractAsyncContextManager[None]]) -> AsyncGenerator[None]:
    """Open contexts one after the other, and close them side by side: a server takes a moment to end."""
    stacks = [contextlib.AsyncExitStack() for _ in openings]
    try:
        for stack, opening in zip(stacks, openings, strict=True):
            await stack.enter_async_context(opening)
        yield
    finally:
        await asyncio.gather(*(stack.aclose() for stack in stacks))


@contextlib.asynccontextmanager
async def served_arm(house: Harness, arm: Arm) -> AsyncGenerator[Service]:
    """Yield ``arm`` as a service."""
    yield build_arm(arm, house.base(arm.name))


@contextlib.asynccontextmanager
async def fake_models(house: Harness, model: FakeModel) -> AsyncGenerator[Service]:
    """Yield the real models service over a fake model."""

    async def ready() -> ChatModel:
        return model

    with TemporaryDirectory() as home:
        settings = read_settings({"OCTOLLM_HOME": home, "OCTOLLM_MODEL": "openai:fake"}, ())
        choice = ModelChoice(model.name, None, ready)
        async with models_service(house.base("models"), settings, choose=lambda: choice) as service:
            yield service


@contextlib.asynccontextmanager
async def hosted(
    house: Harness, opening: AbstractAsyncContextManager[Service], *, lazily: bool = False
) -> AsyncGenerator[None]:
    """Host a service in memory, or on a socket where the bench has them.

    ``lazily`` also opens a socket, served once somebody connects: a client of the arm's own knows nothing of ours.
    """
    if not isinstance(house.http, InMemoryHttp):
        async with house.serve(opening):
            yield
        return
    async with opening as service, contextlib.AsyncExitStack() as stack:
        url = f"http://{service.base.name}"
        if lazily:
            bound = listen(LOCAL, 0, service.base.name)
            url = f"http://{LOCAL}:{bound.getsockname()[1]}"
            await stack.enter_async_context(_served_when_wanted(service, bound))
        house.http.apps[url] = service.app
        house.urls[service.base.name] = url
        yield


@contextlib.asynccontextmanager
async def _served_when_wanted(service: Service, bound: socket.socket) -> AsyncGenerator[None]:
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()

    def connected() -> None:
        loop.remove_reader(bound)
        wanted.set()

    async def serve() -> None:
        await wanted.wait()
        async with serving(service.app, bound):
            await asyncio.Event().wait()

    loop.add_reader(bound, connected)
    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        loop.remove_reader(bound)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        bound.close()
