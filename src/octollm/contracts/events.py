"""The event envelope and the catalogue of event types.

The envelope has the members of the ADR, and those that make delivery reliable: ``id``, ``seq``, ``prev``, ``version``.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from octollm.contracts.task import Count


class Event(msgspec.Struct, frozen=True, omit_defaults=False):
    """One event on the wire. ``data`` has at least the members that its type requires.

    ``seq`` is the position in the log, ``prev`` the ``seq`` of the preceding event on the same channel (0: none), and
    ``version`` counts the events of ``subject`` without gaps. All three are 0 for an event that is not durable.
    """

    event_type: str
    timestamp: str
    source: str
    data: dict[str, object]
    id: str
    tenant: str
    subject: str
    seq: Count = 0
    prev: Count = 0
    version: Count = 0
    correlation_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class EventType:
    """A declared event: ``required`` names the members that ``data`` must have."""

    name: str
    durable: bool
    meaning: str
    required: tuple[str, ...] = ()


def channel_of(event_type: str) -> str:
    """Return the Redis channel of an event type: ``task.completed`` → ``events:task:completed``."""
    entity, _, action = event_type.partition(".")
    return f"events:{entity}:{action}"


_EVENT_TYPES = (
    EventType("task.accepted", True, "A task was stored.", ("task_id", "goal")),
    EventType("task.planned", True, "A plan was made.", ("task_id", "steps")),
    EventType("task.replanned", True, "A new plan replaced one that failed.", ("task_id", "steps", "reasons")),
    EventType("task.started", True, "The first step begins.", ("task_id",)),
    EventType("task.progress", True, "The task made progress.", ("task_id", "progress")),
    EventType("task.waiting", True, "The task waits for a person.", ("task_id", "reason")),
    EventType("task.approved", True, "A person approved the task.", ("task_id",)),
    EventType("task.completed", True, "The task ended with a result.", ("task_id", "status", "duration_ms")),
    EventType("task.failed", True, "The task ended without a result.", ("task_id", "status", "code", "reason")),
    EventType("task.cancelled", True, "The task was cancelled.", ("task_id", "status")),
    EventType("step.started", True, "An attempt of a step begins.", ("task_id", "step", "arm", "attempt")),
    EventType("step.completed", True, "A step's result was accepted.", ("task_id", "step", "attempt", "text_length")),
    EventType(
        "step.failed",
        True,
        "An attempt of a step failed.",
        ("task_id", "step", "attempt", "reasons", "final"),
    ),
    EventType("arm.registered", True, "An arm may be called.", ("arm",)),
    EventType("arm.healthy", True, "An arm answers again.", ("arm",)),
    EventType("arm.unhealthy", True, "An arm does not answer.", ("arm",)),
    EventType("arm.removed", True, "An arm may no longer be called.", ("arm",)),
    EventType("system.started", True, "A service is up.", ("service",)),
    EventType("system.degraded", True, "A service works without one of its dependencies.", ("service", "reason")),
    EventType("system.drained", True, "A service shut down gracefully.", ("service",)),
    EventType("audit.recorded", True, "An audit row was written.", ("action",)),
    EventType("cache.invalidated", False, "A cached value is stale.", ("key",)),
    EventType("token.revoked", True, "Tokens were revoked.", ("kind", "value", "at")),
    EventType("breaker.opened", False, "The circuit breaker of an instance opened.", ("service", "instance")),
    EventType("breaker.closed", False, "The circuit breaker of an instance closed.", ("service", "instance")),
    EventType("webhook.delivered", True, "A webhook was accepted.", ("webhook_id",)),
    EventType("webhook.dead", True, "Delivery of a webhook was abandoned.", ("webhook_id",)),
)

EVENT_CATALOGUE: dict[str, EventType] = {kind.name: kind for kind in _EVENT_TYPES}
"""Every event that may be published; an undeclared one is refused."""
