"""Checks of what answers over the network: Redis, and the services of a running installation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import get_args

import msgspec

from octollm.cli.door import open_transport
from octollm.cli.findings import CheckResult
from octollm.client.door import GatewayTransport
from octollm.clock import SystemClock
from octollm.config import Settings
from octollm.contracts.health import Readiness
from octollm.contracts.services import SERVICES, local_url
from octollm.errors import OctoError
from octollm.installation.home import find_running
from octollm.storage import open_database, open_redis
from octollm.storage.migrations import DatabaseService, database_url, require_schema
from octollm.telemetry.masking import mask_text

MAX_CLOCK_SKEW_SECONDS = 5.0
"""How far the door's clock may be from this one: tokens tolerate little more."""


async def check_redis(settings: Settings) -> Sequence[CheckResult]:
    """Ask Redis whether it is there, and how fast it answers."""
    if settings.redis_url.startswith("memory://"):
        return [CheckResult("redis", "ok", "inside the process: other programs cannot subscribe to its events")]
    async with open_redis(settings.redis_url) as client:
        await client.ping()
        begun = time.monotonic()
        await client.ping()
        took = (time.monotonic() - begun) * 1000
    return [CheckResult("redis", "ok", f"{mask_text(settings.redis_url)} answers in {took:.1f} ms")]


async def check_database(settings: Settings) -> Sequence[CheckResult]:
    """Ask the database server whether it is there, and whether its schemas are those of this version."""
    if settings.database_url is None:
        return [CheckResult("database", "ok", "SQLite files in the home")]
    place = mask_text(settings.database_url)
    found: list[CheckResult] = []
    for service in get_args(DatabaseService):
        async with open_database(database_url(settings, service), clock=SystemClock()) as db:
            try:
                await require_schema(db, service)
            except OctoError as error:
                found.append(CheckResult("database", "broken", error.detail, "octollm migrate"))
    return found or [CheckResult("database", "ok", f"{place} answers, and its schemas are those of this version")]


async def check_services(settings: Settings) -> Sequence[CheckResult]:
    """Ask every service that should run whether it is ready, and for what it waits."""
    if not settings.urls and await find_running(settings.home) is None and not settings.service_urls:
        return [CheckResult("services", "ok", "none runs for this home; `octollm up` starts them")]
    async with open_transport(settings) as door:
        urls = _service_urls(settings, door)
        found = await asyncio.gather(*(_check_ready(door, name, url) for name, url in urls.items()))
        return [*found, await _check_clock_skew(door)]


def _service_urls(settings: Settings, transport: GatewayTransport) -> dict[str, str]:
    """Return where each service that this machine can reach should answer."""
    if settings.urls:
        # Behind a door that is elsewhere nothing else can be reached.
        return {"reflex": transport.url}
    tls = settings.tls_cert is not None
    own = {name: local_url(name, port_offset=settings.port_offset, tls=tls) for name in SERVICES}
    return {**own, **{name: urls[0] for name, urls in settings.service_urls.items()}, "reflex": transport.url}


async def _check_ready(transport: GatewayTransport, name: str, url: str) -> CheckResult:
    try:
        answer = await transport.http.send("GET", f"{url}/ready", {}, None, seconds=5)
        state = msgspec.json.decode(answer.body, type=Readiness)
    except OctoError as error:
        return CheckResult(name, "broken", error.detail, "Start it, or look into its log for why it ended.")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return CheckResult(name, "broken", f"what answers at {url} is no OctoLLM", "Is another program on that port?")
    lacking = [f"{key}: {part.detail}" for key, part in state.dependencies.items() if not part.ok]
    level = "ok" if state.status == "ready" else "warning" if answer.status == 200 else "broken"
    return CheckResult(name, level, "; ".join([state.status, *lacking]))


async def _check_clock_skew(transport: GatewayTransport) -> CheckResult:
    answer = await transport.http.send("GET", f"{transport.url}/health", {}, None, seconds=5)
    said = answer.headers.get("date")
    if said is None:
        return CheckResult("clock", "warning", "the door does not tell its time")
    # The header has whole seconds (RFC 9110 section 6.6.1).
    apart = abs(parsedate_to_datetime(said).timestamp() - time.time())
    if apart > MAX_CLOCK_SKEW_SECONDS:
        return CheckResult(
            "clock", "broken", f"{apart:.0f} s apart from the door's", "Set both machines' clocks by NTP."
        )
    return CheckResult("clock", "ok", "as the door's")
