"""One service in this process: wait for its dependencies, open, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.client import OUTAGE_CODES
from octollm.rpc.service import Service
from octollm.rpc.transport import listen

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


POLL_SECONDS = 0.5
REPORT_SECONDS = 5.0
"""What is waited for is told again after so long."""

DependencyCheck = Callable[[], Awaitable[None]]
"""Returns when something is there; raises an ``OctoError`` that says what is wrong with it."""


async def wait_for_dependencies(
    checks: Mapping[str, DependencyCheck], *, clock: Clock, timeout: float, on_wait: Callable[[str], None]
) -> None:
    """Wait until every one of ``needs`` is there, at most ``seconds``; ``tell`` is given what is waited for.

    Raises ``unavailable`` naming what did not come, and at once what waiting cannot mend.
    """
    end = clock.monotonic() + timeout
    told, told_at = "", -REPORT_SECONDS
    waiting = dict(checks)
    while True:
        reasons: dict[str, str] = {}
        for name, need in tuple(waiting.items()):
            try:
                async with asyncio.timeout(max(1.0, end - clock.monotonic())):
                    await need()
                del waiting[name]
            except TimeoutError:
                reasons[name] = "It does not answer."
            except OctoError as error:
                if error.code not in OUTAGE_CODES:
                    raise
                reasons[name] = error.detail
        if not waiting:
            return
        sentence = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        now = clock.monotonic()
        if now >= end:
            raise OctoError(
                f"Gave up after {timeout:g} s of waiting for {sentence} Start what is missing, or set"
                " OCTOLLM_STARTUP_TIMEOUT to wait longer.",
                code="unavailable",
            )
        if sentence != told or now - told_at >= REPORT_SECONDS:
            told, told_at = sentence, now
            on_wait(sentence)
        await asyncio.sleep(POLL_SECONDS)


GC_THRESHOLD = 10_000
"""Objects that are made, beyond those that are gone, before the collector looks at the new ones; Python has 700."""


def tune_garbage_collector() -> None:
    """Tell the collector that what a started process consists of stays.

    Modules, classes and caches are some hundred thousand objects, which a full collection looks at one by one, during a
    call, to find that none of them is gone.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
