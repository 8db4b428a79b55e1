"""What the orchestrator does by itself while it is served, besides its tasks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass

from octollm.background import kept_going
from octollm.services.orchestrator.presence import Presence
from octollm.services.orchestrator.registry import Registry
from octollm.services.orchestrator.revoking import Revoking
from octollm.services.orchestrator.sealing import Sealing
from octollm.telemetry import Log


@dataclass(frozen=True, slots=True)
class Watched:
    """What is kept up to date."""

    registry: Registry
    presence: Presence
    revoking: Revoking
    sealing: Sealing


@contextlib.asynccontextmanager
async def upkeep(watched: Watched, cancel_hints: Coroutine[object, object, None], log: Log) -> AsyncGenerator[None]:
    """Keep everything up to date for as long as the context is open. What crashes is logged, and told in ``/ready``."""

    def crashed(name: str) -> Callable[[BaseException], None]:
        return lambda error: log.error(f"{name}.crashed", error=error)

    def arms_crashed(error: BaseException) -> None:
        watched.registry.failure = f"What keeps the registry of arms stopped: {type(error).__name__}."
        log.error("registry.crashed", error=error)

    async with (
        watched.sealing.running(crashed("audit")),
        watched.revoking.watching(crashed("revocations")),
        watched.registry.refreshing(arms_crashed),
        watched.presence.sweeping(arms_crashed),
        kept_going("cancel hints", cancel_hints, crashed("cancel_hints")),
    ):
        yield
