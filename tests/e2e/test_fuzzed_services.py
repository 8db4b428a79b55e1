"""Every service, fuzzed by schemathesis against its own description: no crash, and no answer outside its schema."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from databases import Backend
from scripts import default_reply

from octollm.capability import Principal, RootMinter, ServiceTokenSigner
from octollm.clock import SystemClock, Uuid7Generator
from octollm.concurrency import BackgroundLoop
from octollm.contracts.public_api import PUBLIC_OPERATIONS, WATCH_DASHBOARD
from octollm.contracts.services import SERVICES
from octollm.installation.embedded import Installation
from octollm.installation.keys import load_home_keys

pytestmark = [pytest.mark.sandbox, pytest.mark.postgres]

EXAMPLES = os.environ.get("OCTOLLM_TEST_FUZZ_EXAMPLES", "5")
"""Cases for each operation, besides those that follow from the schema's bounds."""
SEED = os.environ.get("OCTOLLM_TEST_FUZZ_SEED", "1")
CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)
SCOPES = {
    "memory": "memory:read memory:write",
    "models": "models:chat",
    "planner": "planner:plan planner:execute",
    "executor": "executor:run executor:execute executor:http",
    "coder": "coder:execute",
    "judge": "judge:validate judge:accept judge:execute",
    "retriever": "retriever:search retriever:execute",
}


SHARED = ("/health", "/metrics", "/docs", "/.well-known/jwks.json")
"""The same code and the same kind of answer for every service: one is asked for all."""


@pytest.fixture
def environment(postgres: Backend) -> dict[str, str]:
    """PostgreSQL is stricter than SQLite: it has no NUL in texts, and its numbers have bounds."""
    return {**postgres.environment, "OCTOLLM_RATE_LIMIT": "100000/minute"}


HOOKS = """
from pathlib import Path
import schemathesis

@schemathesis.auth(refresh_interval=None)
class BearerToken:
    def get(self, case, context):
        return Path({token!r}).read_text()

    def set(self, case, data, context):
        case.headers = {{**(case.headers or {{}}), "Authorization": f"Bearer {{data}}"}}
"""
RENEW_SECONDS = 10.0
"""A service's token is valid for a minute."""
PROGRAMS = '{"programs": [{"title": "Add", "program": "print(1 + 1)"}]}'


@pytest.fixture(autouse=True)
def planner_writes_programs(script) -> None:
    script.reply = lambda asked: PROGRAMS if "programs" in str(asked.schema) else default_reply(asked)


def signer(system: Installation, name: str) -> ServiceTokenSigner:
    return ServiceTokenSigner(load_home_keys(system.home, IDS).services[name], name, CLOCK, IDS)


async def bearer(system: Installation, name: str, client: httpx.AsyncClient) -> str:
    """Return what opens every operation of a service that a user may call."""
    if name == "monitor":
        # No user is given one: the orchestrator asks in its own way.
        root = load_home_keys(system.home, IDS).root
        return RootMinter(root, CLOCK, IDS).mint_access(Principal("local", "local", "local"), name, "monitor:read", 600)
    if name == "reflex":
        return system.local_key
    if name == "orchestrator":
        own = {"Authorization": f"Bearer {signer(system, 'reflex').sign_token(name)}"}
        asked = {"subject_token": system.local_key}
        answer = await client.post(system.urls[name] + "/token", json=asked, headers=own)
    else:
        answer = await client.post(system.gateway_url + "/token", json={"scope": SCOPES[name], "aud": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def limit_wait(parameter: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter; that of a long poll is short, and always sent, so that no case waits for half a minute."""
    if parameter["name"] != "wait":
        return parameter
    return {**parameter, "required": True, "schema": {"type": "number", "minimum": 0, "maximum": 0.1}}


def part(api: dict[str, Any], *, of_services: bool) -> dict[str, Any]:
    """Return the operations that a service opens by its own token, or the others; with no status but those named."""
    paths: dict[str, Any] = {}
    for path, methods in api["paths"].items():
        for method, op in methods.items():
            if (op["security"] == [{"service": []}]) == of_services:
                responses = {status: answer for status, answer in op["responses"].items() if status != "default"}
                # A call that gives itself a millisecond is answered 504, as it should be.
                parameters = [limit_wait(one) for one in op["parameters"] if one["name"] != "X-Timeout-Ms"]
                paths.setdefault(path, {})[method] = {**op, "responses": responses, "parameters": parameters}
    return {**api, "paths": paths}


async def fuzz(api: dict[str, Any], url: str, create_token: Callable[[], str], folder: Path) -> None:
    """Run schemathesis once over all operations; it reads the token, which is renewed, from a file."""
    described, token, hooks = folder / "openapi.json", folder / "token", folder / "fuzz_hooks.py"
    described.write_text(json.dumps(api))
    token.write_text(create_token())
    hooks.write_text(HOOKS.format(token=str(token)))
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", str(described), "--url", url),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES),
        *("--seed", SEED, "--request-timeout", "20", "--warnings", "off", "--continue-on-failure", "--no-color"),
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": hooks.stem, "PYTHONPATH": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )

    async def renew_token() -> None:
        new = token.with_suffix(".new")
        new.write_text(create_token())
        new.replace(token)

    try:
        async with BackgroundLoop("token", renew_token, interval=RENEW_SECONDS):
            output, _ = await asyncio.wait_for(process.communicate(), 900)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output.decode()[-6000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(SERVICES))
async def test_a_service_answers_as_it_is_described(gateway, name: str, tmp_path: Path) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        api = (await client.get(gateway.system.urls[name] + "/openapi.json")).json()
        token = await bearer(gateway.system, name, client)
    for path in SHARED if name != "judge" else ():
        del api["paths"][path]
    if name == "reflex":
        # What the gateway forwards is fuzzed at the service that does it. Here each of its cases without a valid
        # credential would be delayed by two seconds.
        own = {public.path for public in PUBLIC_OPERATIONS if public.service == "reflex"}
        # A stream without end is no case of a fuzzer.
        own.remove(WATCH_DASHBOARD.path)
        for path in {public.path for public in PUBLIC_OPERATIONS} - own:
            api["paths"].pop(path, None)
    await fuzz(part(api, of_services=False), gateway.system.urls[name], lambda: token, tmp_path)


@pytest.mark.parametrize("name", ["orchestrator", "monitor"])
async def test_what_services_ask_of_each_other_is_answered_as_described(gateway, name: str, tmp_path: Path) -> None:
    async with httpx.AsyncClient() as client:
        api = (await client.get(gateway.system.urls[name] + "/openapi.json")).json()
    own = signer(gateway.system, "models")
    await fuzz(part(api, of_services=True), gateway.system.urls[name], lambda: own.sign_token(name), tmp_path)
