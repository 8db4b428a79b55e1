"""One service in this process: wait for its dependencies, open, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager

from octollm.clock import Clock
from octollm.concurrency import retry
from octollm.errors import OctoError
from octollm.rpc.client import OUTAGE_CODES
from octollm.rpc.service import Service
from octollm.rpc.transport import listen

ServiceContextFactory = Callable[[], AbstractAsyncContextManager[Service]]
"""Opens a service."""
DependencyCheck = Callable[[], Awaitable[None]]
"""Returns when a dependency is available; raises an ``OctoError`` with the reason when it is not."""

KILL_SECONDS = 0.4
"""How long a cancelled service may take to clean up before it is abandoned."""
POLL_SECONDS = 0.5
"""Pause between two rounds of dependency checks."""
REPORT_SECONDS = 5.0
"""An unchanged list of missing dependencies is reported again after this time."""
GC_THRESHOLD = 10_000
"""Net allocations before a collection of the youngest generation; Python's default is 700."""


class ServiceHost:
    """A service in this process: opened, served, and drained for up to ``drain`` seconds when it is closed."""

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
        """The address it listens on, as ``host:port``."""
        host, port = self._bound.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _run(self) -> None:
        async with self._open_service() as service, service.serve(self._bound, shutdown_grace=self._drain):
            self._is_up.set()
            await self._stop.wait()

    async def start(self) -> None:
        """Open the service and serve it. Raises what opening it raises."""
        self._task = asyncio.create_task(self._run(), name=f"service {self.name}")
        up = asyncio.create_task(self._is_up.wait())
        try:
            await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._task.done():
            self._task.result()

    async def wait(self) -> None:
        """Wait until the service ends. Raises ``internal`` with the cause when it was not closed."""
        if self._task is None:
            raise AssertionError(f"{self.name} was not started")
        await asyncio.wait({self._task})
        if self._stop.is_set():
            return
        raise OctoError(f"The service {self.name} stopped; the log has the reason.", code="internal") from (
            None if self._task.cancelled() else self._task.exception()
        )

    async def close(self, timeout: float) -> None:
        """Drain and close the service; cancel it after ``timeout`` seconds."""
        if self._task is None:
            return
        self._stop.set()
        if not self._is_up.is_set():
            # Still opening: there are no calls to drain.
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
    """Bind a socket, open the service and serve it there; on failure everything is closed.

    Raises ``port_taken`` and what opening the service raises.
    """
    bound = listen(host, port, name)
    service = ServiceHost(name, open_service, bound, drain=drain)
    try:
        await service.start()
    except BaseException:
        await service.close(0)
        bound.close()
        raise
    return service


@contextlib.asynccontextmanager
async def supervise_hosts(hosts: Iterable[ServiceHost]) -> AsyncGenerator[None]:
    """Cancel the body of the context when one of ``hosts`` ends, and raise the reason."""
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


async def wait_for_dependencies(
    checks: Mapping[str, DependencyCheck], *, clock: Clock, timeout: float, on_wait: Callable[[str], None]
) -> None:
    """Wait until every check passes, for at most ``timeout`` seconds.

    ``on_wait`` is called with the missing dependencies and their reasons when they change, and every
    ``REPORT_SECONDS``. Raises ``unavailable`` after the timeout, and immediately errors that waiting cannot repair.
    """
    end = clock.monotonic() + timeout
    reported, reported_at = "", -REPORT_SECONDS
    pending = dict(checks)

    async def check_all() -> None:
        reasons: dict[str, str] = {}
        for name, check in tuple(pending.items()):
            try:
                async with asyncio.timeout(max(1.0, end - clock.monotonic())):
                    await check()
                del pending[name]
            except TimeoutError:
                reasons[name] = "It does not answer."
            except OctoError as error:
                # One that accepts the connection and does not answer is away as well: suspended, or overloaded.
                if error.code not in OUTAGE_CODES and error.code != "deadline_exceeded":
                    raise
                reasons[name] = error.detail
        if pending:
            raise _StillWaitingError(
                "; ".join(f"{name}: {reason}" for name, reason in reasons.items()), code="unavailable"
            )

    def next_delay(error: OctoError, _attempt: int) -> float | None:
        nonlocal reported, reported_at
        now = clock.monotonic()
        if not isinstance(error, _StillWaitingError) or now >= end:
            return None
        if error.detail != reported or now - reported_at >= REPORT_SECONDS:
            reported, reported_at = error.detail, now
            on_wait(error.detail)
        return POLL_SECONDS

    try:
        await retry(check_all, next_delay)
    except _StillWaitingError as error:
        raise OctoError(
            f"Gave up after {timeout:g} s of waiting for {error.detail} Start what is missing, or set"
            " OCTOLLM_STARTUP_TIMEOUT to wait longer.",
            code="unavailable",
        ) from error


class _StillWaitingError(OctoError):
    """Some dependencies are not there yet; the detail names each with its reason."""


async def start_when_ready(
    name: str,
    open_service: ServiceContextFactory,
    address: tuple[str, int],
    *,
    drain: float,
    checks: Mapping[str, DependencyCheck],
    opening: str,
    clock: Clock,
    timeout: float,
    on_wait: Callable[[str], None],
) -> ServiceHost:
    """Wait for ``checks``, then start the service on ``address``, all within ``timeout`` seconds.

    Opening it may need more than the checks cover, such as a registration: an attempt that fails with an outage is
    repeated, and reported under the name ``opening``. Raises as :func:`wait_for_dependencies`.
    """
    hosts: list[ServiceHost] = []

    async def start() -> None:
        hosts.append(await start_service_host(name, open_service, *address, drain=drain))

    end = clock.monotonic() + timeout
    if checks:
        await wait_for_dependencies(checks, clock=clock, timeout=timeout, on_wait=on_wait)
    remaining = max(1.0, end - clock.monotonic()) if checks else timeout
    await wait_for_dependencies({opening: start}, clock=clock, timeout=remaining, on_wait=on_wait)
    return hosts[0]


def tune_garbage_collector() -> None:
    """Exclude the objects of a started process from garbage collection, and collect less often.

    Modules, classes and caches are some hundred thousand objects. A full collection during a call would visit each of
    them and free none.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
