"""Whether the other services are ready, as the door's own ``/ready`` tells."""

from __future__ import annotations

import asyncio

import msgspec

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.discovery import Discovery
from octollm.rpc.health import DependencyStatus, Readiness, ReadinessCheck
from octollm.rpc.http import HttpClient

READINESS_SECONDS = 2.0
MAX_CHECKED_INSTANCES = 16
"""Instances of one service that are asked."""
READINESS_CACHE_SECONDS = 1.0
"""An answer is used again for so long: a page that asks often costs no more."""


class DependencyReadiness:
    """Asks the ``/ready`` of several services at once."""

    def __init__(self, http: HttpClient, discovery: Discovery, clock: Clock, names: tuple[str, ...]) -> None:
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._names = names
        self._cached: dict[str, DependencyStatus] = {}
        self._checked_at = -1e9
        self._lock = asyncio.Lock()

    def checkups(self) -> dict[str, ReadinessCheck]:
        """Return a check-up for each service."""
        return {name: self._checkup(name) for name in self._names}

    def _checkup(self, name: str) -> ReadinessCheck:
        async def checkup() -> DependencyStatus:
            async with self._lock:
                if self._clock.monotonic() - self._checked_at > READINESS_CACHE_SECONDS:
                    answers = await asyncio.gather(*(self._check_service(each) for each in self._names))
                    self._cached = dict(zip(self._names, answers, strict=True))
                    self._checked_at = self._clock.monotonic()
            return self._cached[name]

        return checkup

    async def _check_service(self, name: str) -> DependencyStatus:
        """Return the state of a service: the best of its instances, since one that is well is enough."""
        try:
            urls = self._discovery.instances(name)[:MAX_CHECKED_INSTANCES]
        except OctoError:
            return DependencyStatus(ok=False, detail="no address is known for it")
        states = await asyncio.gather(*(self._check_instance(url) for url in urls))
        return max(states, key=lambda state: state.ok)

    async def _check_instance(self, url: str) -> DependencyStatus:
        try:
            answer = await self._http.send("GET", f"{url}/ready", {}, None, seconds=READINESS_SECONDS)
            ready = msgspec.json.decode(answer.body, type=Readiness)
        except (OctoError, msgspec.DecodeError, UnicodeDecodeError):
            return DependencyStatus(ok=False, detail="it does not answer")
        lacking = [key for key, state in ready.dependencies.items() if not state.ok]
        return DependencyStatus(ok=answer.status == 200, detail=f"without {', '.join(lacking)}" if lacking else "")
