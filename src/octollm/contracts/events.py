"""The event envelope and the catalogue of event types.

The envelope has the members of the ADR, and those that make delivery reliable: ``id``, ``seq``, ``prev``, ``version``.
The catalogue declares each type once: its data as a struct, an example, who emits it and how. Validation, the AsyncAPI
document and the tests are derived from it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from octollm.contracts.event_data import (
    ArmData,
    ArmRegisteredData,
    AuditRecordedData,
    BreakerData,
    BreakerOpenedData,
    CacheInvalidatedData,
    EventData,
    LogGapData,
    LogTruncatedData,
    ScheduleEndedData,
    ScheduleMissedData,
    ScheduleStartedData,
    ServiceData,
    ServiceDegradedData,
    ServiceStartedData,
    StepCompletedData,
    StepFailedData,
    StepSkippedData,
    StepStartedData,
    TaskAcceptedData,
    TaskApprovedData,
    TaskCancelledData,
    TaskCompletedData,
    TaskData,
    TaskExtendedData,
    TaskFailedData,
    TaskInstructedData,
    TaskPausedData,
    TaskPlannedData,
    TaskProgressData,
    TaskReplannedData,
    TaskResumedData,
    TaskWaitingData,
    TokenRevokedData,
    WebhookDeadData,
    WebhookDisabledData,
)
from octollm.contracts.task import Count
from octollm.errors import FieldError, OctoError, map_exceptions, parse_field_error

MAX_EVENT_BYTES = 256 * 1024
"""Bytes of an event's ``data`` as JSON."""


