"""An arm as a service: its operations, each with a Context, their answers, and the agent card (A2A 1.0)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, is_typeddict

import msgspec

from octollm import __version__
from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.completion import extract_problem
from octollm.arm.context import Context
from octollm.arm.registration import ArmRegistrar
from octollm.arm.validation import EXECUTE
from octollm.contracts.service_operations import route_of
from octollm.contracts.task import ExecuteResult
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.rpc.codec import encode
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.telemetry.otel_bridge import OpenTelemetryBridge

CARD_PATH = "/.well-known/agent-card.json"
BINDING = "urn:octollm:arm"
"""A2A's ``protocolBinding`` is an open string. This one: ``POST <url>/<skill>``, as in ``<url>/openapi.json``."""
_JSON_MODES = ("application/json",)
_PASSED_ON_CODES = (
    "authority_missing",
    "budget_exhausted",
    "model_failed",
    "model_output_filtered",
    "model_output_invalid",
    "model_output_truncated",
    "no_model",
    "step_retry",
    "step_stopped",
)
"""Codes in the description of every operation: failures of its callees, and those that a handler raises."""


@contextlib.asynccontextmanager
async def open_arm(
    arm: Arm[Any], base: ServiceBase, *, readiness_checks: Mapping[str, ReadinessCheck] | None = None
) -> AsyncGenerator[Service]:
    """Open the lifespan of ``arm`` and yield the arm as a service; the state is closed after it has drained.

    Raises ``arm_start_failed`` when the lifespan fails.
    """
    async with arm.open_state() as state:
        yield build_arm(arm, base, readiness_checks=readiness_checks, state=state)


def build_arm(
    arm: Arm[Any],
    base: ServiceBase,
    *,
    readiness_checks: Mapping[str, ReadinessCheck] | None = None,
    state: object = None,
) -> Service:
    """Return ``arm`` as a service, with its ``state`` already open. The orchestrator stores its idempotency keys."""
    delegator = base.identity.delegator(None if base.revocations is None else base.revocations.revocations)
    registrar = ArmRegistrar(arm, base)
    bridge = OpenTelemetryBridge(base.tracer, base.name)

    def to_operation(declared: ArmOperation) -> Operation:
        scopes = (*declared.calls, *declared.optional_calls)

        async def serve(call: IncomingCall, body: Any) -> object:
            context = Context[Any](base, delegator, call, scopes, body, state)
            try:
                with bridge.attached(call.trace):
                    returned = await declared.handler(body, context)
                answer = build_answer(declared, returned, context)
                return await context.artifacts.attach(answer) if isinstance(answer, ExecuteResult) else answer
            except OctoError:
                raise
            except Exception as error:
                # If the author uses another client, its exception wraps the problem document of `models`.
                problem = extract_problem(error)
                if problem is None:
                    raise
                raise problem from error
            finally:
                await context.model.aclose()

        return Operation(
            name=declared.name,
            method="POST",
            path=f"/{declared.name}",
            handler=serve,
            scope=f"{arm.name}:{declared.name}",
            kind=declared.kind,
            claims_key=route_of(arm.name, declared.name).claims_key,
            body=declared.body,
            response=answer_type(declared),
            summary=declared.summary,
            timeout=declared.timeout,
            docs=OperationDocs(error_codes=(*_PASSED_ON_CODES, *declared.codes), example=declared.example),
        )

    async def card(_call: IncomingCall, _body: object) -> AgentCard:
        return build_card(arm, (base.url,))

    card_operation = Operation(
        "card",
        "GET",
        CARD_PATH,
        card,
        auth="public",
        response=AgentCard,
        cacheable=True,
        limited=False,
        max_body=0,
        summary="What this arm is and does.",
    )
    return build_service(
        base,
        [*map(to_operation, arm.operations), card_operation],
        idempotency=base.remote_idempotency_store(),
        readiness_checks={"registration": registrar.checkup, **(readiness_checks or {})},
        lifespan=registrar.keep_registered,
    )


def answer_type(declared: ArmOperation) -> Any:
    """Return the answer type of an operation: ``ExecuteResult`` for ``execute``, otherwise the declared one."""
    return ExecuteResult if declared.name == EXECUTE else declared.answer


def build_answer(declared: ArmOperation, returned: object, ctx: Context[Any]) -> object:
    """Return the answer for the value that a handler returned.

    The value of ``execute`` becomes the ``output``: text unchanged, anything else as JSON. Artifacts and usage are
    added, unless the handler set them. Raises ``TypeError`` if the value is not of the declared class.
    """
    declared_type = declared.answer
    if (
        isinstance(declared_type, type)
        and not is_typeddict(declared_type)
        and not _is_instance(returned, declared_type)
    ):
        raise TypeError(f"{declared.name} declares {declared_type.__name__} and returned {type(returned).__name__}")
    if declared.name != EXECUTE:
        return returned
    if not isinstance(returned, ExecuteResult):
        output = returned if isinstance(returned, str) else encode(returned).decode()
        returned = ExecuteResult(output, artifacts=ctx.artifacts.list())
    if returned.usage.total_tokens == 0:
        returned = msgspec.structs.replace(returned, usage=ctx.model.usage)
    return returned


def _is_instance(value: object, declared_type: type) -> bool:
    return isinstance(value, (int, float) if declared_type is float else declared_type)


class AgentInterface(msgspec.Struct, frozen=True, rename="camel"):
    """The URL of an arm and its protocol."""

    url: str
    protocol_binding: str = BINDING
    protocol_version: str = "1.0"


class AgentSkill(msgspec.Struct, frozen=True, rename="camel"):
    """One operation. ``id`` is its name; the tags include its scope."""

    id: str
    name: str
    description: str
    tags: tuple[str, ...]
    input_modes: tuple[str, ...] = _JSON_MODES
    output_modes: tuple[str, ...] = (*_JSON_MODES, "application/x-ndjson")


class AgentCapabilities(msgspec.Struct, frozen=True, rename="camel"):
    """``streaming``: every operation can also stream its answer as NDJSON."""

    streaming: bool = True
    push_notifications: bool = False


class AgentCard(msgspec.Struct, frozen=True, rename="camel"):
    """``GET /.well-known/agent-card.json``."""

    name: str
    description: str
    version: str
    supported_interfaces: tuple[AgentInterface, ...]
    skills: tuple[AgentSkill, ...]
    security_schemes: dict[str, dict[str, dict[str, str]]]
    security_requirements: tuple[dict[str, dict[str, dict[str, list[str]]]], ...]
    capabilities: AgentCapabilities = AgentCapabilities()
    default_input_modes: tuple[str, ...] = _JSON_MODES
    default_output_modes: tuple[str, ...] = _JSON_MODES


def build_card(arm: Arm[Any], urls: tuple[str, ...]) -> AgentCard:
    """Return the card of ``arm`` with the addresses ``urls``."""
    return AgentCard(
        name=arm.name,
        description=arm.description,
        version=__version__,
        supported_interfaces=tuple(AgentInterface(url) for url in urls),
        skills=tuple(
            AgentSkill(
                declared.name,
                declared.name,
                declared.summary or arm.description,
                (f"{arm.name}:{declared.name}", declared.kind, *arm.accepts),
            )
            for declared in arm.operations
        ),
        security_schemes={"bearer": {"httpAuthSecurityScheme": {"scheme": "Bearer", "bearerFormat": "JWT chain"}}},
        security_requirements=({"schemes": {"bearer": {"list": []}}},),
    )
