"""Webhooks that come in: their configuration, the messages about them, and their operations.

A hook turns a delivery of another system into a task: its signature is verified, and a declared template maps its
payload to a goal.
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.api import Acknowledgement
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.screening import ScreeningRecord
from octollm.contracts.task import Budget

SignatureScheme = Literal["standard", "github", "stripe", "hmac"]

MAX_HOOK_BODY = 1024 * 1024
"""Bytes of a delivery."""
MAX_VALUES = 16
"""Values that a template may take from a payload."""
MAX_OVERLAP_SECONDS = 7 * 24 * 3600

_Name = Annotated[str, Meta(pattern=r"\A[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?\Z")]
_HeaderName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9-]{0,64}\Z")]
JsonPointer = Annotated[str, Meta(pattern=r"\A(?:/(?:[^~/\x00-\x1f]|~[01]){0,128}){0,16}\Z", max_length=512)]
"""RFC 6901. The empty pointer is the whole payload."""
_ValueName = Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9_]{0,31}\Z")]
_Text = Annotated[str, Meta(max_length=1000)]
Secret = Annotated[str, Meta(min_length=16, max_length=256, pattern=r"\A[!-~]+\Z")]


class HmacSignature(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the scheme ``hmac`` finds a signature, and over what it is.

    It covers the body, or ``timestamp.body`` where ``timestamp_header`` names a header with the time in epoch seconds.
    The sender's id is in ``id_header`` or at ``id_pointer``; without either it is the digest of the signed bytes.
    """

    header: _HeaderName = "X-Signature"
    algorithm: Literal["sha256", "sha512"] = "sha256"
    encoding: Literal["hex", "base64"] = "hex"
    prefix: Annotated[str, Meta(pattern=r"\A[!-~]{0,32}\Z")] = ""
    timestamp_header: _HeaderName = ""
    id_header: _HeaderName = ""
    id_pointer: JsonPointer = ""


class HookTemplate(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a payload becomes a task.

    ``goal`` has ``{names}`` of ``values``, each a JSON Pointer into the payload. What they put in is marked as data and
    shortened. ``when`` restricts the hook to payloads whose value at a pointer is one of those listed; the others are
    ignored. With ``attach_payload`` the task also has the payload as the file ``payload.json``.
    """

    goal: Annotated[str, Meta(min_length=1, max_length=8000)]
    values: Annotated[dict[_ValueName, JsonPointer], Meta(max_length=MAX_VALUES)] = {}
    when: Annotated[
        dict[JsonPointer, Annotated[tuple[_Text | int | bool | None, ...], Meta(min_length=1, max_length=32)]],
        Meta(max_length=MAX_VALUES),
    ] = {}
    attach_payload: bool = False
    constraints: Annotated[tuple[_Text, ...], Meta(max_length=32)] = ()
    acceptance_criteria: Annotated[tuple[_Text, ...], Meta(max_length=32)] = ()
    budget: Budget = Budget()
    assigned_arm: Annotated[str, Meta(max_length=64)] | None = None


class HookRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /hooks``: a hook to create.

    ``secret`` is the sender's where the sender makes it (Stripe); otherwise one is made. ``scope`` narrows what its
    tasks may use: scopes within the creator's own, separated by spaces; empty means all of these.
    """

    name: _Name
    scheme: SignatureScheme
    template: HookTemplate
    secret: Secret | None = None
    signature: HmacSignature = HmacSignature()
    tolerance_seconds: Annotated[int, Meta(ge=10, le=3600)] = 300
    """How far a delivery's time may be from ours, in the schemes that sign a time."""
    scope: Annotated[str, Meta(max_length=4000)] = ""


class HookView(msgspec.Struct, frozen=True):
    """A hook without its secrets. Senders post to ``path``, which holds its id. Times are RFC 3339."""

    id: str
    name: str
    path: str
    scheme: SignatureScheme
    template: HookTemplate
    signature: HmacSignature
    tolerance_seconds: int
    scope: str
    created_by: str
    created_at: str
    secrets: int
    """How many secrets are accepted now: two during a rotation."""
    last_received_at: str | None = None


class NewHook(msgspec.Struct, frozen=True):
    """A created hook, or one with a new secret. The secret is shown once."""

    hook: HookView
    secret: str


class HookList(msgspec.Struct, frozen=True):
    """The hooks of a tenant, the oldest first."""

    hooks: tuple[HookView, ...]


class SecretRotation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A new secret, or the sender's own. The former one stays valid for ``overlap_seconds``; 0 ends it at once."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=MAX_OVERLAP_SECONDS)] = 24 * 3600
    secret: Secret | None = None


class HookReceipt(msgspec.Struct, frozen=True):
    """What became of a delivery: the task that it started, the one that it had started before, or nothing."""

    status: Literal["accepted", "duplicate", "ignored"]
    task_id: str = ""


class HookDelivery(msgspec.Struct, frozen=True):
    """A delivery as the gateway hands it over. ``refused`` is why the input guardrail would refuse its texts."""

    headers: dict[str, str]
    body: bytes
    screening: ScreeningRecord | None = None
    refused: str = ""


RECEIVE_HOOK = DeclaredOperation(
    id="hooks.receive",
    method="POST",
    path="/hooks/{hook}",
    summary="Deliver a webhook. Its signature authenticates the sender.",
    service="reflex",
    kind="idempotent",
    claims_key=False,
    body=bytes,
    response=HookReceipt,
    status=202,
    error_codes=("signature_invalid", "invalid_json", "invalid_body", "goal_refused", "goal_invalid", "rate_limited"),
    max_body=MAX_HOOK_BODY,
    starts_trace=True,
    anonymous=True,
)
CREATE_HOOK = DeclaredOperation(
    id="hooks.create",
    method="POST",
    path="/hooks",
    summary="Create a hook, which starts tasks from deliveries of another system. Its secret is shown once.",
    scope="webhooks:write",
    kind="at_most_once",
    body=HookRequest,
    response=NewHook,
    status=201,
    error_codes=("authority_missing", "scope_missing", "state_conflict"),
    secret_response=True,
)
LIST_HOOKS = DeclaredOperation(
    id="hooks.list",
    method="GET",
    path="/hooks",
    summary="List hooks.",
    scope="webhooks:read",
    body=NoneType,
    response=HookList,
)
READ_HOOK = DeclaredOperation(
    id="hooks.read",
    method="GET",
    path="/hooks/{hook}",
    summary="Read a hook.",
    scope="webhooks:read",
    body=NoneType,
    response=HookView,
    error_codes=("not_found",),
)
DELETE_HOOK = DeclaredOperation(
    id="hooks.delete",
    method="DELETE",
    path="/hooks/{hook}",
    summary="Delete a hook. Tasks that it started continue.",
    scope="webhooks:write",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("not_found",),
)
ROTATE_HOOK = DeclaredOperation(
    id="hooks.rotate",
    method="POST",
    path="/hooks/{hook}/secret",
    summary="Create a new secret for a hook, which is shown once. The previous one stays valid for a while.",
    scope="webhooks:write",
    kind="at_most_once",
    body=SecretRotation,
    response=NewHook,
    error_codes=("not_found",),
    secret_response=True,
)

HOOK_OPERATIONS = (RECEIVE_HOOK, CREATE_HOOK, LIST_HOOKS, READ_HOOK, DELETE_HOOK, ROTATE_HOOK)
