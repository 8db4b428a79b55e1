"""What changed in a tenant since a position in the event log: the present state of its tasks, and its events."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import msgspec
from sqlalchemy import ColumnElement, and_, func, select, true

from octollm.clock import format_rfc3339
from octollm.contracts.api import TaskFailure, encode_cursor
from octollm.contracts.dashboard import (
    MAX_DASHBOARD_EVENT,
    MAX_DASHBOARD_GOAL,
    Changes,
    DashboardPart,
    DashboardTask,
    EventEntry,
)
from octollm.contracts.events import EVENT_CATALOGUE, Event
from octollm.contracts.task import Usage
from octollm.events import EventLog, check_position, task_subject
from octollm.storage import Database, DatabaseConnection, row_to_dict
from octollm.storage.characters import NUL
from octollm.storage.tables import budgets, tasks
from octollm.tasks.records import Row

MAX_CHANGES = 200
"""Events of one page."""
_TASK_TYPES = tuple(name for name, kind in EVENT_CATALOGUE.items() if kind.family in ("task", "step"))
_SUBJECT = task_subject("")


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks of a tenant are shown: those of ``statuses`` (empty: all) whose goal contains ``text``."""

    tenant: str
    statuses: Collection[str] = ()
    text: str = ""

    @property
    def matches_text(self) -> ColumnElement[bool]:
        """Return the condition that never changes for a task."""
        conditions = [tasks.c.tenant == self.tenant, tasks.c.kind == "task"]
        if self.text:
            escaped = re.sub("([/%_])", r"/\1", self.text)
            conditions.append(func.lower(tasks.c.goal).like(func.lower(f"%{escaped}%"), escape="/"))
        return and_(*conditions)

    @property
    def matches(self) -> ColumnElement[bool]:
        """Return the whole condition."""
        return and_(self.matches_text, tasks.c.status.in_(self.statuses) if self.statuses else true())


class ChangeReader:
    """Reads snapshots and changes; each in one database snapshot, so that none is missed or seen too early."""

    def __init__(self, db: Database, log: EventLog) -> None:
        self._db = db
        self._log = log

    async def read_snapshot(self, wanted: TaskFilter, parts: tuple[DashboardPart, ...], limit: int) -> Changes:
        """Return the newest tasks, and the position that they are of. Events have no snapshot."""
        page: list[Row] = []
        async with self._db.read() as snapshot:
            _, end = await self._log.read_bounds(snapshot)
            if "tasks" in parts and NUL not in wanted.text:
                query = (
                    _select_states()
                    .where(wanted.matches)
                    .order_by(tasks.c.created_at.desc(), tasks.c.task_id.desc())
                    .limit(limit + 1)
                )
                page = [row_to_dict(row) for row in await snapshot.all(query)]
        more = len(page) > limit
        page = page[:limit]
        cursor = encode_cursor(page[-1]["created_at"], page[-1]["task_id"]) if more else None
        return Changes(wanted.tenant, parts, end, tuple(map(_build_state, page)), cursor=cursor)

    async def read_changes(self, wanted: TaskFilter, parts: tuple[DashboardPart, ...], after: int) -> Changes:
        """Return a page of what changed after a position.

        Raises ``position_expired`` and ``position_unknown``.
        """
        async with self._db.read() as snapshot:
            oldest, end = await self._log.read_bounds(snapshot)
            check_position(after, oldest, end, from_oldest=False)
            types = None if "events" in parts else _TASK_TYPES
            page = await self._log.read(after, MAX_CHANGES, tenant=wanted.tenant, types=types, connection=snapshot)
            ids = dict.fromkeys(
                event.subject.removeprefix(_SUBJECT) for event in page if event.subject.startswith(_SUBJECT)
            )
            rows: list[Row] = []
            if "tasks" in parts and ids and NUL not in wanted.text:
                rows = await self._read_states(snapshot, wanted, tuple(ids))
        matching = [row for row in rows if not wanted.statuses or row["status"] in wanted.statuses]
        states = tuple(map(_build_state, matching))
        shown = {state.task_id for state in states}
        more = len(page) == MAX_CHANGES
        return Changes(
            wanted.tenant,
            parts,
            page[-1].seq if more else end,
            states,
            tuple(row["task_id"] for row in rows if row["task_id"] not in shown),
            tuple(map(_build_entry, page)) if "events" in parts else (),
            more=more,
        )

    async def _read_states(self, conn: DatabaseConnection, wanted: TaskFilter, ids: tuple[str, ...]) -> list[Row]:
        query = _select_states().where(wanted.matches_text, tasks.c.task_id.in_(ids))
        return [row_to_dict(row) for row in await conn.all(query.order_by(tasks.c.created_at, tasks.c.task_id))]


def _select_states():
    columns = (
        *(tasks.c[name] for name in ("task_id", "status", "goal", "progress", "version", "parent_task_id", "error")),
        *(tasks.c[name] for name in ("created_at", "updated_at", "finished_at")),
        *(budgets.c[name] for name in ("prompt_tokens", "completion_tokens", "used_cost_usd")),
    )
    return select(*columns).join(budgets, budgets.c.task_id == tasks.c.task_id, isouter=True)


def _build_state(row: Row) -> DashboardTask:
    error = row["error"]
    return DashboardTask(
        task_id=row["task_id"],
        status=row["status"],
        goal=row["goal"][:MAX_DASHBOARD_GOAL],
        progress=row["progress"],
        version=row["version"],
        created_at=format_rfc3339(row["created_at"]),
        updated_at=format_rfc3339(row["updated_at"]),
        finished_at=None if row["finished_at"] is None else format_rfc3339(row["finished_at"]),
        parent_task_id=row["parent_task_id"],
        failure="" if error is None else msgspec.convert(error, TaskFailure).code,
        usage=Usage(row["prompt_tokens"] or 0, row["completion_tokens"] or 0, row["used_cost_usd"] or 0.0),
    )


def _build_entry(event: Event) -> EventEntry:
    is_short = len(msgspec.json.encode(event.data)) <= MAX_DASHBOARD_EVENT
    return EventEntry(
        event.seq,
        event.event_type,
        event.timestamp,
        event.source,
        event.subject,
        event.data if is_short else None,
    )