class Event(msgspec.Struct, frozen=True, omit_defaults=False):
    """One event on the wire. ``data`` has at least the members that its type requires; further members are kept.

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
    """A declared event.

    ``durable``: it is stored in the log and delivered at least once; otherwise it is published once, to the current
    subscribers. ``producers`` are the services that emit it; ``*`` is every built-in service. What the orchestrator
    emits is written in the transaction of the change. Other services send theirs, best effort: an event that the
    orchestrator has not accepted is lost when the process ends. ``version`` counts incompatible changes of ``data``.
    """

    name: str
    durable: bool
    meaning: str
    data: type[EventData]
    example: Mapping[str, object]
    producers: tuple[str, ...] = ("orchestrator",)
    version: int = 1

    @property
    def required(self) -> tuple[str, ...]:
        """Return the members that ``data`` must have."""
        return _required_members(self.data)

    @property
    def family(self) -> str:
        """Return the part before the dot."""
        return self.name.partition(".")[0]

    def may_be_posted_by(self, service: str) -> bool:
        """Return whether a built-in service other than the orchestrator may send this event to the orchestrator."""
        return "*" in self.producers or (service in self.producers and service != "orchestrator")


@functools.cache
def _required_members(data: type[EventData]) -> tuple[str, ...]:
    # To find out a struct's fields took more than a third of the CPU of writing an event.
    return tuple(field.encode_name for field in msgspec.structs.fields(data) if field.required)


@functools.lru_cache(maxsize=256)
def channel_of(event_type: str) -> str:
    """Return the Redis channel of an event type: ``task.completed`` → ``events:task:completed``."""
    entity, _, action = event_type.partition(".")
    return f"events:{entity}:{action}"


_TASK: dict[str, object] = {"task_id": "task-0192f3c4a5b67c8d9e0f1a2b3c4d5e6f", "progress": 40.0}
_STEP: dict[str, object] = {**_TASK, "step": "s1", "attempt": 1}
_STEPS: list[dict[str, object]] = [{"step": "s1", "title": "Write the function", "arm": "coder", "depends_on": []}]
_BREAKER = {"service": "judge", "instance": "http://judge-arm:8103"}
_SCHEDULE = {"schedule_id": "0192f3c4a5b67c8d9e0f1a2b3c4d5e6f", "planned_at": "2025-11-10T07:00:00.000Z"}
_APPROVAL: dict[str, object] = {
    "approval_id": "s1",
    "kind": "step",
    "step": "s1",
    "reason": "It deletes a file.",
    "status": "pending",
    "requested_at": "2025-11-10T10:30:00.000Z",
    "expires_at": "2025-11-11T10:30:00.000Z",
}
_ANY = ("*",)

_EVENT_TYPES = (
    EventType("task.accepted", True, "A task was stored.", TaskAcceptedData, {**_TASK, "goal": "Write slugify"}),
    EventType("task.planning", True, "A plan is being made.", TaskData, _TASK),
    EventType("task.planned", True, "A plan was made.", TaskPlannedData, {**_TASK, "steps": _STEPS}),
    EventType(
        "task.replanned",
        True,
        "A new plan replaced one that failed.",
        TaskReplannedData,
        {**_TASK, "steps": _STEPS, "reasons": ["The tests fail."]},
    ),
    EventType("task.started", True, "The first step begins.", TaskData, _TASK),
    EventType("task.progress", True, "The task made progress.", TaskProgressData, {**_TASK, "step": "s1"}),
    EventType(
        "task.waiting",
        True,
        "The task needs the approval of a person.",
        TaskWaitingData,
        {**_TASK, "reason": "It deletes a file.", "status": "waiting", "approvals": [_APPROVAL]},
    ),
    EventType(
        "task.approved",
        True,
        "A person granted a pending approval of the task.",
        TaskApprovedData,
        {**_TASK, "approvals": ["s1"], "decided_by": "grace", "comment": "Go ahead.", "goals": {}, "status": "running"},
    ),
    EventType(
        "task.paused", True, "A person paused the task.", TaskPausedData, {**_TASK, "by": "grace", "status": "paused"}
    ),
    EventType(
        "task.resumed",
        True,
        "A person resumed the task.",
        TaskResumedData,
        {**_TASK, "by": "grace", "status": "running"},
    ),
    EventType(
        "task.instructed",
        True,
        "A person added an instruction.",
        TaskInstructedData,
        {**_TASK, "by": "grace", "text": "Keep it short.", "number": 1},
    ),
    EventType(
        "task.extended",
        True,
        "A person raised the limits of the task.",
        TaskExtendedData,
        {**_TASK, "by": "grace", "max_tokens": 40_000, "deadline": "2025-11-10T11:30:00.000Z"},
    ),
    EventType(
        "task.completed",
        True,
        "The task ended with a result.",
        TaskCompletedData,
        {**_TASK, "progress": 100.0, "status": "completed", "duration_ms": 1234, "output": "def slugify…"},
    ),
    EventType(
        "task.failed",
        True,
        "The task ended without a result.",
        TaskFailedData,
        {**_TASK, "status": "failed", "code": "step_failed", "reason": "The step failed.", "reasons": []},
    ),
    EventType("task.cancelled", True, "The task was cancelled.", TaskCancelledData, {**_TASK, "status": "cancelled"}),
    EventType(
        "step.started",
        True,
        "An attempt of a step begins.",
        StepStartedData,
        {**_STEP, "arm": "coder", "title": "Write the function", "run": 1},
    ),
    EventType(
        "step.completed",
        True,
        "A step's result was accepted.",
        StepCompletedData,
        {**_STEP, "text_length": 17, "score": 1.0},
    ),
    EventType(
        "step.failed",
        True,
        "An attempt of a step failed.",
        StepFailedData,
        {**_STEP, "reasons": ["The tests fail."], "final": False, "code": "not_accepted"},
    ),
    EventType(
        "step.skipped",
        True,
        "A person has the task go on without a step.",
        StepSkippedData,
        {**_TASK, "step": "s1", "by": "grace", "status": "running"},
    ),
    EventType(
        "arm.registered",
        True,
        "An arm may be called.",
        ArmRegisteredData,
        {"arm": "translator", "operations": ["execute"], "url": "http://10.0.0.7:8200", "instance": "0192f3c4"},
    ),
    EventType("arm.healthy", True, "An arm responds again.", ArmData, {"arm": "translator"}),
    EventType("arm.unhealthy", True, "An arm does not respond.", ArmData, {"arm": "translator"}),
    EventType("arm.removed", True, "An arm may no longer be called.", ArmData, {"arm": "translator"}),
    EventType(
        "system.started",
        True,
        "A service has started.",
        ServiceStartedData,
        {"service": "memory", "instance": "0192f3c4", "release": "0.1.0"},
        _ANY,
    ),
    EventType(
        "system.degraded",
        True,
        "A service works without one of its dependencies.",
        ServiceDegradedData,
        {"service": "reflex", "instance": "0192f3c4", "reason": "Redis does not answer.", "dependency": "redis"},
        _ANY,
    ),
    EventType(
        "system.drained",
        True,
        "A service shut down gracefully.",
        ServiceData,
        {"service": "memory", "instance": "0192f3c4"},
        _ANY,
    ),
    EventType(
        "audit.recorded", True, "An audit row was written.", AuditRecordedData, {"action": "key.added", "seq": 12}
    ),
    EventType(
        "cache.invalidated", False, "A cached value is stale.", CacheInvalidatedData, {"key": "facts/team"}, ("memory",)
    ),
    EventType(
        "token.revoked",
        True,
        "Tokens were revoked.",
        TokenRevokedData,
        {"kind": "cred", "value": "key-0192f3c4", "at": 1762770600.0},
    ),
    EventType(
        "breaker.opened",
        False,
        "The circuit breaker of an instance opened.",
        BreakerOpenedData,
        {**_BREAKER, "reason": "failing", "seconds": 5.0},
        _ANY,
    ),
    EventType("breaker.closed", False, "The circuit breaker of an instance closed.", BreakerData, _BREAKER, _ANY),
    EventType(
        "log.truncated",
        True,
        "Events that a durable subscription had not handled were deleted.",
        LogTruncatedData,
        {"through": 12000, "count": 500},
    ),
    EventType(
        "log.gap",
        True,
        "A durable subscription or a webhook could not resume at its position.",
        LogGapData,
        {"reader": "subscription/billing", "after": 9000, "through": 12000, "reason": "position_expired"},
    ),
    EventType(
        "schedule.started",
        True,
        "A schedule submitted a task.",
        ScheduleStartedData,
        {**_SCHEDULE, "task_id": "task-0192f3c4a5b67c8d9e0f1a2b3c4d5e6f"},
    ),
    EventType(
        "schedule.skipped",
        True,
        "A run of a schedule was skipped.",
        ScheduleMissedData,
        {**_SCHEDULE, "reason": "The task of the time before is still open."},
    ),
    EventType(
        "schedule.failed",
        True,
        "The task of a schedule was refused.",
        ScheduleMissedData,
        {**_SCHEDULE, "reason": "notes.txt is not stored."},
    ),
    EventType(
        "schedule.ended",
        True,
        "A schedule ended.",
        ScheduleEndedData,
        {"schedule_id": _SCHEDULE["schedule_id"], "reason": "Its principal was revoked."},
    ),
    EventType(
        "webhook.dead",
        True,
        "An event could not be delivered to a webhook for 24 hours and became a dead letter.",
        WebhookDeadData,
        {"webhook_id": "wh-0192f3c4", "event_id": "0192f3c4"},
    ),
    EventType(
        "webhook.disabled",
        True,
        "A webhook was disabled; its pending deliveries are dead letters.",
        WebhookDisabledData,
        {"webhook_id": "wh-0192f3c4", "reason": "The receiver answered 410 Gone."},
    ),
)

EVENT_CATALOGUE: dict[str, EventType] = {kind.name: kind for kind in _EVENT_TYPES}
"""Every event that may be published; an undeclared one is refused."""


def validate_event(event_type: str, data: Mapping[str, object]) -> EventType:
    """Return the declaration of ``event_type``. Raises as :func:`encode_data` does."""
    return encode_data(event_type, data)[0]


def encode_data(event_type: str, data: Mapping[str, object]) -> tuple[EventType, bytes]:
    """Return the declaration of ``event_type``, and ``data`` as JSON.

    Raises ``invalid_body`` when the type is not declared, a required member of ``data`` is missing or a member has
    another type than declared, or ``data`` is too large or not JSON. Members that are not declared are kept.
    """
    kind = EVENT_CATALOGUE.get(event_type)
    if kind is None:
        raise OctoError(f"The event {event_type!r} is not declared in the catalogue.", code="invalid_body")
    missing = [name for name in kind.required if name not in data]
    if missing:
        raise OctoError(
            f"The event {event_type!r} lacks {', '.join(missing)}.",
            code="invalid_body",
            field_errors=[FieldError(f"/data/{name}", "is missing") for name in missing],
        )
    with map_exceptions(
        OctoError(f"The data of the event {event_type!r} is not JSON.", code="invalid_body"),
        TypeError,
        ValueError,
        msgspec.MsgspecError,
    ):
        encoded = msgspec.json.encode(data)
    if len(encoded) > MAX_EVENT_BYTES:
        raise OctoError(
            f"The data of the event {event_type!r} has {len(encoded)} bytes; {MAX_EVENT_BYTES} are allowed.",
            code="invalid_body",
        )
    try:
        msgspec.convert(data, kind.data)
    except msgspec.ValidationError as error:
        fault = parse_field_error(str(error), "/data")
        raise OctoError(
            f"The data of the event {event_type!r} is not as declared at {fault.pointer}: {fault.detail}.",
            code="invalid_body",
            field_errors=[fault],
        ) from error
    return kind, encoded
