"""Changes of tasks, written in batches: one transaction for what several tasks, and several steps of one, have come to.

Each change is decided from its task's row, which stays locked until the commit, so the fencing token and the state
machine hold as for a change that is written alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import msgspec

from octollm.contracts.task import Plan, Task, TaskStatus
from octollm.errors import OctoError
from octollm.events import EventDraft, EventLog, task_subject
from octollm.storage.programs import Program, Row, SqlStatement, insert_statement, update_statement
from octollm.tasks.attempts import AttemptStart, NewAttempt, begin_attempts
from octollm.tasks.state import PLANNED_PROGRESS, check_transition, is_final

EVENT_SOURCE = "orchestrator"
_JSON_COLUMNS = frozenset({"contract", "plan", "result", "error", "spec", "reasons", "ancestors"})
_LOCKED = (
    "task_id, tenant, run, status, progress, started_at, correlation_id, traceparent, forked_from, instructions,"
    " deadline_at"
)
_LOCK = {
    # Locked in ascending order, as everywhere. FOR NO KEY UPDATE: foreign keys to the row take KEY SHARE.
    "postgresql": f"""
SELECT {_LOCKED} FROM tasks
WHERE task_id = ANY($1::text[]) ORDER BY task_id FOR NO KEY UPDATE
""",  # noqa: S608  constants
    # The transaction itself is the lock.
    "sqlite": f"""
SELECT {_LOCKED} FROM tasks
WHERE task_id IN (SELECT value FROM json_each($1))
""",  # noqa: S608  constants
}
_CANCEL_STEPS = """
UPDATE steps SET status = 'cancelled', finished_at = $2 WHERE task_id = $1 AND status IN ('pending', 'running')
"""
_CANCEL_APPROVALS = """
UPDATE approvals SET status = 'cancelled', decided_at = $2 WHERE task_id = $1 AND status = 'pending'
"""
_COMPLETED_STEPS = "SELECT step FROM steps WHERE task_id = $1 AND status = 'completed' ORDER BY step"
_DROP_STEPS = "DELETE FROM steps WHERE task_id = $1 AND status NOT IN ('completed', 'skipped')"
_STEP_COLUMNS = ("task_id", "step", "position", "plan_number", "arm", "title", "spec", "created_at", "updated_at")


@dataclass(frozen=True, slots=True)
class TaskChange:
    """One change of a task, with its events in order (type and data).

    ``epoch`` is the fencing token. ``statuses`` are the states that it passes through, ``columns`` further columns of
    the task, ``steps`` those of its steps by name. ``plan`` is stored with its steps; with ``replan`` it replaces the
    steps that did not complete. Without a worker, ``epoch`` is ``None``.
    """

    task_id: str
    events: Sequence[tuple[str, Mapping[str, object]]]
    epoch: int | None
    statuses: tuple[TaskStatus, ...] = ()
    progress: float | None = None
    columns: Mapping[str, object] = field(default_factory=dict[str, object])
    steps: Sequence[tuple[str, Mapping[str, object]]] = ()
    plan: Plan | None = None
    replan: bool = False
    statements: Sequence[SqlStatement] = ()
    """Further writes, after those of the steps."""
    attempt: NewAttempt | None = None
    """An attempt that begins with the change."""
    skip_in: TaskStatus | None = None
    """The state in which there is nothing to change, since an earlier epoch did it."""


class Applied(NamedTuple):
    """What changes have come to: the task's progress, and the attempts that began, in order."""

    progress: float
    starts: tuple[AttemptStart, ...] = ()


def planning_change(task_id: str, epoch: int, *, announce: bool = False) -> TaskChange:
    """Return the change that moves a task to ``planning``; nothing when it is in that state already.

    ``announce`` is for planning that takes its time.
    """
    events: list[tuple[str, Mapping[str, object]]] = [("task.planning", {})] if announce else []
    return TaskChange(task_id, events, epoch, ("planning",), skip_in="planning")


