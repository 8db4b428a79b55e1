"""A whole installation that is attacked: its real keys in the attacker's hands, one service's at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from capability_forge import NOW, TrustDomain
from scripts import default_reply

from octollm.capability import PublicKey, ServiceTokenSigner
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.services import SERVICES
from octollm.installation.embedded import Installation
from octollm.installation.keys import load_home_keys
from octollm.testing.fake_model import scripted_model
from octollm.testing.system import installation

_REFUSED = re.compile(r'octollm_capability_tokens_rejected_total\{reason="([a-z0-9_]+)",service="[a-z]+"\} ([0-9.e+]+)')


class StandingClock(SystemClock):
    """Wall time stands, so that tokens are made to the millisecond; everything that waits goes on."""

    time = NOW

    def now(self) -> float:
        return self.time


@dataclass(frozen=True)
class Reply:
    """What a caller is told: the status and the code; and the rule that was broken, which only the operator sees."""

    status: int
    code: str = ""
    reason: str = ""
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass
class AttackKit:
    """The installation, and what an attacker may do to it."""

    system: Installation
    domain: TrustDomain
    client: httpx.AsyncClient
    clock: StandingClock
    ids: Uuid7Generator

    async def send(
        self,
        service: str,
        method: str,
        path: str,
        bearer: str | None = None,
        body: Any = None,
        **headers: str,
    ) -> Reply:
        """Send a request as a stock client would, and find out which rule it broke, if any."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if bearer is not None:
            sent["Authorization"] = f"Bearer {bearer}"
        before = await self.refusals(service)
        url = self.system.urls[service] + path
        content = body if isinstance(body, bytes) else None
        json = None if isinstance(body, bytes) else body
        answer = await self.client.request(method, url, headers=sent, json=json, content=content)
        after = await self.refusals(service)
        [*reasons] = [reason for reason, count in after.items() if count > before.get(reason, 0)]
        told: Any = None
        if "json" in answer.headers.get("content-type", ""):
            told = answer.json()
        code = told.get("code", "") if isinstance(told, dict) else ""
        return Reply(answer.status_code, code, "+".join(reasons), told, dict(answer.headers))

    async def refusals(self, service: str) -> dict[str, float]:
        text = (await self.client.get(self.system.urls[service] + "/metrics")).text
        return {found[1]: float(found[2]) for found in _REFUSED.finditer(text)}

    async def run(self, bearer: str) -> Reply:
        """Ask the executor for something that is refused only after the bearer was believed."""
        return await self.send("executor", "POST", "/run", bearer, {})

    def service(self, name: str) -> ServiceTokenSigner:
        """Return what signs for a service, with the key that the attacker has of it."""
        return ServiceTokenSigner(self.domain.keys[name], name, self.clock, self.ids)

    def via_gateway(self, method: str, path: str, key: str | None = None, body: Any = None, **headers: str) -> Any:
        """Send a request to the public gateway; without ``key`` with what the local user is trusted for."""
        return self.send("reflex", method, path, key, body, **headers)

    async def key(self, scope: str, name: str = "attacker") -> str:
        """Return a fresh API key of the local tenant."""
        made = await self.via_gateway("POST", "/keys", body={"name": name, "scope": scope})
        assert made.status == 201, made
        return str(made.body["secret"])


@contextlib.asynccontextmanager
async def attack_kit(home: Path, **environment: str) -> AsyncGenerator[AttackKit]:
    """Run every service, with a clock whose wall time stands."""
    clock = StandingClock()
    ids = Uuid7Generator(SystemClock())
    async with (
        scripted_model(default_reply) as model,
        installation(
            home,
            environment={
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_RATE_LIMIT": "100000/minute",
                **environment,
            },
            clock=clock,
            ids=ids,
        ) as system,
        httpx.AsyncClient(timeout=60, trust_env=False) as client,
    ):
        keys = load_home_keys(system.home, ids)
        domain = TrustDomain()
        domain.root = keys.root.signing_key(NOW)
        domain.keys |= {name: keys.services[name].signing_key(NOW) for name in SERVICES}
        roots: dict[str, PublicKey] = keys.root.trusted_keys(NOW)
        domain.roots = roots
        domain.remint()
        yield AttackKit(system, domain, client, clock, ids)
