"""What a list or a log is asked for, in the query of its URL."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from octollm.contracts.numbers import Count
from octollm.contracts.task import TaskStatus

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
