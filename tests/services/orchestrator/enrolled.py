"""Enrolled arms in a test: they enrol at a real orchestrator over sockets, which finds them by its registry alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec
from orchestrator_kit import OrchestratorHarness

from octollm.arm import Arm, build_arm
from octollm.capability import SigningKey
from octollm.contracts.enrolment import NewEnrolmentToken
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.enrolment import enrol
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import Service, ServiceBase, build_base
from octollm.rpc.transport import listen


@dataclass
class EnrolledArm:
    """An enrolled arm that serves."""

    base: ServiceBase
    service: Service
    url: str
    key: SigningKey


async def create_token(orch: OrchestratorHarness, name: str, *calls: str, seconds: int = 3600) -> NewEnrolmentToken:
    body = {"name": name, "calls": list(calls), "lifetime_seconds": seconds}
    answer = await orch.send("POST", "/joins", body)
    assert answer.status == 201, answer.body
    return msgspec.json.decode(answer.body, type=NewEnrolmentToken)


async def enrol_as(
    orch: OrchestratorHarness, name: str, secret: str, *, key: SigningKey, calls: Any = (), **more: Any
) -> Any:
    harness = orch.harness
    discovery = more.pop("discovery", None) or StaticDiscovery({"orchestrator": (harness.urls["orchestrator"],)})
    return await enrol(
        harness.http,
        discovery,
        harness.clock,
        harness.ids,
        name=name,
        key=key,
        enrolment_token=secret,
        calls=calls,
        **more,
    )


def base_of(
    orch: OrchestratorHarness, name: str, key: SigningKey, roots: Any, url: str = "http://127.0.0.1:9"
) -> ServiceBase:
    harness = orch.harness
    known = {service: (place,) for service, place in harness.urls.items()} | {name: (url,)}
    return build_base(
        ServiceIdentity(name, key, roots, harness.clock, harness.ids),
        harness.http,
        StaticDiscovery(known),
        follow_revocations=False,
    )


@contextlib.asynccontextmanager
async def enrolled(orch: OrchestratorHarness, arm: Arm) -> AsyncGenerator[EnrolledArm]:
    """Have an arm join with a secret for just what it declares, and serve it."""
    made = await create_token(orch, arm.name, *(call.removeprefix("?") for call in arm.calls))
    key = SigningKey.generate(arm.name)
    roots = await enrol_as(orch, arm.name, made.secret, key=key, calls=arm.calls)
    assert roots == orch.harness.roots
    bound = listen("127.0.0.1", 0, arm.name)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    base = base_of(orch, arm.name, key, roots, url)
    service = build_arm(arm, base)
    async with service.serve(bound):
        yield EnrolledArm(base, service, url, key)


def svc(orch: OrchestratorHarness, name: str, key: SigningKey) -> str:
    return ServiceIdentity(name, key, {}, orch.harness.clock, orch.harness.ids).signer().sign_token("orchestrator")


async def as_service(
    orch: OrchestratorHarness, name: str, key: SigningKey, method: str, path: str, body: Any = None
) -> Any:
    return await orch.harness.send("orchestrator", method, path, token=svc(orch, name, key), body=body)
