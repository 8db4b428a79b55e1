"""The public operations on durable subscriptions and dead letters, declared once."""

from __future__ import annotations

from types import NoneType

from octollm.contracts.api import Acknowledgement
from octollm.contracts.declarations import EVENT_STREAM, DeclaredOperation
from octollm.contracts.subscriptions import (
    AckRequest,
    DeadLetterList,
    DeadLetterQuery,
    DeliveryBatch,
    DeliveryQuery,
    ReplayRequest,
    ReplayResult,
    SubscriptionList,
    SubscriptionRequest,
    SubscriptionView,
)

LIST_SUBSCRIPTIONS = DeclaredOperation(
    id="subscriptions.list",
    method="GET",
    path="/subscriptions",
    summary="List durable subscriptions with their lag and consumers.",
    scope="events:read",
    body=NoneType,
    response=SubscriptionList,
)
READ_SUBSCRIPTION = DeclaredOperation(
    id="subscriptions.read",
    method="GET",
    path="/subscriptions/{name}",
    summary="Read a durable subscription with its lag and consumers.",
    scope="events:read",
    body=NoneType,
    response=SubscriptionView,
    error_codes=("subscription_not_found",),
)
PUT_SUBSCRIPTION = DeclaredOperation(
    id="subscriptions.put",
    method="PUT",
    path="/subscriptions/{name}",
    summary="Create a durable subscription, or change what it selects.",
    scope="events:subscribe:{name}",
    kind="idempotent",
    claims_key=False,
    body=SubscriptionRequest,
    response=SubscriptionView,
    error_codes=("invalid_parameter", "quota_exhausted"),
)
DELETE_SUBSCRIPTION = DeclaredOperation(
    id="subscriptions.delete",
    method="DELETE",
    path="/subscriptions/{name}",
    summary="Delete a durable subscription with its position and dead letters.",
    scope="events:subscribe:{name}",
    kind="idempotent",
    claims_key=False,
    body=NoneType,
    response=Acknowledgement,
    error_codes=("subscription_not_found",),
)
READ_DELIVERIES = DeclaredOperation(
    id="subscriptions.events",
    method="GET",
    path="/subscriptions/{name}/events",
    summary="Poll for deliveries of a durable subscription, or receive them as server-sent events.",
    scope="events:subscribe:{name}",
    query=DeliveryQuery,
    body=NoneType,
    response=DeliveryBatch,
    error_codes=("subscription_not_found", "quota_exhausted"),
    stream_media_type=EVENT_STREAM,
)
ACKNOWLEDGE_DELIVERIES = DeclaredOperation(
    id="subscriptions.ack",
    method="POST",
    path="/subscriptions/{name}/ack",
    summary="Acknowledge deliveries, or report that they failed. It renews the consumer's lease.",
    scope="events:subscribe:{name}",
    kind="idempotent",
    claims_key=False,
    body=AckRequest,
    response=Acknowledgement,
    error_codes=("subscription_not_found", "lease_lost", "ack_out_of_order"),
)
REPLAY_SUBSCRIPTION = DeclaredOperation(
    id="subscriptions.replay",
    method="POST",
    path="/subscriptions/{name}/replay",
    summary="Deliver events again, from a position or a time of the log on.",
    scope="events:subscribe:{name}",
    kind="idempotent",
    claims_key=False,
    body=ReplayRequest,
    response=ReplayResult,
    error_codes=("subscription_not_found",),
)
LIST_DEAD_LETTERS = DeclaredOperation(
    id="dead_letters.list",
    method="GET",
    path="/dead-letters",
    summary="List dead letters, and the events that hold their subject.",
    scope="events:read",
    query=DeadLetterQuery,
    body=NoneType,
    response=DeadLetterList,
    error_codes=("subscription_not_found",),
)
RETRY_DEAD_LETTER = DeclaredOperation(
    id="dead_letters.retry",
    method="POST",
    path="/dead-letters/{letter_id}/retry",
    summary="Deliver a dead letter again.",
    scope="events:subscribe",
    kind="idempotent",
    claims_key=False,
    body=NoneType,
    response=Acknowledgement,
    error_codes=("dead_letter_not_found",),
)
DROP_DEAD_LETTER = DeclaredOperation(
    id="dead_letters.drop",
    method="DELETE",
    path="/dead-letters/{letter_id}",
    summary="Drop a dead letter. A subject that it holds continues with the next event.",
    scope="events:subscribe",
    kind="idempotent",
    claims_key=False,
    body=NoneType,
    response=Acknowledgement,
    error_codes=("dead_letter_not_found",),
)

EVENT_OPERATIONS = (
    LIST_SUBSCRIPTIONS,
    READ_SUBSCRIPTION,
    PUT_SUBSCRIPTION,
    DELETE_SUBSCRIPTION,
    READ_DELIVERIES,
    ACKNOWLEDGE_DELIVERIES,
    REPLAY_SUBSCRIPTION,
    LIST_DEAD_LETTERS,
    RETRY_DEAD_LETTER,
    DROP_DEAD_LETTER,
)
