"""The sandbox of this machine: chosen by trying in the background, and waited for by the first run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.health import DependencyStatus
from octollm.services.arms.executor.runner import Runner
from octollm.services.arms.executor.sandbox import Sandbox
from octollm.telemetry import Logger

RETRY_SECONDS = 60.0
"""How long it is believed that there is no sandbox, before a run has them tried again."""


class RunnerProvider:
    """Holds the runner once there is a sandbox. ``choose`` finds one or raises ``no_sandbox``."""

    def __init__(self, select: Callable[[], Awaitable[Sandbox]], *, clock: Clock, log: Logger) -> None:
        self._select = select
        self._clock = clock
        self._log = log
        self._selection: asyncio.Task[Runner] | None = None
        self._failure: OctoError | None = None
        self._failed_at = 0.0

    def start(self) -> asyncio.Task[Runner]:
        """Start to choose, unless that was done."""
        if self._selection is None:
            self._selection = asyncio.create_task(self._create_runner(), name="choose a sandbox")
            self._selection.add_done_callback(self._on_selected)
        return self._selection

    async def get(self) -> Runner:
        """Return the runner. Raises ``no_sandbox`` with how to get one."""
        failure = self._failure
        if failure is not None and self._clock.monotonic() - self._failed_at < RETRY_SECONDS:
            raise OctoError(failure.detail, code=failure.code) from failure
        return await asyncio.shield(self.start())

    async def checkup(self) -> DependencyStatus:
        """Say for ``/ready`` which sandbox is in use. Without one the executor still answers: how to get one."""
        if self._failure is not None:
            return DependencyStatus(ok=False, detail=self._failure.detail, required=False)
        choosing = self._selection
        if choosing is None or not choosing.done():
            return DependencyStatus(ok=True, detail="a sandbox is being chosen", required=False)
        return DependencyStatus(ok=True, detail=choosing.result().sandbox, required=False)

    async def aclose(self) -> None:
        """Stop choosing."""
        if self._selection is not None:
            self._selection.cancel()
            await asyncio.wait({self._selection})

    async def _create_runner(self) -> Runner:
        return Runner(await self._select())

    def _on_selected(self, choosing: asyncio.Task[Runner]) -> None:
        if choosing.cancelled():
            return
        error = choosing.exception()
        if error is None:
            self._failure = None
            self._log.info("sandbox.chosen", sandbox=choosing.result().sandbox)
            return
        self._selection = None
        self._failed_at = self._clock.monotonic()
        self._failure = error if isinstance(error, OctoError) else OctoError(f"No sandbox: {error}", code="no_sandbox")
        self._log.error("sandbox.missing", error=error)
