"""Messages of a client over ``WS /ws/tasks/{task_id}``: cancel, decide and steer the task that it watches.

Each is the public operation of the same name, with the scopes, the checks and the idempotency of its HTTP request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from octollm.contracts.approvals import ApprovalDecision
from octollm.contracts.steering import ExtendRequest, InstructionRequest, SkipRequest
from octollm.contracts.task_operations import (
    APPROVE_TASK,
    CANCEL_TASK,
    EXTEND_TASK,
    INSTRUCT_TASK,
    PAUSE_TASK,
    RESUME_TASK,
    SKIP_STEP,
)
from octollm.errors import OctoError
from octollm.services.reflex.screening import InputGuardrail
from octollm.services.reflex.upstream import Upstream

MAX_DETAIL = 300
"""Characters of the reason why a message is refused, which may quote it."""
Key = Annotated[str, Meta(pattern=r"^[!-~]{0,200}$")]
"""An idempotency key; empty without one. A message that is sent again with its key takes effect once."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """``{"type": "cancel"}``."""

    key: Key = ""


class Approval(ApprovalDecision, frozen=True, tag="approval"):
    """``{"type": "approval", "decision": "approve", …}`` with the members of the body of the same operation."""

    key: Key = ""


class Pause(msgspec.Struct, frozen=True, tag="pause", forbid_unknown_fields=True):
    """``{"type": "pause"}``."""

    key: Key = ""


class Resume(msgspec.Struct, frozen=True, tag="resume", forbid_unknown_fields=True):
    """``{"type": "resume"}``."""

    key: Key = ""


class Instruct(InstructionRequest, frozen=True, tag="instruct", forbid_unknown_fields=True):
    """``{"type": "instruct", "text": …}``."""

    key: Key = ""


class Skip(SkipRequest, frozen=True, tag="skip", forbid_unknown_fields=True):
    """``{"type": "skip", "step": …}``."""

    key: Key = ""


class Extend(ExtendRequest, frozen=True, tag="extend", forbid_unknown_fields=True):
    """``{"type": "extend", …}`` with at least one new limit."""

    key: Key = ""


ClientMessage = Cancel | Approval | Pause | Resume | Instruct | Skip | Extend


def parse_message(message: object) -> ClientMessage:
    """Return a well-formed message; raise ``invalid_body`` for any other."""
    if not isinstance(message, str):
        raise OctoError("A message is a text frame with one JSON object.", code="invalid_body")
    try:
        parsed = msgspec.json.decode(message.encode(), type=ClientMessage)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise OctoError(str(error)[:MAX_DETAIL], code="invalid_body") from error
    if isinstance(parsed, Extend) and get_body(parsed) == ExtendRequest():
        raise OctoError("Name at least one new limit.", code="invalid_body")
    return parsed


def get_type(message: ClientMessage) -> str:
    """Return the ``type`` of a message."""
    return str(message.__struct_config__.tag)


def get_body(message: ClientMessage) -> ApprovalDecision | InstructionRequest | SkipRequest | ExtendRequest | None:
    """Return the body of the operation that a message stands for."""
    for body in (ApprovalDecision, InstructionRequest, SkipRequest, ExtendRequest):
        if isinstance(message, body):
            return body(**{name: getattr(message, name) for name in body.__struct_fields__})
    return None


_OPERATIONS = {
    Cancel: CANCEL_TASK,
    Approval: APPROVE_TASK,
    Pause: PAUSE_TASK,
    Resume: RESUME_TASK,
    Instruct: INSTRUCT_TASK,
    Skip: SKIP_STEP,
    Extend: EXTEND_TASK,
}


@dataclass(frozen=True, slots=True)
class ClientMessageHandler:
    """Executes messages in the name of whoever sent them."""

    upstream: Upstream
    guardrail: InputGuardrail

    async def handle(self, credential: str, task_id: str, message: ClientMessage) -> None:
        """Execute a message. Raises what its operation raises over HTTP."""
        if isinstance(message, Instruct):
            await self.guardrail.check_instruction(credential, message.text, self.upstream.create_deadline())
        await self.upstream.call(
            credential, _OPERATIONS[type(message)], body=get_body(message), key=message.key or None, task_id=task_id
        )
