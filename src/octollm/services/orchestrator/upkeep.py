"""What the orchestrator does by itself while it is served, besides its tasks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass

from octollm.background import run_in_background
from octollm.services.orchestrator.presence import InstanceRegistry
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revoking import RevocationStore
from octollm.services.orchestrator.sealing import AuditSealer
from octollm.telemetry import Logger


@dataclass(frozen=True, slots=True)
class MaintenanceLoops:
    """What is kept up to date."""

    registry: ServiceRegistry
    instances: InstanceRegistry
    revocation_store: RevocationStore
    sealer: AuditSealer


@contextlib.asynccontextmanager
async def run_maintenance(
    loops: MaintenanceLoops, cancellation_listener: Coroutine[object, object, None], log: Logger
) -> AsyncGenerator[None]:
    """Keep everything up to date for as long as the context is open. What crashes is logged, and told in ``/ready``."""

    def crashed(name: str) -> Callable[[BaseException], None]:
        return lambda error: log.error(f"{name}.crashed", error=error)

    def arms_crashed(error: BaseException) -> None:
        loops.registry.failure = f"What keeps the registry of arms stopped: {type(error).__name__}."
        log.error("registry.crashed", error=error)

    async with (
        loops.sealer.run(crashed("audit")),
        loops.revocation_store.run(crashed("revocations")),
        loops.registry.run(arms_crashed),
        loops.instances.run(arms_crashed),
        run_in_background("cancel hints", cancellation_listener, crashed("cancel_hints")),
    ):
        yield
