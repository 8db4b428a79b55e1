"""Messages between services: budget reservations of model calls, idempotency claims and audit records."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.problems import Problem
from octollm.contracts.task import Count, Usage


def json_null() -> msgspec.Raw:
    """Return JSON's null, as a default that a schema generator need not encode."""
    return msgspec.Raw(b"null")


class ReserveRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/budget/reserve`` by models, before a call. ``prompt_tokens`` is exact or an upper bound.

    ``token_usd`` is the highest price of a token of this model in US dollars; ``None`` for an unknown price.
    """

    bearer: str
    key: str
    prompt_tokens: Count
    max_completion_tokens: Count | None
    model: str
    token_usd: float | None = None


class ReserveResponse(msgspec.Struct, frozen=True):
    """The reservation; or, in ``journal``, the response that this very call got before."""

    reservation: str
    max_completion_tokens: int
    task: str
    journal: msgspec.Raw = msgspec.field(default_factory=json_null)


class SettleRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/budget/settle`` by models, after a call. A whole ``answer`` is stored for repeats."""

    reservation: str
    usage: Usage
    answer: msgspec.Raw = msgspec.field(default_factory=json_null)


class AuditEntry(msgspec.Struct, frozen=True):
    """``POST orchestrator/audit/records`` by the memory: what a caller, who is known by its ``bearer``, does there."""

    bearer: str
    action: Annotated[str, Meta(pattern=r"\Amemory\.[a-z_]{1,40}\Z")]
    target: Annotated[str, Meta(max_length=255)]
    detail: dict[str, str | int] = {}
    request_id: Annotated[str, Meta(max_length=128)] = ""
    correlation_id: Annotated[str, Meta(max_length=128)] = ""


MAX_CLAIM_BATCH = 1000
"""Claims, or updates of claims, in one request."""


class ClaimRequest(msgspec.Struct, frozen=True):
    """A claim of ``POST orchestrator/idempotency/claim``, by a service for a call that it serves."""

    bearer: str
    operation: str
    key: str
    body_digest: str
    repeatable: bool


class ClaimBatch(msgspec.Struct, frozen=True):
    """The body of ``/idempotency/claim``: claims of concurrent calls, made together."""

    claims: Annotated[tuple[ClaimRequest, ...], Meta(max_length=MAX_CLAIM_BATCH)]


class ClaimResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome of a claim; ``answer`` is the stored body in base64, with its stored ``headers``.

    A ``refused`` claim has a ``problem``; it does not affect the others of its batch.
    """

    outcome: Literal["claimed", "stored", "in_flight", "conflict", "unknown", "refused"]
    run: int = 0
    status: int = 0
    answer: bytes = b""
    headers: dict[str, str] = {}
    problem: Problem | None = None


class ClaimResponseBatch(msgspec.Struct, frozen=True):
    """The outcomes of the claims, in their order."""

    answers: tuple[ClaimResponse, ...]


class ClaimUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A claim to renew, complete or release, identified as it was made."""

    tenant: str
    subject: str
    operation: str
    key: str
    run: Count
    status: Annotated[int, Meta(ge=0, le=599)] = 0
    answer: bytes = b""
    headers: dict[str, str] = {}
    repeatable: bool = False


class ClaimUpdateBatch(msgspec.Struct, frozen=True):
    """The body of ``/idempotency/renew``, ``…/complete`` and ``…/release``."""

    updates: Annotated[tuple[ClaimUpdate, ...], Meta(max_length=MAX_CLAIM_BATCH)]
