"""The public API's query parameters and responses: tasks, steps, lists, events."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from octollm.contracts.events import Event
from octollm.contracts.problems import FieldErrorView, Problem
from octollm.contracts.task import Artifact, Budget, Count, Evidence, FileRef, StepStatus, TaskStatus, Usage

LAST_EVENT_ID_DESCRIPTION = "The position of the last event received; the stream continues after it."


class PageQuery(Struct, frozen=True):
    """A page of a list: at most ``limit`` rows, starting at the ``cursor`` of the previous page."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: str = ""


class TaskQuery(PageQuery, frozen=True):
    """A page of tasks, optionally of one status."""

    status: TaskStatus | UnsetType = UNSET


class EventQuery(Struct, frozen=True):
    """At most ``limit`` events after the position ``after``."""

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200


class AuditQuery(Struct, frozen=True):
    """At most ``limit`` rows after the row ``after``, of the caller's tenant or of the system.

    Only the installation's first tenant reads the system's rows, which belong to no tenant.
    """

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200
    of: Literal["tenant", "system"] = "tenant"


class TaskIdQuery(Struct, frozen=True):
    """Selects what belongs to one ``task``."""

    task: Annotated[str, Meta(min_length=1, max_length=128)]


class Acknowledgement(msgspec.Struct, frozen=True):
    """Confirms an operation that has no other response."""

    status: str = "ok"


class TaskFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a task or step ended without a result: a stable ``code``, and the reasons in words."""

    code: str
    detail: str
    reasons: tuple[str, ...] = ()
    errors: tuple[FieldErrorView, ...] = ()


class StepView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A step as its owner sees it."""

    step: str
    title: str
    arm: str
    status: StepStatus
    attempt: int
    depends_on: tuple[str, ...] = ()
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    evidence: Evidence | None = None
    usage: Usage = Usage()
    reasons: tuple[str, ...] = ()
    started_at: str | None = None
    finished_at: str | None = None


class TaskView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A task as its owner sees it. ``version`` counts its events; ``progress`` is from 0 to 100."""

    task_id: str
    status: TaskStatus
    goal: str
    progress: float
    version: int
    created_at: str
    updated_at: str
    started_at: str | None = None
    finished_at: str | None = None
    deadline: str | None = None
    budget: Budget = Budget()
    files: tuple[FileRef, ...] = ()
    steps: tuple[StepView, ...] = ()
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    error: TaskFailure | None = None
    correlation_id: str = ""
    trace_id: str = ""
    model: str = ""


class TaskSummary(msgspec.Struct, frozen=True):
    """A task in a list."""

    task_id: str
    status: TaskStatus
    goal: str
    progress: float
    created_at: str
    updated_at: str


class TaskList(msgspec.Struct, frozen=True):
    """A page of tasks, newest first. ``cursor`` requests the next page; it is ``None`` on the last."""

    tasks: tuple[TaskSummary, ...]
    cursor: str | None = None


class EventList(msgspec.Struct, frozen=True):
    """A page of events in order. ``after`` requests the next page."""

    events: tuple[Event, ...]
    after: int


class StepText(msgspec.Struct, frozen=True):
    """The text that a step has written so far, as saved in SQL.

    ``base`` is the offset of its first code point in the text of this attempt and run; the text before it is void.
    """

    step: str
    attempt: int
    run: int
    text: str
    base: int = 0


class StepTexts(msgspec.Struct, frozen=True):
    """The texts of a task's steps."""

    texts: tuple[StepText, ...]


class ArmView(msgspec.Struct, frozen=True):
    """A registered arm."""

    name: str
    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    url: str
    registered_at: str
    state: str = "healthy"
    urls: tuple[str, ...] = ()
    """The URL of each of its processes."""


class ArmList(msgspec.Struct, frozen=True):
    """All arms of the tenant."""

    arms: tuple[ArmView, ...]


class TokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /token`` at the gateway: a token for direct calls, which belong to an ad-hoc task of their own."""

    scope: str
    aud: str
    lifetime_seconds: int = 3600


class TokenResponse(msgspec.Struct, frozen=True):
    """An access token and its lifetime in seconds, in the form of RFC 6749 section 5.1."""

    access_token: str
    expires_in: int
    scope: str
    task_id: str = ""
    token_type: Literal["Bearer"] = "Bearer"
    issued_token_type: str = "urn:ietf:params:oauth:token-type:access_token"
    tenant: str = ""


class KeyRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /keys``: ``scope`` has presets (``user``, ``admin``) and scopes, separated by spaces.

    ``tenant`` defaults to the caller's own. Only the installation's first tenant creates keys of other tenants.
    """

    name: str
    scope: str = "user"
    tenant: Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z")] | None = None


class KeyView(msgspec.Struct, frozen=True):
    """An API key without its secret."""

    id: str
    name: str
    tenant: str
    scope: str
    created_at: str
    revoked_at: str | None = None
    last_used_at: str | None = None


class NewKey(msgspec.Struct, frozen=True):
    """A new API key: ``secret`` is shown once."""

    key: KeyView
    secret: str


class KeyList(msgspec.Struct, frozen=True):
    """All API keys of the tenant."""

    keys: tuple[KeyView, ...]


class TokenExchangeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST orchestrator/token``: RFC 8693 token exchange, by the gateway with its service token."""

    subject_token: str
    subject_token_type: Literal["urn:octollm:api-key"] = "urn:octollm:api-key"
    grant_type: str = "urn:ietf:params:oauth:grant-type:token-exchange"


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


class ClaimUpdateBatch(msgspec.Struct, frozen=True):
    """The body of ``/idempotency/renew``, ``…/complete`` and ``…/release``."""

    updates: Annotated[tuple[ClaimUpdate, ...], Meta(max_length=MAX_CLAIM_BATCH)]


class ArmRegistration(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST orchestrator/arms/register`` by an arm at its start; its name is that of its service token.

    ``instance`` names the process among the arm's replicas, and ``url`` is its address. ``about`` describes each
    operation in a sentence. A call that begins with ``?`` is optional. ``calls`` are those of all operations together;
    ``operation_calls`` has the calls of the operations that declare their own.
    """

    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    accepts: tuple[str, ...]
    url: str
    instance: str = ""
    about: dict[str, str] = {}
    operation_calls: dict[str, tuple[str, ...]] = {}
