"""From an arm to a service: its operations over HTTP, each with a context of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octollm.arm.arm import Arm, ArmOperation
from octollm.arm.context import Context
from octollm.arm.presence import ArmPresence
from octollm.contracts.task import ExecuteResult
from octollm.rpc.call import Call, Operation
from octollm.rpc.health import CheckUp
from octollm.rpc.service import Base, Service, build_service


def build_arm(arm: Arm, base: Base, *, checkups: Mapping[str, CheckUp] | None = None) -> Service:
    """Return ``arm`` as a service. Its idempotency keys are kept with the orchestrator."""
    delegator = base.identity.delegator()
    presence = ArmPresence(arm, base)

    def operation_of(declared: ArmOperation) -> Operation:
        async def serve(call: Call, body: Any) -> Any:
            context = Context(base, delegator, call)
            answer = await declared.handler(body, context)
            if declared.answer is str:
                answer = ExecuteResult(output=answer)
            if isinstance(answer, ExecuteResult) and answer.usage.total_tokens == 0:
                answer = msgspec.structs.replace(answer, usage=context.meter.usage)
            return answer

        return Operation(
            name=declared.name,
            method="POST",
            path=f"/{declared.name}",
            handler=serve,
            scope=f"{arm.name}:{declared.name}",
            kind=declared.kind,
            body=declared.body,
            answer=ExecuteResult if declared.answer is str else declared.answer,
            summary=declared.summary,
            timeout=declared.timeout,
        )

    return build_service(
        base,
        [operation_of(declared) for declared in arm.operations],
        idempotency=base.remote_idempotency(),
        checkups={"registration": presence.checkup, **(checkups or {})},
        presence=presence.registered,
    )
