"""Forgetting old spans, in the background."""

from __future__ import annotations

import asyncio

from octollm.errors import OctoError
from octollm.rpc.health import DependencyStatus
from octollm.services.monitor.store import SpanStore
from octollm.telemetry import Logger

PRUNE_SECONDS = 60.0


class SpanPruner:
    """Keeps the store within its bounds. When it cannot, ``/ready`` says why."""

    def __init__(self, store: SpanStore, log: Logger) -> None:
        self._store = store
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._failure = ""

    async def __aenter__(self) -> SpanPruner:
        self._task = asyncio.create_task(self._run(), name="monitor prune")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def checkup(self) -> DependencyStatus:
        """Say whether old spans are forgotten."""
        return DependencyStatus(ok=not self._failure, detail=self._failure, required=False)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = "Old spans are no longer forgotten; the log says why."
            self._log.error("spans.pruning_crashed", error=error)

    async def _run(self) -> None:
        while True:
            try:
                while await self._store.prune():
                    pass
                self._failure = ""
            except OctoError as error:
                self._failure = f"Old spans cannot be forgotten: {error.detail}"
                self._log.warning("spans.not_pruned", error=error)
            await asyncio.sleep(PRUNE_SECONDS)
