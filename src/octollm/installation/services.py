"""Which function opens which service, and what each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from octollm.config import Settings
from octollm.errors import SettingError
from octollm.installation.hosted import ServiceContextFactory
from octollm.installation.own_keys import RootKeys
from octollm.rpc.service import Service, ServiceBase
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

ServiceFactory = Callable[[ServiceBase, Settings], AbstractAsyncContextManager[Service]]
"""Opens a service that needs nothing but what every service has."""

REDIS_SERVICES = frozenset({"orchestrator", "monitor", "reflex"})
"""The services that are given Redis."""

_SIMPLE_SERVICES: Mapping[str, ServiceFactory] = {
    "memory": memory_service,
    "models": models_service,
    "planner": planner_service,
    "executor": executor_service,
    "coder": coder_service,
    "judge": judge_service,
    "retriever": retriever_service,
}


@dataclass(frozen=True, slots=True)
class ServiceResources:
    """What the services of a process are given besides what every service has.

    ``root`` is for the orchestrator alone. ``local_key`` is the credential that the door uses for a local peer where
    ``loopback_only`` says that nobody else can connect; ``None`` where no peer is trusted.
    """

    settings: Settings
    redis: RedisClient | None = None
    root: RootKeys | None = None
    local_key: str | None = None
    loopback_only: bool = False


def bind_service_factory(
    name: str, base: ServiceBase, resources: ServiceResources, *, override: ServiceFactory | None = None
) -> ServiceContextFactory:
    """Return what opens the built-in service ``name``; ``override`` stands in place of one that needs nothing special.

    Raises ``setting_invalid`` when something that it needs is not supplied.
    """
    settings = resources.settings
    if name in _SIMPLE_SERVICES:
        return partial(override or _SIMPLE_SERVICES[name], base, settings)
    redis = resources.redis
    if redis is None:
        raise SettingError(f"{name} needs a Redis server: set OCTOLLM_REDIS_URL, e.g. redis://localhost:6379/0.")
    if name == "orchestrator":
        root = resources.root
        if root is None:
            raise SettingError("The orchestrator needs the root key: see `octollm keys provision --help`.")
        return partial(
            orchestrator_service,
            base,
            settings,
            redis=redis,
            root_key=root.root,
            service_keys=root.services,
            local_key=root.local,
        )
    if name == "monitor":
        return partial(monitor_service, base, settings, redis=redis)
    trusted = resources.local_key if settings.trust_loopback and resources.loopback_only else None
    return partial(
        reflex_service, base, settings, redis=redis, local_key=trusted, loopback_only=resources.loopback_only
    )
