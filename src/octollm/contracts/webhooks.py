"""Webhooks that go out: their configuration, the messages about them, and their operations.

A webhook delivers events of the log to a receiver by Standard Webhooks 1.0: signed, in order per subject, at least once
with the same id.
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.api import Acknowledgement, PageQuery
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.hooks import SecretRotation
from octollm.contracts.subscriptions import EventSelector, Pattern, Patterns, Scalar, SubscriptionSpec
from octollm.contracts.task import Count

WebhookFormat = Literal["octollm", "cloudevents", "cloudevents-binary"]
WebhookState = Literal["active", "disabled"]
DeliveryState = Literal["pending", "delivered", "dead"]

_Text = Annotated[str, Meta(max_length=500)]


class WebhookRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A webhook to create, or what one becomes.

    It delivers the events that a subscription with the same ``patterns``, ``subjects`` and ``data`` would have.
    ``format`` is our envelope, or CloudEvents 1.0, structured or binary.
    """

    url: Annotated[str, Meta(min_length=1, max_length=2048)]
    patterns: Patterns
    subjects: Annotated[tuple[Pattern, ...], Meta(max_length=32)] = ()
    data: Annotated[dict[Pattern, Scalar | tuple[Scalar, ...]], Meta(max_length=16)] = {}
    format: WebhookFormat = "octollm"
    description: _Text = ""
    enabled: bool = True


def event_selector(request: WebhookRequest) -> EventSelector:
    """Return what selects the events of a webhook. Raises ``invalid_body`` for a pattern that matches no event."""
    return EventSelector(SubscriptionSpec(request.patterns, request.subjects, request.data))


class WebhookView(msgspec.Struct, frozen=True):
    """A webhook without its secrets. Times are RFC 3339.

    ``reason`` says why it is disabled. ``failing_since`` is when deliveries began to fail without a success since.
    """

    id: str
    url: str
    patterns: tuple[str, ...]
    subjects: tuple[str, ...]
    data: dict[str, Scalar | tuple[Scalar, ...]]
    format: WebhookFormat
    description: str
    state: WebhookState
    reason: str
    created_by: str
    created_at: str
    secrets: int
    pending: int
    dead: int
    failing_since: str | None = None
    last_delivered_at: str | None = None


class NewWebhook(msgspec.Struct, frozen=True):
    """A created webhook, or one with a new secret. The secret is shown once."""

    webhook: WebhookView
    secret: str


class WebhookList(msgspec.Struct, frozen=True):
    """The webhooks of a tenant, the oldest first."""

    webhooks: tuple[WebhookView, ...]


class WebhookDelivery(msgspec.Struct, frozen=True):
    """One event for one webhook. ``next_at`` is when it is due again; ``last_status`` is 0 without an answer."""

    event_id: str
    event_type: str
    subject: str
    state: DeliveryState
    attempts: int
    created_at: str
    last_status: int = 0
    last_error: str = ""
    next_at: str | None = None
    finished_at: str | None = None


class WebhookDeliveryQuery(PageQuery, frozen=True):
    """A page of deliveries, optionally of one state."""

    state: DeliveryState | msgspec.UnsetType = msgspec.UNSET


class WebhookDeliveryList(msgspec.Struct, frozen=True):
    """A page of deliveries, newest first. ``cursor`` requests the next page; it is ``None`` on the last."""

    deliveries: tuple[WebhookDelivery, ...]
    cursor: str | None = None


