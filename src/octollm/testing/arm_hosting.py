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
from octollm.rpc.hosting import listen, serve_app
from octollm.rpc.service import Service
from octollm.services.models.service import models_service
from octollm.testing.fake_model import FakeModel
from octollm.testing.harness import LOCAL, Harness
from octollm.testing.in_memory import InMemoryHttp


@contextlib.asynccontextmanager
async def enter_all(contexts: Sequence[AbstractAsyncContextManager[None]]) -> AsyncGenerator[None]:
    """Open contexts one after the other, and close them side by side: a server takes a moment to end."""
    stacks = [contextlib.AsyncExitStack() for _ in contexts]
    try:
        for stack, opening in zip(stacks, contexts, strict=True):
            await stack.enter_async_context(opening)
        yield
    finally:
        await asyncio.gather(*(stack.aclose() for stack in stacks))


@contextlib.asynccontextmanager
async def arm_service(harness: Harness, arm: Arm) -> AsyncGenerator[Service]:
    """Yield ``arm`` as a service."""
    yield build_arm(arm, harness.base(arm.name))


@contextlib.asynccontextmanager
async def fake_models_service(harness: Harness, model: FakeModel) -> AsyncGenerator[Service]:
    """Yield the real models service over a fake model."""

    async def ready() -> ChatModel:
        return model

    with TemporaryDirectory() as home:
        settings = read_settings({"OCTOLLM_HOME": home, "OCTOLLM_MODEL": "openai:fake"}, ())
        choice = ModelChoice(model.name, None, ready)
        async with models_service(harness.base("models"), settings, choose=lambda: choice) as service:
            yield service


@contextlib.asynccontextmanager
async def host_service(
    harness: Harness, service_context: AbstractAsyncContextManager[Service], *, lazy: bool = False
) -> AsyncGenerator[None]:
    """Host a service in memory, or on a socket where the bench has them.

    ``lazily`` also opens a socket, served once somebody connects: a client of the arm's own knows nothing of ours.
    """
    if not isinstance(harness.http, InMemoryHttp):
        async with harness.serve(service_context):
            yield
        return
    async with service_context as service, contextlib.AsyncExitStack() as stack:
        url = f"http://{service.base.name}"
        if lazy:
            bound = listen(LOCAL, 0, service.base.name)
            url = f"http://{LOCAL}:{bound.getsockname()[1]}"
            await stack.enter_async_context(_serve_on_first_connection(service, bound))
        harness.http.apps[url] = service.app
        harness.urls[service.base.name] = url
        yield


@contextlib.asynccontextmanager
async def _serve_on_first_connection(service: Service, bound: socket.socket) -> AsyncGenerator[None]:
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()

    def connected() -> None:
        loop.remove_reader(bound)
        wanted.set()

    async def serve() -> None:
        await wanted.wait()
        async with serve_app(service.app, bound):
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
