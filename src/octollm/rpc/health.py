"""What every service answers about itself: health, readiness, metrics, keys, its API."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from octollm import __version__
from octollm.capability import PublicKey, jwks_of
from octollm.clock import Clock
from octollm.contracts.health import Dependency, Health, Readiness
from octollm.rpc.call import About, Call, Operation, Reply
from octollm.rpc.docs_page import docs_page
from octollm.rpc.openapi import openapi_of
from octollm.telemetry import Metrics

CHECKUP_SECONDS = 10.0
HTML = "text/html; charset=utf-8"
_CACHEABLE = ("jwks", "openapi", "docs")
CheckUp = Callable[[], Awaitable[Dependency]]


class JwkSet(msgspec.Struct, frozen=True):
    """``GET /.well-known/jwks.json`` (RFC 7517 section 5)."""

    keys: list[dict[str, str]]


def health_operations(
    service: str,
    metrics: Metrics,
    operations: Sequence[Operation],
    keys: Callable[[], Mapping[str, PublicKey]],
    checkups: Mapping[str, CheckUp],
    clock: Clock,
) -> list[Operation]:
    """Return the operations that are the same for every service. ``checkups`` are run at each ``/ready``, together."""

    async def health(_call: Call, _body: object) -> Health:
        return Health(service, __version__)

    async def ready(call: Call, _body: object) -> Reply:
        states = await asyncio.gather(*(_checked(checkup, clock) for checkup in checkups.values()))
        found = dict(zip(checkups, states, strict=True))
        ok = all(state.ok or not state.required for state in found.values())
        degraded = ok and not all(state.ok for state in found.values())
        word = "degraded" if degraded else "ready" if ok else "not ready"
        del call
        return Reply(Readiness(word, service, found), 200 if ok else 503)

    async def metrics_text(_call: Call, _body: object) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def jwks(_call: Call, _body: object) -> JwkSet:
        return JwkSet(jwks_of(keys())["keys"])

    described = functools.cache(lambda: openapi_of(service, [*operations, *own]))
    page = functools.cache(lambda: docs_page(described()))

    async def openapi(_call: Call, _body: object) -> dict[str, Any]:
        return described()

    async def docs(_call: Call, _body: object) -> Response:
        html, policy = page()
        return Response(html, media_type=HTML, headers={"Content-Security-Policy": policy})

    def get(
        path: str,
        handler: Callable[[Call, object], Awaitable[object]],
        summary: str,
        answer: object = None,
        about: About | None = None,
    ) -> Operation:
        name = path.rpartition("/")[2].partition(".")[0]
        return Operation(
            name,
            "GET",
            path,
            handler,
            auth="public",
            limited=False,
            max_body=0,
            summary=summary,
            answer=answer,
            cacheable=name in _CACHEABLE,
            about=about or About(),
        )

    own = [
        get("/health", health, "The process answers.", Health),
        get("/ready", ready, "What the service needs, and whether to send it calls.", Readiness, About(also=(503,))),
        get("/metrics", metrics_text, "Counters and timings for Prometheus.", about=About(media="text/plain")),
        get("/.well-known/jwks.json", jwks, "The service's public keys.", JwkSet),
        get("/openapi.json", openapi, "This description.", dict[str, Any]),
        get("/docs", docs, "This description as a page.", about=About(media="text/html")),
    ]
    return own


async def _checked(checkup: CheckUp, clock: Clock) -> Dependency:
    """Return what a check-up finds, and how long that took."""
    began = clock.monotonic()
    try:
        async with asyncio.timeout(CHECKUP_SECONDS):
            found = await checkup()
    except TimeoutError:
        found = Dependency(ok=False, detail=f"There was no answer in {CHECKUP_SECONDS:g} s.")
    return msgspec.structs.replace(found, latency_ms=round((clock.monotonic() - began) * 1000, 1))