class WebhookReplay(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to deliver again, under the same ids.

    Without members: every dead letter. ``event_ids``: these deliveries, whatever their state. ``after``: the events of
    the log after that position which the webhook selects, at most 10,000, and no later ones than there are now.
    """

    event_ids: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=200)] = ()
    after: Count | None = None


class WebhookReplayResult(msgspec.Struct, frozen=True):
    """How many deliveries were queued, and the position of the last event of the log that was looked at."""

    queued: int
    after: int = 0


class WebhookTestResult(msgspec.Struct, frozen=True):
    """What the receiver answered to a test event. ``status`` is 0 without an answer."""

    delivered: bool
    status: int
    error: str
    duration_ms: int


LIST_WEBHOOKS = DeclaredOperation(
    id="webhooks.list",
    method="GET",
    path="/webhooks",
    summary="List webhooks.",
    scope="webhooks:read",
    body=NoneType,
    response=WebhookList,
)
CREATE_WEBHOOK = DeclaredOperation(
    id="webhooks.create",
    method="POST",
    path="/webhooks",
    summary="Create a webhook, which delivers events. Its secret is shown once.",
    scope="webhooks:write",
    kind="at_most_once",
    body=WebhookRequest,
    response=NewWebhook,
    status=201,
    error_codes=("authority_missing", "state_conflict", "url_refused"),
    secret_response=True,
)
READ_WEBHOOK = DeclaredOperation(
    id="webhooks.read",
    method="GET",
    path="/webhooks/{webhook_id}",
    summary="Read a webhook.",
    scope="webhooks:read",
    body=NoneType,
    response=WebhookView,
    error_codes=("not_found",),
)
UPDATE_WEBHOOK = DeclaredOperation(
    id="webhooks.update",
    method="PUT",
    path="/webhooks/{webhook_id}",
    summary="Change a webhook; enable or disable it.",
    scope="webhooks:write",
    kind="idempotent",
    body=WebhookRequest,
    response=WebhookView,
    error_codes=("not_found", "authority_missing", "url_refused"),
)
DELETE_WEBHOOK = DeclaredOperation(
    id="webhooks.delete",
    method="DELETE",
    path="/webhooks/{webhook_id}",
    summary="Delete a webhook with its deliveries.",
    scope="webhooks:write",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("not_found",),
)
ROTATE_WEBHOOK = DeclaredOperation(
    id="webhooks.rotate",
    method="POST",
    path="/webhooks/{webhook_id}/secret",
    summary="Create a new secret for a webhook, which is shown once. Deliveries are signed with both for a while.",
    scope="webhooks:write",
    kind="at_most_once",
    body=SecretRotation,
    response=NewWebhook,
    error_codes=("not_found",),
    secret_response=True,
)
TEST_WEBHOOK = DeclaredOperation(
    id="webhooks.test",
    method="POST",
    path="/webhooks/{webhook_id}/test",
    summary="Deliver a test event now, and print the receiver's response.",
    scope="webhooks:write",
    kind="at_most_once",
    body=NoneType,
    response=WebhookTestResult,
    error_codes=("not_found", "state_conflict"),
)
LIST_WEBHOOK_DELIVERIES = DeclaredOperation(
    id="webhooks.deliveries",
    method="GET",
    path="/webhooks/{webhook_id}/deliveries",
    summary="List the deliveries of a webhook, newest first; `state=dead` lists its dead letters.",
    scope="webhooks:read",
    query=WebhookDeliveryQuery,
    body=NoneType,
    response=WebhookDeliveryList,
    error_codes=("not_found", "invalid_parameter"),
)
REPLAY_WEBHOOK = DeclaredOperation(
    id="webhooks.replay",
    method="POST",
    path="/webhooks/{webhook_id}/replay",
    summary="Deliver dead letters, chosen deliveries, or events of the log again.",
    scope="webhooks:write",
    kind="idempotent",
    body=WebhookReplay,
    response=WebhookReplayResult,
    error_codes=("not_found", "state_conflict"),
)

WEBHOOK_OPERATIONS = (
    LIST_WEBHOOKS,
    CREATE_WEBHOOK,
    READ_WEBHOOK,
    UPDATE_WEBHOOK,
    DELETE_WEBHOOK,
    ROTATE_WEBHOOK,
    TEST_WEBHOOK,
    LIST_WEBHOOK_DELIVERIES,
    REPLAY_WEBHOOK,
)
