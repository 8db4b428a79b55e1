"""Every declared operation is served as declared, by its service and the gateway, and nothing else is served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

import msgspec
import pytest
import pytest_asyncio

from octollm.capability import BUILT_IN_CALLS, SigningKey
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import read_settings
from octollm.contracts.declarations import AnyOperation
from octollm.contracts.internal_operations import (
    INTERNAL_OPERATIONS,
    READ_CHANGES,
    READ_EVENT_CHANGES,
    RECORD_REFUSAL,
)
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.service_operations import SERVICE_OPERATIONS, operations_of
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES
from octollm.errors import OctoError
from octollm.llm.selection import ModelChoice
from octollm.rpc.call import Operation, implement
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.openapi import build_openapi
from octollm.rpc.service import Service, ServiceBase, build_app, build_base, build_service
from octollm.services.arms.coder.service import coder_arm
from octollm.services.arms.executor.service import executor_arm
from octollm.services.arms.judge.service import judge_arm
from octollm.services.arms.planner.service import planner_arm
from octollm.services.arms.retriever.service import retriever_arm
from octollm.services.memory.service import memory_service
from octollm.services.models.service import models_service
from octollm.services.monitor.service import monitor_service
from octollm.services.orchestrator.service import orchestrator_service
from octollm.services.reflex import reflex_service
from octollm.storage import MemoryServers, open_redis
from octollm.telemetry import ExportBuffer, Metrics, Tracer

CLOCK = SystemClock()
SETTINGS = read_settings({}, ())
METRICS = Metrics("test")
ARMS = {
    arm.name: arm
    for arm in (
        planner_arm(SETTINGS),
        coder_arm(),
        judge_arm(SETTINGS),
        retriever_arm(SETTINGS),
        executor_arm(lambda: None, None, METRICS, Tracer("test", CLOCK, ExportBuffer())),  # type: ignore[arg-type]
    )
}
IDS = Uuid7Generator(CLOCK)

OF_THE_GATEWAY = (RECORD_REFUSAL, READ_CHANGES, READ_EVENT_CHANGES)
"""What the gateway calls in the name of a caller, and does not forward."""


@dataclass
class Services:
    """The composed services; nothing listens."""

    reflex: Service
    orchestrator: Service
    memory: Service
    models: Service
    monitor: Service


def choose_no_model() -> ModelChoice:
    raise OctoError("No model is needed here.", code="no_model")


def build_test_base(name: str, http: Http1Client) -> ServiceBase:
    identity = ServiceIdentity(name, SigningKey.generate(name), {}, CLOCK, IDS)
    return build_base(identity, http, StaticDiscovery({}), follow_revocations=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    home: Path = tmp_path_factory.mktemp("home")
    settings = read_settings({"OCTOLLM_HOME": str(home)}, tuple(SERVICES))
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client())
        redis = await stack.enter_async_context(open_redis("memory://declared", servers=MemoryServers()))
        root = SigningKey.generate("root")
        orchestrator = orchestrator_service(
            build_test_base("orchestrator", http), settings, redis=redis, root_key=root, service_keys={}, local_key=None
        )
        reflex = reflex_service(
            build_test_base("reflex", http), settings, redis=redis, local_key=None, loopback_only=True
        )
        yield Services(
            await stack.enter_async_context(reflex),
            await stack.enter_async_context(orchestrator),
            await stack.enter_async_context(memory_service(build_test_base("memory", http), settings)),
            await stack.enter_async_context(
                models_service(build_test_base("models", http), settings, choose=choose_no_model)
            ),
            await stack.enter_async_context(monitor_service(build_test_base("monitor", http), settings, redis=redis)),
        )


def described(operation: Operation) -> dict[str, object]:
    return {
        "method": operation.method,
        "kind": operation.kind,
        "query": operation.query,
        "body": operation.body,
        "response": operation.response,
        "status": operation.status,
        "scope": operation.scope,
        "cacheable": operation.cacheable,
        "secret_response": operation.secret_response,
        "max_body": operation.max_body,
        "summary": operation.summary,
        "error_codes": tuple(operation.docs.error_codes),
    }


def as_declared(declared: AnyOperation) -> dict[str, object]:
    return {
        "method": declared.method,
        "kind": declared.kind,
        "query": declared.query,
        "body": None if declared.body is NoneType else declared.body,
        "response": None if declared.response in (NoneType, bytes) else declared.response,
        "status": declared.status,
        "scope": declared.callers or declared.scope,
        "cacheable": declared.cacheable,
        "secret_response": declared.secret_response,
        "max_body": declared.body_limit,
        "summary": declared.summary,
        "error_codes": declared.error_codes,
    }


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("declared", PUBLIC_OPERATIONS, ids=lambda declared: declared.id)
async def test_a_declared_operation_is_served_by_the_gateway_and_done_by_its_service(
    services: Services, declared: AnyOperation
) -> None:
    [public] = [each for each in services.reflex.operations if each.name == declared.id]
    assert public.path == declared.path
    assert described(public) == as_declared(declared)
    assert public.auth == ("public" if declared.anonymous else "gateway")
    if declared.service != "reflex":
        service: Service = getattr(services, declared.service)
        name = declared.id.removeprefix(f"{declared.service}:")
        [inner] = [each for each in service.operations if each.name == name]
        assert inner.path == (declared.service_path or declared.path)
        assert described(inner) == as_declared(declared)
        assert inner.auth == "capability"
        # What the gateway passes on unread is checked by the orchestrator; the other bodies it checks itself.
        assert public.raw == inner.strict


@pytest.mark.asyncio(loop_scope="module")
async def test_whatever_is_public_is_declared(services: Services) -> None:
    assert {each.name for each in services.reflex.operations} == {declared.id for declared in PUBLIC_OPERATIONS}
    # What a caller's token opens at the orchestrator is public, but for what the gateway asks in a caller's name: the
    # record of a refused goal, and the changes of the dashboard stream.
    opened = {each.name for each in services.orchestrator.operations if each.auth == "capability"}
    forwarded = {declared.id for declared in PUBLIC_OPERATIONS if declared.service == "orchestrator"}
    assert opened - forwarded == {each.id for each in OF_THE_GATEWAY}
    assert forwarded <= opened


@pytest.mark.asyncio(loop_scope="module")
async def test_the_orchestrator_serves_services_what_is_declared_and_nothing_else(services: Services) -> None:
    served = {(each.method, each.path): each for each in services.orchestrator.operations}
    public = {(each.method, each.service_path or each.path) for each in PUBLIC_OPERATIONS if each.service != "reflex"}
    declared = {(each.method, each.path): each for each in INTERNAL_OPERATIONS}
    assert served.keys() - public == declared.keys()
    for endpoint, each in declared.items():
        operation = served[endpoint]
        assert operation.name == each.id
        assert described(operation) == as_declared(each)
        assert operation.auth == ("service" if each.callers else "public" if each.anonymous else "capability")
        assert operation.strict == (each in OF_THE_GATEWAY)
        assert not (operation.takes_key and each.callers), "a service token has no subject to claim a key for"


@pytest.mark.asyncio(loop_scope="module")
async def test_openapi_describes_what_is_declared(services: Services) -> None:
    api = build_openapi("reflex", services.reflex.operations)
    assert sum(len(methods) for methods in api["paths"].values()) == len(PUBLIC_OPERATIONS)
    for declared in PUBLIC_OPERATIONS:
        operation = api["paths"][declared.path][declared.method.lower()]
        parameters = {(each["in"], each["name"]) for each in operation["parameters"]}
        assert str(declared.status) in operation["responses"]
        assert operation["summary"] == declared.summary
        assert operation.get("x-scope", "") == declared.scope
        assert {name for place, name in parameters if place == "query"} == set(declared.query_parameters)
        assert {name for place, name in parameters if place == "path"} == set(declared.path_parameters)
        assert (("header", "Idempotency-Key") in parameters) == (declared.kind != "read_only" and declared.claims_key)
        assert ("requestBody" in operation) == (declared.body is not NoneType)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", ["memory", "models", "monitor"])
async def test_a_service_serves_what_is_declared_and_nothing_else(services: Services, name: str) -> None:
    service: Service = getattr(services, name)
    declared = {(each.method, each.service_path or each.path): each for each in operations_of(name)}
    served = {(each.method, each.path): each for each in service.operations}
    assert declared
    assert served.keys() == declared.keys()
    for endpoint, operation in served.items():
        fitted = described(operation)
        expected = as_declared(declared[endpoint])
        # Types that the contracts do not repeat: OpenAI's and those of OTLP.
        for member in ("body", "response"):
            if expected[member] is msgspec.Raw:
                assert fitted[member] is not None
                fitted[member] = msgspec.Raw
        assert fitted == expected, endpoint
        assert operation.name == declared[endpoint].id.removeprefix(f"{name}:")
        assert operation.auth == ("service" if declared[endpoint].callers else "capability")
        # Two versions of the services can run together.
        assert not operation.strict


@pytest.mark.asyncio(loop_scope="module")
async def test_an_operation_that_is_registered_twice_is_refused(services: Services) -> None:
    async def handle(_call: object, _body: object) -> object:
        return None

    base = services.reflex.base
    [declared] = [each for each in PUBLIC_OPERATIONS if each.id == "keys.list"]
    operation = implement(declared, handle, auth="gateway")
    renamed = replace(operation, name="keys.show")
    moved = replace(operation, path="/other")
    build_service(base, [operation])
    for second in (renamed, moved):
        with pytest.raises(ValueError, match="is declared twice"):
            build_service(base, [operation, second])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_secret_is_not_stored_in_the_clear(services: Services) -> None:
    async def handle(_call: object, _body: object) -> object:
        return None

    [declared] = [each for each in PUBLIC_OPERATIONS if each.id == "keys.create"]
    context = services.orchestrator.context
    assert context.response_cipher is not None
    with pytest.raises(ValueError, match="nothing would encrypt it"):
        build_app(replace(context, response_cipher=None), [implement(declared, handle)])


@pytest.mark.parametrize("arm", BUILT_IN_ARMS)
def test_a_built_in_arm_serves_what_is_declared(arm: str) -> None:
    served = {f"{arm}:{each.name}": each for each in ARMS[arm].operations}
    declared = {each.id: each for each in operations_of(arm)}
    assert served.keys() == declared.keys()
    for scope, operation in served.items():
        assert operation.kind == declared[scope].kind
        if declared[scope].body is not msgspec.Raw:
            assert operation.body is declared[scope].body
            assert operation.answer is declared[scope].response
    assert set(ARMS[arm].calls) == {call.scope for scope in declared for call in BUILT_IN_CALLS[scope]}


def test_the_root_grants_the_declared_calls() -> None:
    for declared in SERVICE_OPERATIONS:
        calls = tuple(f"?{call.scope}" if call.optional else call.scope for call in BUILT_IN_CALLS[declared.id])
        assert calls == declared.calls
