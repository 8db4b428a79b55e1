"""The operations that every service has: liveness, readiness, metrics, public keys, and its API description."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from octollm import __version__
from octollm.capability import PublicKey, to_jwks
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.observability import DependencyStatus, Health, Readiness
from octollm.rpc.call import IncomingCall, Operation, OperationDocs, OperationResponse
from octollm.rpc.openapi import build_openapi, render_docs_page
from octollm.telemetry import Metrics

READINESS_CHECK_SECONDS = 10.0
WATCH_SECONDS = 10.0
"""Seconds between two rounds of checks for ``system.degraded``. The first comes as late, when the service is up."""
HTML = "text/html; charset=utf-8"
_CACHEABLE = ("jwks", "openapi", "docs")
ReadinessCheck = Callable[[], Awaitable[DependencyStatus]]


class DependencyWatch:
    """The dependencies of a service. ``on_degraded`` is called once with each that stops working: name and reason."""

    def __init__(
        self,
        checks: Mapping[str, ReadinessCheck],
        clock: Clock,
        on_degraded: Callable[[str, str], None],
        log: LoopLogger,
    ) -> None:
        self._checks = checks
        self._clock = clock
        self._on_degraded = on_degraded
        self._failing: frozenset[str] = frozenset()
        self.loop = BackgroundLoop(
            "dependency watch",
            self.observe,
            interval=WATCH_SECONDS,
            initial_delay=WATCH_SECONDS,
            restart=True,
            log=log,
        )

    async def check_all(self) -> dict[str, DependencyStatus]:
        """Run every check at once, each within its time limit."""
        states = await asyncio.gather(*(_run_check(check, self._clock) for check in self._checks.values()))
        return dict(zip(self._checks, states, strict=True))

    async def observe(self) -> None:
        """Run every check and report those that fail and did not in the last round."""
        states = await self.check_all()
        failing = {name: state.detail for name, state in states.items() if not state.ok}
        for name, reason in failing.items():
            if name not in self._failing:
                self._on_degraded(name, reason)
        self._failing = frozenset(failing)


class JwkSet(msgspec.Struct, frozen=True):
    """``GET /.well-known/jwks.json`` (RFC 7517 section 5)."""

    keys: list[dict[str, str]]


def health_operations(
    service: str,
    metrics: Metrics,
    operations: Sequence[Operation],
    keys: Callable[[], Mapping[str, PublicKey]],
    watch: DependencyWatch,
) -> list[Operation]:
    """Return the operations that every service has. ``/ready`` runs all checks of ``watch`` at once."""

    async def health(_call: IncomingCall, _body: object) -> Health:
        return Health(service, __version__)

    async def ready(call: IncomingCall, _body: object) -> OperationResponse:
        dependencies = await watch.check_all()
        ok = all(state.ok or not state.required for state in dependencies.values())
        degraded = ok and not all(state.ok for state in dependencies.values())
        word = "degraded" if degraded else "ready" if ok else "not ready"
        del call
        return OperationResponse(Readiness(word, service, dependencies), 200 if ok else 503)

    async def metrics_text(_call: IncomingCall, _body: object) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def jwks(_call: IncomingCall, _body: object) -> JwkSet:
        return JwkSet(to_jwks(keys())["keys"])

    described = functools.cache(lambda: build_openapi(service, [*operations, *own]))
    page = functools.cache(lambda: render_docs_page(described()))

    async def openapi(_call: IncomingCall, _body: object) -> dict[str, Any]:
        return described()

    async def docs(_call: IncomingCall, _body: object) -> Response:
        html, policy = page()
        return Response(html, media_type=HTML, headers={"Content-Security-Policy": policy})

    def get(
        path: str,
        handler: Callable[[IncomingCall, object], Awaitable[object]],
        summary: str,
        answer: object = None,
        about: OperationDocs | None = None,
    ) -> Operation:
        name = path.rpartition("/")[2].partition(".")[0]
        return Operation(
            name,
            "GET",
            path,
            handler,
            auth="public",
            # Outside the concurrency limit, so that an overloaded service still answers its probes.
            limited=False,
            max_body=0,
            summary=summary,
            response=answer,
            cacheable=name in _CACHEABLE,
            docs=about or OperationDocs(),
        )

    own = [
        get("/health", health, "The process answers.", Health),
        get(
            "/ready",
            ready,
            "What the service needs, and whether to send it calls.",
            Readiness,
            OperationDocs(other_statuses=(503,)),
        ),
        get(
            "/metrics",
            metrics_text,
            "Counters and timings for Prometheus.",
            about=OperationDocs(media_type="text/plain"),
        ),
        get("/.well-known/jwks.json", jwks, "The service's public keys.", JwkSet),
        get("/openapi.json", openapi, "This description.", dict[str, Any]),
        get("/docs", docs, "This description as a page.", about=OperationDocs(media_type="text/html")),
    ]
    return own


async def _run_check(check: ReadinessCheck, clock: Clock) -> DependencyStatus:
    """Run one check within its time limit, and add how long it took."""
    began = clock.monotonic()
    try:
        async with asyncio.timeout(READINESS_CHECK_SECONDS):
            status = await check()
    except TimeoutError:
        status = DependencyStatus(ok=False, detail=f"There was no answer in {READINESS_CHECK_SECONDS:g} s.")
    return msgspec.structs.replace(status, latency_ms=round((clock.monotonic() - began) * 1000, 1))
