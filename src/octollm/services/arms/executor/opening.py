"""The sandbox of this machine: chosen by trying in the background, and waited for by the first run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.health import Dependency
from octollm.services.arms.executor.runner import Runner
from octollm.services.arms.executor.sandbox import Sandbox
from octollm.telemetry import Log

RETRY_SECONDS = 60.0
"""How long it is believed that there is no sandbox, before a run has them tried again."""


class RunnerHolder:
    """Holds the runner once there is a sandbox. ``choose`` finds one or raises ``no_sandbox``."""

    def __init__(self, choose: Callable[[], Awaitable[Sandbox]], *, clock: Clock, log: Log) -> None:
        self._choose = choose
        self._clock = clock
        self._log = log
        self._choosing: asyncio.Task[Runner] | None = None
        self._failure: OctoError | None = None
        self._failed_at = 0.0

    def begin(self) -> asyncio.Task[Runner]:
        """Start to choose, unless that was done."""
        if self._choosing is None:
            self._choosing = asyncio.create_task(self._open(), name="choose a sandbox")
            self._choosing.add_done_callback(self._chosen)
        return self._choosing

    async def get(self) -> Runner:
        """Return the runner. Raises ``no_sandbox`` with how to get one."""
        failure = self._failure
        if failure is not None and self._clock.monotonic() - self._failed_at < RETRY_SECONDS:
            raise OctoError(failure.detail, code=failure.code) from failure
        return await asyncio.shield(self.begin())

    async def checkup(self) -> Dependency:
        """Say for ``/ready`` which sandbox is in use. Without one the executor still answers: how to get one."""
        if self._failure is not None:
            return Dependency(ok=False, detail=self._failure.detail, required=False)
        choosing = self._choosing
        if choosing is None or not choosing.done():
            return Dependency(ok=True, detail="a sandbox is being chosen", required=False)
        return Dependency(ok=True, detail=choosing.result().sandbox, required=False)

    async def aclose(self) -> None:
        """Stop choosing."""
        if self._choosing is not None:
            self._choosing.cancel()
            await asyncio.wait({self._choosing})

    async def _open(self) -> Runner:
        return Runner(await self._choose())

    def _chosen(self, choosing: asyncio.Task[Runner]) -> None:
        if choosing.cancelled():
            return
        error = choosing.exception()
        if error is None:
            self._failure = None
            self._log.info("sandbox.chosen", sandbox=choosing.result().sandbox)
            return
        self._choosing = None
        self._failed_at = self._clock.monotonic()
        self._failure = error if isinstance(error, OctoError) else OctoError(f"No sandbox: {error}", code="no_sandbox")
        self._log.error("sandbox.missing", error=error)
