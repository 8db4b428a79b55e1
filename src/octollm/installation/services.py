"""Which function opens which service, and what each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial

from octollm.config import Settings
from octollm.installation.hosted import Opener
from octollm.installation.keys import HomeKeys
from octollm.rpc.service import Base, Service
from octollm.services.arms.coder.service import coder_service
from octollm.services.arms.executor.service import executor_service
from octollm.services.arms.judge.service import judge_service
from octollm.services.arms.planner.service import planner_service
from octollm.services.arms.retriever.service import retriever_service
from octollm.services.memory.service import memory_service
from octollm.services.models.service import models_service
from octollm.services.monitor.service import monitor_service
from octollm.services.orchestrator.service import orchestrator_service
from octollm.services.reflex.service import reflex_service
from octollm.storage import RedisClient

ServiceFactory = Callable[[Base, Settings], AbstractAsyncContextManager[Service]]
"""Opens a service that needs nothing but what every service has."""

_PLAIN: Mapping[str, ServiceFactory] = {
    "memory": memory_service,
    "models": models_service,
    "planner": planner_service,
    "executor": executor_service,
    "coder": coder_service,
    "judge": judge_service,
    "retriever": retriever_service,
}


def service_openers(
    bases: Mapping[str, Base],
    settings: Settings,
    *,
    redis: RedisClient,
    keys: HomeKeys,
    loopback_only: bool,
    overrides: Mapping[str, ServiceFactory],
) -> dict[str, Opener]:
    """Return what opens each service; ``overrides`` stands in place of services that need nothing special."""
    openers: dict[str, Opener] = {
        name: partial(overrides.get(name, factory), bases[name], settings) for name, factory in _PLAIN.items()
    }
    openers["orchestrator"] = partial(
        orchestrator_service,
        bases["orchestrator"],
        settings,
        redis=redis,
        root_key=keys.root,
        service_keys=keys.public,
        local_key=keys.local,
    )
    openers["monitor"] = partial(monitor_service, bases["monitor"], settings, redis=redis)
    openers["reflex"] = partial(
        reflex_service,
        bases["reflex"],
        settings,
        redis=redis,
        local_key=keys.local if settings.local_trust and loopback_only else None,
        loopback_only=loopback_only,
    )
    return openers
