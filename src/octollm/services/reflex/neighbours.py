"""Whether the other services are ready, as the door's own ``/ready`` tells."""

from __future__ import annotations

import asyncio

import msgspec

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.discovery import Discovery
from octollm.rpc.health import CheckUp, Dependency, Readiness
from octollm.rpc.http import Http

ASK_SECONDS = 2.0
MAX_INSTANCES = 16
"""Instances of one service that are asked."""
KEPT_SECONDS = 1.0
"""An answer is used again for so long: a page that asks often costs no more."""


class Neighbours:
    """Asks the ``/ready`` of several services at once."""

    def __init__(self, http: Http, discovery: Discovery, clock: Clock, names: tuple[str, ...]) -> None:
        self._http = http
        self._discovery = discovery
        self._clock = clock
        self._names = names
        self._found: dict[str, Dependency] = {}
        self._asked_at = -1e9
        self._lock = asyncio.Lock()

    def checkups(self) -> dict[str, CheckUp]:
        """Return a check-up for each service."""
        return {name: self._checkup(name) for name in self._names}

    def _checkup(self, name: str) -> CheckUp:
        async def checkup() -> Dependency:
            async with self._lock:
                if self._clock.monotonic() - self._asked_at > KEPT_SECONDS:
                    answers = await asyncio.gather(*(self._ask(each) for each in self._names))
                    self._found = dict(zip(self._names, answers, strict=True))
                    self._asked_at = self._clock.monotonic()
            return self._found[name]

        return checkup

    async def _ask(self, name: str) -> Dependency:
        """Return the state of a service: the best of its instances, since one that is well is enough."""
        try:
            urls = self._discovery.instances(name)[:MAX_INSTANCES]
        except OctoError:
            return Dependency(ok=False, detail="no address is known for it")
        states = await asyncio.gather(*(self._ask_instance(url) for url in urls))
        return max(states, key=lambda state: state.ok)

    async def _ask_instance(self, url: str) -> Dependency:
        try:
            answer = await self._http.send("GET", f"{url}/ready", {}, None, seconds=ASK_SECONDS)
            ready = msgspec.json.decode(answer.body, type=Readiness)
        except (OctoError, msgspec.DecodeError, UnicodeDecodeError):
            return Dependency(ok=False, detail="it does not answer")
        lacking = [key for key, state in ready.dependencies.items() if not state.ok]
        return Dependency(ok=answer.status == 200, detail=f"without {', '.join(lacking)}" if lacking else "")
