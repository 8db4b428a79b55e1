"""Messages of the dashboard stream: its query, what the orchestrator returns for it, and its frames."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal, cast, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from octollm.contracts.observability import ServiceState
from octollm.contracts.task import Count, TaskStatus, Usage
from octollm.errors import OctoError

MAX_DASHBOARD_GOAL = 500
"""Code points of a goal; a longer one is cut."""
MAX_DASHBOARD_EVENT = 4096
"""Bytes of an event's ``data`` as JSON; longer data is left out."""

DashboardPart = Literal["tasks", "events", "services"]
PARTS: tuple[DashboardPart, ...] = get_args(DashboardPart)
_STATUSES: frozenset[str] = frozenset(get_args(TaskStatus))


class DashboardTask(msgspec.Struct, frozen=True):
    """A task in the dashboard stream. ``failure`` is the error code of a failed one."""

    task_id: str
    status: TaskStatus
    goal: str
    progress: float
    version: int
    created_at: str
    updated_at: str
    finished_at: str | None = None
    parent_task_id: str | None = None
    failure: str = ""
    usage: Usage = Usage()


class EventEntry(msgspec.Struct, frozen=True):
    """An event in the dashboard stream. ``data`` is ``None`` if it was left out for its size."""

    seq: int
    event_type: str
    timestamp: str
    source: str
    subject: str
    data: dict[str, object] | None


class ChangesQuery(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has changed since the position ``after``; without it, the present state.

    ``status`` and ``include`` are comma-separated lists; empty is all.
    """

    after: Count | UnsetType = UNSET
    status: Annotated[str, Meta(max_length=200)] = ""
    text: Annotated[str, Meta(max_length=200)] = ""
    include: Annotated[str, Meta(max_length=100)] = ""
    limit: Annotated[int, Meta(ge=1, le=200)] = 50

    def check(self) -> None:
        """Raise ``invalid_parameter`` for a list with a value that is not known."""
        _split("status", self.status, _STATUSES)
        _split("include", self.include, PARTS)

    @property
    def statuses(self) -> frozenset[str]:
        """Return the statuses that are asked for. Raises ``invalid_parameter``."""
        return _split("status", self.status, _STATUSES)

    @property
    def parts(self) -> frozenset[DashboardPart]:
        """Return the parts that are asked for. Raises ``invalid_parameter``."""
        return cast("frozenset[DashboardPart]", _split("include", self.include, PARTS))


class DashboardQuery(ChangesQuery, frozen=True, omit_defaults=True):
    """The same of a client. ``tenant`` must be its own."""

    tenant: Annotated[str, Meta(max_length=255)] = ""


def _split(name: str, text: str, allowed: Collection[str]) -> frozenset[str]:
    values = frozenset(filter(None, text.split(",")))
    if unknown := values.difference(allowed):
        raise OctoError(
            f"The query parameter {name} is wrong: {min(unknown)!r} is none of {', '.join(sorted(allowed))}.",
            code="invalid_parameter",
        )
    return values


class Changes(msgspec.Struct, frozen=True):
    """The caller has everything up to the position ``after``, once it has this. ``more`` follows at once.

    ``includes`` are the parts that the caller may read, of those that it asked for.
    """

    tenant: str
    includes: tuple[DashboardPart, ...]
    after: int
    tasks: tuple[DashboardTask, ...] = ()
    removed: tuple[str, ...] = ()
    events: tuple[EventEntry, ...] = ()
    cursor: str | None = None
    more: bool = False


class DashboardSnapshot(msgspec.Struct, frozen=True):
    """The ``data`` of a ``snapshot`` frame; ``cursor`` continues the list at ``GET /tasks``."""

    tenant: str
    includes: tuple[DashboardPart, ...]
    tasks: tuple[DashboardTask, ...]
    cursor: str | None


class DashboardChange(msgspec.Struct, frozen=True):
    """The ``data`` of a ``change`` frame: tasks as they are now, those that match no longer, and new events."""

    tasks: tuple[DashboardTask, ...]
    removed: tuple[str, ...]
    events: tuple[EventEntry, ...]


class ServicesNow(msgspec.Struct, frozen=True):
    """The ``data`` of a ``services`` frame, without the history of the probes."""

    available: bool
    detail: str
    services: tuple[ServiceState, ...]


class DashboardFrame(msgspec.Struct, frozen=True):
    """A frame of the dashboard stream. ``seq`` is a position in the event log; ``data`` of a ``ping`` is empty."""

    type: Literal["snapshot", "change", "services", "ping"]
    seq: int
    timestamp: str
    data: DashboardSnapshot | DashboardChange | ServicesNow | dict[str, str]
