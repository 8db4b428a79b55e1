"""A whole installation for a test: every service, on free ports, in a home of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path

from octollm.clock import Clock, IdGenerator, SystemClock, Uuid7Generator
from octollm.config import read_settings
from octollm.contracts.services import SERVICES
from octollm.installation.embedded import Installation, embedded_installation
from octollm.installation.services import ServiceFactory
from octollm.llm.selection import ModelChoice
from octollm.llm.types import ChatModel
from octollm.services.models.service import models_service


@contextlib.asynccontextmanager
async def installation(
    home: Path,
    *,
    model: ChatModel | None = None,
    environment: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    ids: IdGenerator | None = None,
) -> AsyncGenerator[Installation]:
    """Run every service in this process on free ports, and yield once all are ready.

    ``model`` stands in for the one that the settings choose and stays the caller's to close; ``environment`` holds
    further settings (``OCTOLLM_…``). Nothing is read from the process's own environment.
    """
    time = clock or SystemClock()
    settings = read_settings({**(environment or {}), "OCTOLLM_HOME": str(home)}, tuple(SERVICES))
    overrides: dict[str, ServiceFactory] = {}
    if model is not None:

        async def ready() -> ChatModel:
            return model

        overrides["models"] = partial(models_service, choose=lambda: ModelChoice(model.name, None, ready))
    async with embedded_installation(
        settings, clock=time, ids=ids or Uuid7Generator(time), ports=dict.fromkeys(SERVICES, 0), overrides=overrides
    ) as system:
        await system.wait_ready()
        yield system
