"""From an arm to a service: its operations over HTTP, each with a context of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octollm.arm.answers import answer_of, answer_type
from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.card import CARD_PATH, AgentCard, card_of
from octollm.arm.context import Context
from octollm.arm.foreign import problem_in
from octollm.arm.presence import ArmPresence
from octollm.errors import OctoError
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.health import CheckUp
from octollm.rpc.service import Base, Service, build_service

_CODES = ("authority_missing", "budget_exhausted", "model_failed", "model_output_invalid", "no_model")
"""What an arm may pass on of what it calls."""


def build_arm(arm: Arm, base: Base, *, checkups: Mapping[str, CheckUp] | None = None) -> Service:
    """Return ``arm`` as a service. Its idempotency keys are kept with the orchestrator."""
    delegator = base.identity.delegator()
    presence = ArmPresence(arm, base)

    def operation_of(declared: ArmOperation) -> Operation:
        async def serve(call: Call, body: Any) -> object:
            context = Context(base, delegator, call, (*arm.needed, *arm.optional), body)
            try:
                return answer_of(declared, await declared.handler(body, context), context)
            except OctoError:
                raise
            except Exception as error:
                told = problem_in(error)
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
            answer=answer_type(declared),
            summary=declared.summary,
            timeout=declared.timeout,
            about=About(codes=(*_CODES, *declared.codes), example=declared.example),
        )

    async def card(_call: Call, _body: object) -> AgentCard:
        return card_of(arm, (base.url,))

    described = Operation(
        "card",
        "GET",
        CARD_PATH,
        card,
        auth="public",
        answer=AgentCard,
        cacheable=True,
        limited=False,
        max_body=0,
        summary="What this arm is and does.",
    )
    return build_service(
        base,
        [*map(operation_of, arm.operations), described],
        idempotency=base.remote_idempotency(),
        checkups={"registration": presence.checkup, **(checkups or {})},
        presence=presence.registered,
    )
