"""The public API's query parameters and responses: tasks, steps, lists, events."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from octollm.contracts.events import Event
from octollm.contracts.problems import FieldErrorView, Problem
from octollm.contracts.task import Artifact, Budget, Count, Evidence, FileRef, StepStatus, TaskStatus, Usage

LAST_EVENT_ID_DESCRIPTION = "The position of the last event that a reader has: what follows is sent."


class PageQuery(Struct, frozen=True):
    """A page of a list: at most ``limit`` rows, from where the ``cursor`` of the page before points."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: str = ""


class TaskQuery(PageQuery, frozen=True):
    """A page of tasks, of one status where it is named."""

    status: TaskStatus | UnsetType = UNSET


class EventQuery(Struct, frozen=True):
    """At most ``limit`` events behind the position ``after``."""

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200


class AuditQuery(Struct, frozen=True):
    """At most ``limit`` rows behind the row ``after``: of one's tenant, or of the system, which is in none.

    The system's rows are for readers of the tenant that the installation began with.
    """

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200
    of: Literal["tenant", "system"] = "tenant"


class TaskIdQuery(Struct, frozen=True):
    """What belongs to one ``task``."""

    task: Annotated[str, Meta(min_length=1, max_length=128)]


class Acknowledgement(msgspec.Struct, frozen=True):
    """It was done."""

    status: str = "ok"


class TaskFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a task or step ended without a result: a stable ``code`` and the reasons in words."""

    code: str
    detail: str
    reasons: tuple[str, ...] = ()
    errors: tuple[FieldErrorView, ...] = ()


class StepView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A step as its watchers see it."""

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
    """A page of tasks, newest first. ``cursor`` asks for the next page; ``None`` on the last."""

    tasks: tuple[TaskSummary, ...]
    cursor: str | None = None


class EventList(msgspec.Struct, frozen=True):
    """A page of events in order. ``after`` is what to ask the next page with."""

    events: tuple[Event, ...]
    after: int


class StepText(msgspec.Struct, frozen=True):
    """The text that a step has written so far, as saved in SQL.

    ``base`` is the offset of its first code point in all that this attempt and run wrote: what stood before was voided.
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
    """An arm that may be called."""

    name: str
    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    url: str
    registered_at: str
    state: str = "healthy"
    urls: tuple[str, ...] = ()
    """Where each of its processes answers."""


class ArmList(msgspec.Struct, frozen=True):
    """All arms of the tenant."""

    arms: tuple[ArmView, ...]


class TokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /token`` at the public door: a token for direct calls, an ad-hoc task of its own."""

    scope: str
    aud: str
    lifetime_seconds: int = 3600


class TokenResponse(msgspec.Struct, frozen=True):
    """A bearer string and when it ends (seconds). The shape of RFC 6749 section 5.1."""

    access_token: str
    expires_in: int
    scope: str
    task_id: str = ""
    token_type: Literal["Bearer"] = "Bearer"
    issued_token_type: str = "urn:ietf:params:oauth:token-type:access_token"
    tenant: str = ""


class KeyRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /keys``: scopes are presets (``user``, ``admin``) or single scopes, space-separated.

    ``tenant`` is one's own, unless one is of the tenant that the installation began with: that one makes the first
    key of others.
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
    """``POST orchestrator/token``: RFC 8693 token exchange, by reflex with its service token."""

    subject_token: str
    subject_token_type: Literal["urn:octollm:api-key"] = "urn:octollm:api-key"
    grant_type: str = "urn:ietf:params:oauth:grant-type:token-exchange"


def json_null() -> msgspec.Raw:
    """Return JSON's null: a default that a schema generator need not encode."""
    return msgspec.Raw(b"null")


class ReserveRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/budget/reserve`` by models, before a call. Token counts; ``prompt`` is exact or a bound.

    ``token_usd`` is the most that a token of this model costs in US dollars; ``None`` when its price is not known.
    """

    bearer: str
    key: str
    prompt_tokens: Count
    max_completion_tokens: Count | None
    model: str
    token_usd: float | None = None


class ReserveResponse(msgspec.Struct, frozen=True):
    """What was reserved; or, with ``journal``, the answer that this very call was given before."""

    reservation: str
    max_completion_tokens: int
    task: str
    journal: msgspec.Raw = msgspec.field(default_factory=json_null)


class SettleRequest(msgspec.Struct, frozen=True):
    """``POST orchestrator/budget/settle`` by models, after a call. ``answer`` is kept for repeats when whole."""

    reservation: str
    usage: Usage
    answer: msgspec.Raw = msgspec.field(default_factory=json_null)


MAX_CLAIM_BATCH = 1000
"""Claims, or changes of claims, that are sent together."""


class ClaimRequest(msgspec.Struct, frozen=True):
    """A claim of ``POST orchestrator/idempotency/claim`` by any service for a call that it serves."""

    bearer: str
    operation: str
    key: str
    body_digest: str
    repeatable: bool


class ClaimBatch(msgspec.Struct, frozen=True):
    """The body of ``/idempotency/claim``: what came together is claimed together."""

    claims: Annotated[tuple[ClaimRequest, ...], Meta(max_length=MAX_CLAIM_BATCH)]


class ClaimResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a claim ended; ``answer`` is base64 of the stored body, ``headers`` are those that were stored with it.

    A claim that is ``refused`` has the ``problem``: the others of its batch are none the worse for it.
    """

    outcome: Literal["claimed", "stored", "in_flight", "conflict", "unknown", "refused"]
    run: int = 0
    status: int = 0
    answer: bytes = b""
    headers: dict[str, str] = {}
    problem: Problem | None = None


class ClaimResponseBatch(msgspec.Struct, frozen=True):
    """How the claims ended, in their order."""

    answers: tuple[ClaimResponse, ...]


class ClaimUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A claim that is renewed, completed or released, named as it was made."""

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

    ``instance`` names the process among the arm's replicas, and ``url`` is where it answers. ``about`` says in a
    sentence what each operation does. A call that begins with ``?`` is optional. ``calls`` are those of all operations
    together; ``operation_calls`` has the calls of the operations that declare their own.
    """

    description: str
    operations: tuple[str, ...]
    calls: tuple[str, ...]
    accepts: tuple[str, ...]
    url: str
    instance: str = ""
    about: dict[str, str] = {}
    operation_calls: dict[str, tuple[str, ...]] = {}