def plan_change(task_id: str, plan: Plan, epoch: int, *, replan: bool, reasons: Sequence[str]) -> TaskChange:
    """Return the change that stores a plan and sets the task running. A replan passes through ``planning`` first."""
    listed = [{"step": s.id, "title": s.title, "arm": s.arm, "depends_on": list(s.depends_on)} for s in plan.steps]
    events: list[tuple[str, Mapping[str, object]]] = [("task.planned", {"steps": listed}), ("task.started", {})]
    if replan:
        events = [("task.replanned", {"steps": listed, "reasons": list(reasons)})]
    return TaskChange(
        task_id,
        events,
        epoch,
        ("running",),
        PLANNED_PROGRESS,
        {"plan": plan},
        plan=plan,
        replan=replan,
    )


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to store. ``deadline_at`` is in seconds since the Unix epoch."""

    task_id: str
    tenant: str
    sub: str
    cred: str
    authority: str
    contract: Task
    correlation_id: str
    traceparent: str
    deadline_at: float | None
    kind: str = "task"
    forked_from: str | None = None
    plan: Plan | None = None
    """The plan of the task that it was forked from; a planner makes that of any other."""
    ancestors: tuple[str, ...] = ()
    """Of a sub-task: the tasks whose budgets it spends, the root first and its parent last."""

    def row(self, now: float) -> dict[str, Any]:
        """Return its row of ``tasks``."""
        return {
            "task_id": self.task_id,
            "tenant": self.tenant,
            "kind": self.kind,
            "sub": self.sub,
            "cred": self.cred,
            "authority": self.authority,
            "goal": self.contract.goal,
            "contract": self.contract,
            "priority": self.contract.priority,
            "parent_task_id": self.contract.parent_task_id,
            "on_parent_end": self.contract.on_parent_end,
            "forked_from": self.forked_from,
            "plan": self.plan,
            "correlation_id": self.correlation_id,
            "traceparent": self.traceparent,
            "status": "running" if self.kind == "adhoc" else "accepted",
            # The first event of a new subject has version 1.
            "version": 1 if self.kind == "task" else 0,
            "created_at": now,
            "updated_at": now,
            "deadline_at": self.deadline_at,
        }

    def budget_row(self) -> dict[str, Any]:
        """Return its row of ``budgets``."""
        budget = self.contract.budget
        return {
            "task_id": self.task_id,
            "max_tokens": budget.max_tokens,
            "max_cost_usd": budget.max_cost_usd,
            "ancestors": list(self.ancestors) or None,
        }

    def file_rows(self, now: float) -> list[dict[str, Any]]:
        """Return its rows of ``task_files``."""
        return [
            {"task_id": self.task_id, "role": "input", "name": file.name, "digest": file.digest, "created_at": now}
            for file in self.contract.context.files
            if file.digest is not None
        ]

    def accepted(self) -> EventDraft:
        """Return its first event."""
        return EventDraft(
            "task.accepted",
            task_subject(self.task_id),
            self.tenant,
            EVENT_SOURCE,
            {
                "task_id": self.task_id,
                "goal": self.contract.goal[:2000],
                "progress": 0.0,
                **({"forked_from": self.forked_from} if self.forked_from else {}),
                **({"parent_task_id": self.ancestors[-1]} if self.ancestors else {}),
            },
            self.correlation_id,
            self.traceparent,
        )


class TaskCreation(NamedTuple):
    """A task to store as created at ``now``, and what else the same transaction writes."""

    new: NewTask
    now: float
    statements: Sequence[SqlStatement] = ()


def create_tasks(log: EventLog, items: Sequence[TaskCreation]) -> Program[list[None]]:
    """Store tasks with their budgets, files and first events."""
    yield from _insert_all("tasks", [item.new.row(item.now) for item in items])
    yield from _insert_all("budgets", [item.new.budget_row() for item in items])
    files = [row for item in items for row in item.new.file_rows(item.now)]
    if files:
        yield from _insert_all("task_files", files, " ON CONFLICT DO NOTHING")
    shared: dict[str, list[Sequence[Any]]] = {}
    for item in items:
        for statement in item.statements:
            shared.setdefault(statement.sql, []).append(statement.parameters)
    for sql, parameters in shared.items():
        yield SqlStatement(sql, parameters, many=True)
    # Last, because the lock on the events' subjects comes last (lock order in `database.py`).
    yield from log.insert([item.new.accepted() for item in items if item.new.kind == "task"])
    return [None] * len(items)


def _insert_all(table: str, rows: Sequence[Mapping[str, object]], suffix: str = "") -> Program[None]:
    columns = tuple(rows[0])
    values = [tuple(_encode(name, row[name]) for name in columns) for row in rows]
    yield SqlStatement(insert_statement(table, columns, suffix), values, many=True)


class PendingChanges:
    """The changes of one task in their order. One that is deferred shares the transaction of the next.

    So the end of a step is one commit with the start of the step after it. A crash in between loses nothing: another
    worker repeats the step's calls with the same keys, and gets the stored responses.
    """

    def __init__(self, apply: Callable[..., Awaitable[Applied]]) -> None:
        self._apply = apply
        self._deferred: list[TaskChange] = []

    def defer(self, change: TaskChange) -> None:
        """Write a change with the next one."""
        self._deferred.append(change)

    async def apply(self, *changes: TaskChange) -> Applied:
        """Write what was deferred, and then ``changes``, in one transaction."""
        item = (*self._deferred, *changes)
        self._deferred.clear()
        return await self._apply(*item)

    async def flush(self) -> None:
        """Write what was deferred."""
        if self._deferred:
            await self.apply()


@dataclass(frozen=True, slots=True)
class TaskState:
    """What the changes of one task are decided from."""

    tenant: str
    epoch: int
    status: TaskStatus
    progress: float
    started_at: float | None
    correlation_id: str
    traceparent: str
    reused: tuple[str, ...] | None = None
    """The steps whose results a fork takes over; ``None`` for any other task."""
    instructions: tuple[str, ...] = ()
    deadline_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Writes:
    """What a batch writes, in the order of the locks."""

    steps_before: dict[tuple[str, ...], dict[str, object]] = field(
        default_factory=dict[tuple[str, ...], dict[str, object]]
    )
    """Of steps that a new plan may drop."""
    dropped: list[str] = field(default_factory=list[str])
    new_steps: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    tasks: dict[str, dict[str, object]] = field(default_factory=dict[str, dict[str, object]])
    steps: dict[tuple[str, ...], dict[str, object]] = field(default_factory=dict[tuple[str, ...], dict[str, object]])
    statements: list[SqlStatement] = field(default_factory=list[SqlStatement])
    ended: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])
    events: list[EventDraft] = field(default_factory=list[EventDraft])


def decide(state: TaskState | None, change: TaskChange) -> TaskState:
    """Return the state of a task after ``change``.

    Raises ``task_not_found``, ``fence_lost`` when a newer epoch holds the task, and ``state_conflict`` for an illegal
    transition and for any change of a task that has ended.
    """
    if state is None:
        raise OctoError("There is no task of that id.", code="task_not_found")
    # The fence first: an outdated worker gets `fence_lost` even if the newer one has ended the task already. With
    # `state_conflict` it would look up and report an end that is not its own.
    if change.epoch is not None and state.epoch != change.epoch:
        raise OctoError("A newer run holds the task.", code="fence_lost")
    if is_final(state.status):
        raise OctoError(f"The task is {state.status} already.", code="state_conflict")
    status = state.status
    for following in change.statuses:
        check_transition(status, following)
        status = following
    # Progress never falls, in whatever order the reports of parallel steps are committed.
    return replace(state, status=status, progress=max(state.progress, change.progress or 0.0))


def apply_changes(
    log: EventLog, dialect: str, items: Sequence[Sequence[TaskChange]], now: float
) -> Program[list[Applied | OctoError]]:
    """Write several items, each the changes of one task that belong together; return what came of each, or an error.

    An item that may not be written leaves the others alone.
    """
    ids = sorted({change.task_id for item in items for change in item})
    locked = yield SqlStatement(
        _LOCK[dialect], (ids if dialect == "postgresql" else msgspec.json.encode(ids).decode(),)
    )
    states: dict[str, TaskState] = {row["task_id"]: _state_of(row) for row in locked}
    for task_id in {change.task_id for item in items for change in item if change.plan is not None}:
        if task_id in states and states[task_id].reused is not None:
            completed = yield SqlStatement(_COMPLETED_STEPS, (task_id,))
            states[task_id] = replace(states[task_id], reused=tuple(str(row["step"]) for row in completed))
    writes = _Writes()
    results: list[Applied | OctoError] = []
    for item in items:
        try:
            results.append(Applied(_add(item, states, writes, now)))
        except OctoError as error:
            results.append(error)
    # A task's subject is locked right after the task: nobody who holds one of the two waits for the other.
    for event in (yield from log.insert(writes.events)):
        # In the same transaction, so that a reader of this version also finds its event in the history.
        writes.tasks[str(event.data["task_id"])]["version"] = event.version
    yield from _update_all("tasks", ("task_id",), {(task,): each for task, each in writes.tasks.items()})
    yield from _update_all("steps", ("task_id", "step"), writes.steps_before)
    if writes.dropped:
        yield SqlStatement(_DROP_STEPS, [(task_id,) for task_id in writes.dropped], many=True)
    if writes.new_steps:
        # The new plan includes the completed steps; their rows, which have the results, are kept.
        sql = insert_statement("steps", _STEP_COLUMNS, " ON CONFLICT DO NOTHING")
        yield SqlStatement(sql, writes.new_steps, many=True)
    yield from _update_all("steps", ("task_id", "step"), writes.steps)
    shared: dict[str, list[Sequence[Any]]] = {}
    for statement in writes.statements:
        shared.setdefault(statement.sql, []).append(statement.parameters)
    for sql, parameters in shared.items():
        yield SqlStatement(sql, parameters, many=True)
    yield from _begin_attempts(items, results, states, now)
    yield from _cancel_open(writes, now)
    return results


def _cancel_open(writes: _Writes, now: float) -> Program[None]:
    """Cancel what is open of the tasks that end."""
    if not writes.ended:
        return
    unfinished = [(task_id, now) for task_id, completed in writes.ended if not completed]
    if unfinished:  # no step of a completed task is open
        yield SqlStatement(_CANCEL_STEPS, unfinished, many=True)
    yield SqlStatement(_CANCEL_APPROVALS, [(task_id, now) for task_id, _ in writes.ended], many=True)


def _begin_attempts(
    items: Sequence[Sequence[TaskChange]],
    results: list[Applied | OctoError],
    states: Mapping[str, TaskState],
    now: float,
) -> Program[None]:
    """Begin the attempts of the items that are written, and add them to their results."""
    new: list[NewAttempt] = []
    places: list[int] = []
    for place, item in enumerate(items):
        begun = [change.attempt for change in item if change.attempt is not None]
        if isinstance(results[place], Applied):
            new.extend(begun)
            places.extend(place for _ in begun)
    requests = yield from begin_attempts([(each, states[each.task.task_id].instructions) for each in new], now)
    for place, each, request in zip(places, new, requests, strict=True):
        applied = results[place]
        assert isinstance(applied, Applied)
        start = AttemptStart(request, states[each.task.task_id].deadline_at)
        results[place] = applied._replace(starts=(*applied.starts, start))


def _add(item: Sequence[TaskChange], states: dict[str, TaskState], writes: _Writes, now: float) -> float:
    """Decide the changes of an item, and add what they write; raise without adding anything."""
    decided: list[tuple[TaskChange, TaskState]] = []
    state = states.get(item[0].task_id)
    for change in item:
        if state is not None and change.skip_in == state.status and change.epoch == state.epoch:
            continue
        state = decide(state, change)
        decided.append((change, state))
    for change, after in decided:
        _add_one(change, after, writes, now)
    assert state is not None
    states[item[0].task_id] = state
    return state.progress


def _add_one(change: TaskChange, state: TaskState, writes: _Writes, now: float) -> None:
    task_id = change.task_id
    columns = writes.tasks.setdefault(task_id, {})
    columns |= {**change.columns, "status": state.status, "progress": state.progress, "updated_at": now}
    if change.plan is not None:
        if state.started_at is None:
            columns["started_at"] = now
        if change.replan:
            writes.dropped.append(task_id)
            for key in [key for key in writes.steps if key[0] == task_id]:
                writes.steps_before[key] = writes.steps.pop(key)
        number = 2 if change.replan else 1
        writes.new_steps.extend(
            (task_id, step.id, place, number, step.arm, step.title, _encode("spec", step), now, now)
            for place, step in enumerate(change.plan.steps)
        )
    for step, values in change.steps:
        columns = writes.steps.setdefault((task_id, step), {})
        columns |= {**values, "updated_at": now}
    writes.statements.extend(change.statements)
    if is_final(state.status):
        writes.ended.append((task_id, state.status == "completed"))
    writes.events.extend(
        EventDraft(
            event_type,
            task_subject(task_id),
            state.tenant,
            EVENT_SOURCE,
            {"task_id": task_id, **data, **_reused(event_type, state), "progress": state.progress},
            state.correlation_id,
            state.traceparent,
        )
        for event_type, data in change.events
    )


def _reused(event_type: str, state: TaskState) -> dict[str, object]:
    return {"reused": list(state.reused)} if event_type == "task.planned" and state.reused is not None else {}


def _update_all(
    table: str, keys: tuple[str, ...], rows: Mapping[tuple[str, ...], Mapping[str, object]]
) -> Program[None]:
    """Update rows by their keys: those in which the same columns change share a statement."""
    groups: dict[tuple[str, ...], list[tuple[object, ...]]] = {}
    for key, values in rows.items():
        names = tuple(sorted(values))
        groups.setdefault(names, []).append((*(_encode(name, values[name]) for name in names), *key))
    for names, parameters in groups.items():
        yield SqlStatement(update_statement(table, names, keys), parameters, many=True)


def _encode(column: str, value: object) -> object:
    return msgspec.json.encode(value).decode() if column in _JSON_COLUMNS and value is not None else value


def _state_of(row: Row) -> TaskState:
    return TaskState(
        row["tenant"],
        int(row["run"]),
        cast("TaskStatus", row["status"]),
        float(row["progress"]),
        row["started_at"],
        row["correlation_id"],
        row["traceparent"],
        () if row["forked_from"] else None,
        _instructions_of(row["instructions"]),
        row["deadline_at"],
    )


def _instructions_of(encoded: str | None) -> tuple[str, ...]:
    return () if encoded is None else tuple(each["text"] for each in msgspec.json.decode(encoded))
