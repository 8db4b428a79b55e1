"""A revocation over processes of their own: every service within a second, and after its restart."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from process_installation import private_servers, start_processes
from scripts import default_reply

from octollm.capability.inspection import read_chain
from octollm.testing import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.postgres, pytest.mark.sandbox]
ASKED = {
    "judge": ("judge:validate", "/validate"),
    "executor": ("executor:run", "/run"),
    "coder": ("coder:execute", "/execute"),
    "memory": ("memory:read", "/search"),
    "models": ("models:chat", "/v1/chat/completions"),
    "planner": ("planner:plan", "/plan"),
    "retriever": ("retriever:search", "/search"),
}


@pytest.mark.timeout(240)
async def test_every_service_refuses_what_was_revoked_also_after_its_restart(tmp_path: Path) -> None:
    async with (
        private_servers(tmp_path, default_reply) as servers,
        start_processes(tmp_path / "installation", servers.environment) as installation,
        installation.client() as gateway,
        httpx.AsyncClient(timeout=10, trust_env=False) as plain,
    ):
        tokens: dict[str, str] = {}
        for service, (scope, _path) in ASKED.items():
            made = await gateway.post("/token", json={"scope": scope, "aud": service})
            assert made.status_code == 200, made.text
            tokens[service] = made.json()["access_token"]

        async def said(service: str) -> tuple[int, str]:
            [replica] = installation.replicas[service]
            headers = {"Authorization": f"Bearer {tokens[service]}"}
            answer = await plain.post(replica.url + ASKED[service][1], json={}, headers=headers)
            return answer.status_code, json.loads(answer.content).get("code", "")

        for service in ASKED:
            assert (await said(service))[0] not in (401, 403), service
        for token in tokens.values():
            jti = read_chain(token).access.claims.jti
            assert (await gateway.post("/token/revoke", json={"kind": "jti", "value": jti})).status_code == 200

        async def refused() -> bool:
            return all([await said(service) == (401, "token_revoked") for service in ASKED])

        await wait_until(refused, description="every service refuses its token", timeout=1)
        for service in ("judge", "memory"):
            [replica] = installation.replicas[service]
            await replica.kill()
            await replica.start()
            await replica.ready()
            assert await said(service) == (401, "token_revoked")
        [orchestrator] = installation.replicas["orchestrator"]
        await orchestrator.kill()
        await orchestrator.start()
        await orchestrator.ready()
        assert await refused()
