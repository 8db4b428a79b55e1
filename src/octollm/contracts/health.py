"""What every service answers about its health."""

from __future__ import annotations

import msgspec


class DependencyStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of something that a service needs. A degraded one does not make the service unready."""

    ok: bool
    detail: str = ""
    required: bool = True
    latency_ms: float | None = None
    """How long the answer took, in milliseconds."""


class Readiness(msgspec.Struct, frozen=True):
    """``GET /ready``: 200 when the service may be sent calls, else 503."""

    status: str
    service: str
    dependencies: dict[str, DependencyStatus]


class Health(msgspec.Struct, frozen=True):
    """``GET /health``: the process answers."""

    service: str
    version: str
    status: str = "ok"
