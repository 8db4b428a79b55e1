"""Trees of tasks in the database: which sub-tasks are open, and which have lost the task that they belong to."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from sqlalchemy import and_, func, or_, select, update

from octollm.errors import OctoError
from octollm.storage import Database, DatabaseConnection, Transaction
from octollm.storage.characters import NUL
from octollm.storage.tables import budgets, task_files, tasks
from octollm.tasks.attempts import FILE_ROLE
from octollm.tasks.records import TaskRecord
from octollm.tasks.state import OPEN_STATES, is_final
from octollm.tasks.store import MAX_CHILDREN, TaskStore

MAX_DESCENDANTS = 1000
"""Tasks below a root, of all generations and ever: one that submits itself over and over ends there."""
UPLOAD_ROLE = "upload"
"""The role of a file that an arm stored for its task."""


@dataclass(frozen=True, slots=True)
class OrphanedTask:
    """An open sub-task whose parent has ended, and that is to end with it. ``reason`` says so to its owner."""

    task_id: str
    tenant: str
    sub: str
    cred: str
    reason: str


class TaskFamily:
    """The parents and children of all tasks."""

    def __init__(self, db: Database, store: TaskStore) -> None:
        self._db = db
        self._store = store

    async def find_parent(self, task_id: str, tenant: str) -> TaskRecord:
        """Return a task that may have sub-tasks; raise ``task_not_found``, also for another tenant's."""
        task = await self._store.get(task_id)
        if task.tenant != tenant or task.kind != "task":
            raise OctoError("There is no task of that id.", code="task_not_found")
        return task

    async def lock_parent(self, tx: Transaction, task_id: str, root: str) -> None:
        """Make sure that a task is open and stays so until the commit, and count the new task in its tree.

        Without the lock, a sub-task could be stored after its parent's end, and nobody would end it. Raises
        ``state_conflict``.
        """
        row = await self._store.load_row(tx, task_id)
        if is_final(row["status"]):
            raise OctoError(f"The parent task is {row['status']} already.", code="state_conflict")
        count = select(func.count()).select_from(tasks).where(tasks.c.parent_task_id == task_id)
        # The new one is among them.
        if int(await tx.scalar(count) or 0) > MAX_CHILDREN:
            raise OctoError(f"A task has {MAX_CHILDREN} sub-tasks at most.", code="state_conflict")
        one_more = update(budgets).values(descendants=budgets.c.descendants + 1).returning(budgets.c.task_id)
        if await tx.scalar(one_more.where(budgets.c.task_id == root, budgets.c.descendants < MAX_DESCENDANTS)) is None:
            raise OctoError(f"A tree has {MAX_DESCENDANTS:,} sub-tasks at most.", code="state_conflict")

    async def is_below(self, task_id: str, root: str) -> bool:
        """Return whether a task is below ``root`` in its tree."""
        if NUL in task_id:  # PostgreSQL does not even compare it
            return False
        async with self._db.read() as conn:
            query = select(budgets.c.ancestors).where(budgets.c.task_id == task_id)
            above: Sequence[str] = await conn.scalar(query) or ()
        return root in above

    async def files_of_arms(self, task_id: str, digests: Set[str]) -> set[str]:
        """Return those of ``digests`` that an arm stored for the task, or that its sub-tasks made."""
        children = select(tasks.c.task_id).where(tasks.c.parent_task_id == task_id)
        of_arms = or_(
            and_(task_files.c.task_id == task_id, task_files.c.role == UPLOAD_ROLE),
            and_(task_files.c.task_id.in_(children), task_files.c.role == FILE_ROLE),
        )
        async with self._db.read() as conn:
            query = select(task_files.c.digest).where(task_files.c.digest.in_(digests), of_arms)
            return {str(row["digest"]) for row in await conn.all(query)}

    async def open_children(self, task_id: str) -> list[str]:
        """Return the ids of a task's open sub-tasks."""
        async with self._db.read() as conn:
            query = select(tasks.c.task_id).where(
                tasks.c.parent_task_id == task_id, tasks.c.finished_at.is_(None), tasks.c.status.in_(OPEN_STATES)
            )
            return [str(row["task_id"]) for row in await conn.all(query.limit(MAX_CHILDREN))]

    async def orphans(self, limit: int, parent: str | None = None) -> list[OrphanedTask]:
        """Return open sub-tasks, of one parent if it is given, that are to end with their parent, which has ended."""
        async with self._db.read() as conn:
            return await _load_orphans(conn, limit, parent)


async def _load_orphans(conn: DatabaseConnection, limit: int, parent: str | None) -> list[OrphanedTask]:
    above = tasks.alias("above")
    query = (
        select(tasks.c.task_id, tasks.c.tenant, tasks.c.sub, tasks.c.cred, above.c.status)
        .join(above, above.c.task_id == tasks.c.parent_task_id)
        .where(
            tasks.c.parent_task_id.is_not(None),
            tasks.c.finished_at.is_(None),
            tasks.c.status.in_(OPEN_STATES),
            tasks.c.on_parent_end == "cancel",
            above.c.status.not_in(OPEN_STATES),
        )
        .limit(limit)
    )
    if parent is not None:
        query = query.where(tasks.c.parent_task_id == parent)
    return [
        OrphanedTask(
            str(row["task_id"]),
            str(row["tenant"]),
            str(row["sub"]),
            str(row["cred"]),
            f"The task that it belongs to is {row['status']}.",
        )
        for row in await conn.all(query)
    ]
