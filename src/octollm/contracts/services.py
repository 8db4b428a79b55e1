"""The services: names, ports, hosts, and which service owns which family of scopes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OperationKind = Literal["read_only", "idempotent", "at_most_once"]


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A built-in service: its port and its host name in a cluster."""

    name: str
    port: int
    host: str


SERVICES: dict[str, ServiceInfo] = {
    info.name: info
    for info in (
        ServiceInfo("reflex", 8000, "reflex"),
        ServiceInfo("orchestrator", 8001, "orchestrator"),
        ServiceInfo("memory", 8002, "memory"),
        ServiceInfo("monitor", 8003, "monitor"),
        ServiceInfo("models", 8004, "models"),
        ServiceInfo("planner", 8100, "planner-arm"),
        ServiceInfo("executor", 8101, "executor-arm"),
        ServiceInfo("coder", 8102, "coder-arm"),
        ServiceInfo("judge", 8103, "judge-arm"),
        ServiceInfo("retriever", 8104, "retriever-arm"),
    )
}

BUILT_IN_ARMS = ("planner", "executor", "coder", "judge", "retriever")

ORCHESTRATOR_FAMILIES = frozenset({"tasks", "files", "events", "arms", "webhooks", "keys", "audit"})
"""Scope families that belong to the orchestrator, besides its own name."""


def service_of(family: str) -> str:
    """Return the service (the ``aud``) that owns the scopes of ``family``."""
    return "orchestrator" if family in ORCHESTRATOR_FAMILIES else family


def local_url(service: str, *, port_offset: int, tls: bool) -> str:
    """Return the URL of a service of the installation on this machine."""
    return f"{'https' if tls else 'http'}://127.0.0.1:{SERVICES[service].port + port_offset}"
