"""From an arm to a service: its operations over HTTP, each with a context of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octollm.arm.answers import answer_type, build_answer
from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.card import CARD_PATH, AgentCard, build_card
from octollm.arm.context import Context
from octollm.arm.foreign import extract_problem
from octollm.arm.presence import ArmRegistrar
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.service import Service, ServiceBase, build_service

_PASSED_ON_CODES = ("authority_missing", "budget_exhausted", "model_failed", "model_output_invalid", "no_model")
"""What an arm may pass on of what it calls."""


def build_arm(arm: Arm, base: ServiceBase, *, checkups: Mapping[str, ReadinessCheck] | None = None) -> Service:
    """Return ``arm`` as a service. Its idempotency keys are kept with the orchestrator."""
    delegator = base.identity.delegator()
    presence = ArmRegistrar(arm, base)

    def operation_of(declared: ArmOperation) -> Operation:
        async def serve(call: IncomingCall, body: Any) -> object:
            context = Context(base, delegator, call, (*arm.required_scopes, *arm.optional_scopes), body)
            try:
                return build_answer(declared, await declared.handler(body, context), context)
            except OctoError:
                raise
            except Exception as error:
                told = extract_problem(error)
                if told is None:
                    raise
                raise told from error
            finally:
                await context.model.aclose()

        return Operation(
            name=declared.name,
            method="POST",
            path=f"/{declared.name}",
            handler=serve,
            scope=f"{arm.name}:{declared.name}",
            kind=declared.kind,
            body=declared.body,
            response=answer_type(declared),
            summary=declared.summary,
            timeout=declared.timeout,
            docs=OperationDocs(error_codes=(*_PASSED_ON_CODES, *declared.codes), example=declared.example),
        )

    async def card(_call: IncomingCall, _body: object) -> AgentCard:
        return build_card(arm, (base.url,))

    described = Operation(
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
        [*map(operation_of, arm.operations), described],
        idempotency=base.remote_idempotency_store(),
        readiness_checks={"registration": presence.checkup, **(checkups or {})},
        lifespan=presence.keep_registered,
    )
