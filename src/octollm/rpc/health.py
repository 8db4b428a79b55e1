"""What every service answers about itself: health, readiness, metrics, keys, its API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
from starlette.responses import Response

from octollm import __version__
from octollm.capability import PublicKey
from octollm.clock import Clock
from octollm.contracts.health import Dependency, Health, Readiness
from octollm.rpc.call import Call, Operation, Reply
from octollm.rpc.openapi import openapi_of
from octollm.telemetry import Metrics

CHECKUP_SECONDS = 10.0
CheckUp = Callable[[], Awaitable[Dependency]]


class JwkSet(msgspec.Struct, frozen=True):
    """``GET /.well-known/jwks.json`` (RFC 7517 section 5)."""

    keys: list[dict[str, str]]


def health_operations(
    service: str,
    metrics: Metrics,
    operations: Sequence[Operation],
    keys: Sequence[PublicKey],
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
        return JwkSet([{**key.to_jwk(), "kid": key.thumbprint, "use": "sig", "alg": "EdDSA"} for key in keys])

    async def openapi(_call: Call, _body: object) -> object:
        return openapi_of(service, [*operations, *own])

    def get(path: str, name: str, handler: Callable[[Call, object], Awaitable[object]], summary: str) -> Operation:
        return Operation(name, "GET", path, handler, auth="public", limited=False, max_body=0, summary=summary)

    own = [
        get("/health", "health", health, "The process answers."),
        get("/ready", "ready", ready, "What the service needs, and whether it may be sent calls."),
        get("/metrics", "metrics", metrics_text, "Counters and timings in the Prometheus format."),
        get("/.well-known/jwks.json", "jwks", jwks, "The service's public keys."),
        get("/openapi.json", "openapi", openapi, "This description."),
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
