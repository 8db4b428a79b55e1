"""One service running in this process, from its opening to its end, in a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractAsyncContextManager

from octollm.errors import OctoError
from octollm.rpc.hosting import listen
from octollm.rpc.service import Service

ServiceContextFactory = Callable[[], AbstractAsyncContextManager[Service]]

KILL_SECONDS = 0.4
"""How long a cancelled service may take to clean up before it is left alone."""


class ServiceHost:
    """A service that is opened and served until it is told to stop; then calls in flight get ``drain`` seconds."""

    def __init__(self, name: str, open_service: ServiceContextFactory, bound: socket.socket, *, drain: float) -> None:
        self.name = name
        self._open_service = open_service
        self._bound = bound
        self._drain = drain
        self._stop = asyncio.Event()
        self._is_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Return where it listens, as ``host:port``."""
        host, port = self._bound.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _run(self) -> None:
        async with self._open_service() as service, service.serve(self._bound, shutdown_grace=self._drain):
            self._is_up.set()
            await self._stop.wait()

    async def start(self) -> None:
        """Open the service and serve it. Raises what its opening raises."""
        self._task = asyncio.create_task(self._run(), name=f"service {self.name}")
        up = asyncio.create_task(self._is_up.wait())
        try:
            await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._task.done():
            self._task.result()

    async def wait(self) -> None:
        """Wait until the service ends by itself, which it should not, and raise why."""
        if self._task is None:
            raise AssertionError(f"{self.name} was not started")
        await asyncio.wait({self._task})
        if self._stop.is_set():
            return
        raise OctoError(f"The service {self.name} stopped; the log has the reason.", code="internal") from (
            None if self._task.cancelled() else self._task.exception()
        )

    async def close(self, timeout: float) -> None:
        """Drain and close the service, cancelling what is left of it after ``seconds``."""
        if self._task is None:
            return
        self._stop.set()
        if not self._is_up.is_set():
            # It is still opening: there is nothing to drain.
            self._task.cancel()
        await asyncio.wait({self._task}, timeout=timeout)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=KILL_SECONDS)
        if self._task.done():
            with contextlib.suppress(asyncio.CancelledError):
                self._task.result()


async def start_service_host(
    name: str, open_service: ServiceContextFactory, host: str, port: int, *, drain: float
) -> ServiceHost:
    """Bind a socket, open the service and serve it there; on a failure nothing of it stays.

    Raises ``port_taken`` and what the opening raises.
    """
    bound = listen(host, port, name)
    hosted = ServiceHost(name, open_service, bound, drain=drain)
    try:
        await hosted.start()
    except BaseException:
        await hosted.close(0)
        bound.close()
        raise
    return hosted


@contextlib.asynccontextmanager
async def supervise_hosts(hosts: Iterable[ServiceHost]) -> AsyncGenerator[None]:
    """Cancel the body when a service ends by itself, and raise why."""
    try:
        async with asyncio.TaskGroup() as group:
            guards = [group.create_task(host.wait()) for host in hosts]
            try:
                yield
            finally:
                for guard in guards:
                    guard.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
