"""Schedules: their operations, and the loop that submits their tasks.

Every replica runs the loop. A run is the pair of schedule and planned time: it is written with its task and the next
time in one transaction, which only the first replica can commit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError
from sqlalchemy import delete, func, select, update

from octollm.capability import Principal, ScopeSet
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.contracts import schedules as contract
from octollm.contracts.api import Acknowledgement
from octollm.contracts.schedules import CatchUp, ScheduleList, ScheduleRequest, ScheduleRun, ScheduleView
from octollm.contracts.task import Task
from octollm.errors import FieldError, OctoError
from octollm.events import EventLog
from octollm.rpc.call import IncomingCall, Operation, OperationResponse, implement
from octollm.rpc.idempotency import IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import Actor, actor_from_call, record_audit
from octollm.services.orchestrator.submission import (
    Submission,
    TaskSubmitter,
)
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import schedule_runs, schedules, tasks
from octollm.tasks.state import OPEN_STATES
from octollm.telemetry import Logger

MAX_SCHEDULES = 100
"""Schedules of one tenant."""
MAX_RUNS = 100
"""Runs of one schedule that are kept; the oldest goes."""
SHOWN_RUNS = 20
POLL_SECONDS = 1.0
ON_TIME_SECONDS = 60.0
"""A planned time that is older was missed, and falls under the schedule's catch-up policy."""
MAX_CAUGHT_UP = 100
"""Missed times that the policy ``all`` makes up for: the newest."""
BATCH = 50
"""Schedules of one round."""
_MAX_STEPS = 3000
_RECENT = timedelta(days=2)


def check_times(cron: str, time_zone: str) -> None:
    """Raise ``invalid_body`` for an expression or a time zone that is not valid."""
    try:
        ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise _invalid("/time_zone", "A time zone has a name of the IANA database, e.g. Europe/Berlin.") from error
    try:
        if len(cron.split()) != 5:
            raise CronSimError("five fields are needed: minute, hour, day of month, month, day of week")
        CronSim(cron, datetime(2000, 1, 1))
    except CronSimError as error:
        raise _invalid("/cron", f"The cron expression is not valid: {error}.") from error


def next_time(cron: str, time_zone: str, after: float) -> float | None:
    """Return the first planned time after ``after``, both epoch seconds; ``None`` when there is none in 50 years.

    Local times follow Debian's cron: a time that the clocks skip runs right after the gap, and a fixed time that comes
    twice runs once.
    """
    found = next(CronSim(cron, datetime.fromtimestamp(after, ZoneInfo(time_zone))), None)
    return None if found is None else found.timestamp()


@dataclass(frozen=True, slots=True)
class DueRun:
    """What to do at a due time: run ``planned`` (``None``: nothing), then wait for ``following``."""

    planned: float | None
    following: float | None


def find_due(cron: str, time_zone: str, planned: float, now: float, catch_up: CatchUp) -> DueRun:
    """Return what is due at ``now`` for a schedule whose next time was ``planned``, which has come."""
    recent: deque[float] = deque(maxlen=MAX_CAUGHT_UP)
    moment: float | None = planned
    steps = 0
    while moment is not None and moment <= now:
        recent.append(moment)
        steps += 1
        if steps == _MAX_STEPS:
            # Many times an hour: those of the last days are about as many as are made up for.
            moment = max(moment, now - _RECENT.total_seconds())
        moment = next_time(cron, time_zone, moment)
    if catch_up == "all":
        first = recent[0]
        return DueRun(first, recent[1] if len(recent) > 1 else moment)
    is_on_time = now - recent[-1] <= ON_TIME_SECONDS
    return DueRun(recent[-1] if is_on_time or catch_up == "last" else None, moment)


def _invalid(pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code="invalid_body", field_errors=(FieldError(pointer, detail),))


class _LostRun(Exception):  # noqa: N818  ends a transaction
    """Another replica ran it, or the schedule was changed meanwhile."""


class SchedulesApi:
    """The operations on schedules, and :attr:`loop`, which submits their tasks."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        accounts: Accounts,
        submitter: TaskSubmitter,
        idempotency: SqlIdempotencyStore,
        clock: Clock,
        ids: IdGenerator,
        logger: Logger,
    ) -> None:
        self._db = db
        self._log = log
        self._accounts = accounts
        self._submitter = submitter
        self._idempotency = idempotency
        self._clock = clock
        self._ids = ids
        self._logger = logger
        self.loop = BackgroundLoop("schedules", self.run_due, interval=POLL_SECONDS, restart=True, log=logger)

    async def create(self, call: IncomingCall, body: ScheduleRequest) -> OperationResponse:
        """Create a schedule. Its task is validated now, and again at each time."""
        check_times(body.cron, body.time_zone)
        if body.deadline is not None:
            raise _invalid("/deadline", "The task of a schedule has no deadline; give it max_time_seconds.")
        key, principal = IdempotencyKey.of(call), call.authority.principal
        if effect := await self._idempotency.find_effect(key):
            return await self._respond(call.tenant, effect)
        task = Task(**{name: getattr(body, name) for name in Task.__struct_fields__})
        # Before it is stored: a fault is an answer to its author now, and not a failure in the log at night.
        task = (await self._submitter.validate(task, principal.tenant)).contract
        scopes = await self._accounts.current_scopes(principal.cred)
        now = self._clock.now()
        schedule_id = self._ids.hex()
        row = {
            "id": schedule_id,
            "tenant": principal.tenant,
            "cron": " ".join(body.cron.split()),
            "time_zone": body.time_zone,
            "catch_up": body.catch_up,
            "overlap": body.overlap,
            "contract": msgspec.to_builtins(task),
            "scopes": str(scopes),
            "sub": principal.sub,
            "cred": principal.cred,
            "state": "active",
            "next_at": next_time(body.cron, body.time_zone, now),
            "created_at": now,
        }
        if row["next_at"] is None:
            raise _invalid("/cron", "The expression has no time in the next 50 years.")
        async with self._db.transaction() as tx:
            mine = select(func.count()).select_from(schedules).where(schedules.c.tenant == principal.tenant)
            if await tx.scalar(mine) >= MAX_SCHEDULES:
                raise OctoError(f"A tenant may have {MAX_SCHEDULES} schedules.", code="state_conflict")
            await tx.execute(tx.insert(schedules).values(row))
            detail = {"cron": row["cron"], "time_zone": body.time_zone}
            await record_audit(tx, actor_from_call(call), "schedule.created", schedule_id, now, detail)
            await self._idempotency.record_effect(tx, key, schedule_id)
        return await self._respond(call.tenant, schedule_id)

    async def _respond(self, tenant: str, schedule_id: str) -> OperationResponse:
        view = await self._view(tenant, schedule_id)
        return OperationResponse(view, 201, {"Location": f"/schedules/{schedule_id}"})

    async def list(self, call: IncomingCall, _body: object) -> ScheduleList:
        """Return the tenant's schedules."""
        query = select(schedules).where(schedules.c.tenant == call.tenant)
        async with self._db.read() as conn:
            rows = await conn.all(query.order_by(schedules.c.created_at, schedules.c.id).limit(MAX_SCHEDULES))
        return ScheduleList(tuple(_to_view(row_to_dict(row)) for row in rows))

    async def read(self, call: IncomingCall, _body: object) -> ScheduleView:
        """Return a schedule with its last runs."""
        return await self._view(call.tenant, call.path["schedule_id"])

    async def _view(self, tenant: str, schedule_id: str) -> ScheduleView:
        last = select(schedule_runs).where(schedule_runs.c.schedule_id == schedule_id)
        async with self._db.read() as conn:
            row = await conn.first(select(schedules).where(*_is_schedule(tenant, schedule_id)))
            runs = await conn.all(last.order_by(schedule_runs.c.planned_at.desc()).limit(SHOWN_RUNS))
        if row is None:
            raise _not_found()
        return _to_view(row_to_dict(row), tuple(map(_to_run, runs)))

    async def pause(self, call: IncomingCall, _body: object) -> ScheduleView:
        """Pause a schedule."""
        return await self._set_state(call, "paused")

    async def resume(self, call: IncomingCall, _body: object) -> ScheduleView:
        """Resume a schedule at its next planned time."""
        return await self._set_state(call, "active")

    async def _set_state(self, call: IncomingCall, state: str) -> ScheduleView:
        schedule_id, now = call.path["schedule_id"], self._clock.now()
        async with self._db.transaction() as tx:
            where = _is_schedule(call.tenant, schedule_id)
            row = await tx.first(select(schedules).where(*where).with_for_update())
            if row is None:
                raise _not_found()
            if row["state"] == "ended":
                raise OctoError(f"The schedule has ended: {row['reason']}", code="state_conflict")
            if row["state"] != state:
                # From now: the times that fell into the pause were not missed, so ``catch_up`` does not run them.
                following = next_time(row["cron"], row["time_zone"], now) if state == "active" else None
                await tx.execute(update(schedules).where(*where).values(state=state, next_at=following))
                action = "schedule.resumed" if state == "active" else "schedule.paused"
                await record_audit(tx, actor_from_call(call), action, schedule_id, now)
        return await self._view(call.tenant, schedule_id)

    async def run_now(self, call: IncomingCall, _body: object) -> OperationResponse:
        """Submit the task of a schedule now, with the caller's authority within that of the schedule."""
        key, schedule_id = IdempotencyKey.of(call), call.path["schedule_id"]
        store = self._submitter.store
        if effect := await self._idempotency.find_effect(key):
            return OperationResponse(await store.view(effect, call.tenant), 201, {"Location": f"/tasks/{effect}"})
        view = await self._view(call.tenant, schedule_id)
        principal = call.authority.principal
        scopes = ScopeSet.parse(view.scope).intersection(await self._accounts.current_scopes(principal.cred))
        submission = Submission(principal, scopes, view.task, call.correlation_id, call.trace.traceparent)

        async def record(tx: Transaction, task_id: str) -> None:
            await record_audit(
                tx, actor_from_call(call), "task.created", task_id, self._clock.now(), {"schedule": schedule_id}
            )
            await self._idempotency.record_effect(tx, key, task_id)

        task = await self._submitter.submit(submission, record)
        return OperationResponse(task, 201, {"Location": f"/tasks/{task.task_id}"})

    async def delete(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Delete a schedule."""
        key, schedule_id = IdempotencyKey.of(call), call.path["schedule_id"]
        if not await self._idempotency.find_effect(key):
            async with self._db.transaction() as tx:
                gone = await tx.execute(delete(schedules).where(*_is_schedule(call.tenant, schedule_id)))
                if gone.rowcount != 1:
                    raise _not_found()
                await record_audit(tx, actor_from_call(call), "schedule.deleted", schedule_id, self._clock.now())
                await self._idempotency.record_effect(tx, key, "deleted")
        return Acknowledgement()

    async def run_due(self) -> None:
        """Submit the tasks of all schedules whose time has come."""
        while True:
            due = select(schedules).where(schedules.c.state == "active", schedules.c.next_at <= self._clock.now())
            async with self._db.read() as conn:
                rows = await conn.all(due.order_by(schedules.c.next_at).limit(BATCH))
            for row in rows:
                try:
                    await self._run_due(row_to_dict(row))
                except _LostRun:
                    continue
            # Each of them moved on, so that the next round finds others.
            if len(rows) < BATCH:
                return

    async def _run_due(self, row: Mapping[str, Any]) -> None:
        now = self._clock.now()
        # A long outage means many times, and the event loop must not wait for them.
        due = await asyncio.to_thread(find_due, row["cron"], row["time_zone"], row["next_at"], now, row["catch_up"])
        if due.planned is None:
            await self._record(row, row["next_at"], due.following, "skipped", "It was missed while nothing ran.")
            return
        planned = due.planned
        try:
            own = await self._accounts.current_scopes(row["cred"])
        except OctoError as error:
            if error.code != "authority_missing":
                raise
            await self._end_one(row, "The credential that it was created with was revoked.")
            return
        # The schedule outlives changes of its creator's rights: it gets what both had then and have now.
        scopes = ScopeSet.parse(row["scopes"]).intersection(own)
        if not scopes.allows("tasks:create"):
            await self._record(row, planned, due.following, "failed", "Its creator may no longer submit tasks.")
            return
        if row["overlap"] == "skip" and await self._is_open(row["last_task_id"]):
            await self._record(row, planned, due.following, "skipped", "The task of the time before is still open.")
            return
        actor = _actor(row)
        submission = Submission(actor.principal, scopes, _task_of(row), f"schedule-{row['id']}", "")

        async def record(tx: Transaction, task_id: str) -> None:
            await self._move_on(tx, row, planned, due.following, "started", task_id=task_id)
            detail = {"schedule": row["id"], "planned_at": format_rfc3339(planned)}
            await record_audit(tx, actor, "task.created", task_id, now, detail)

        try:
            await self._submitter.submit(submission, record)
        except OctoError as error:
            # Refused for good, such as a file that is gone; an outage is tried again in the next round.
            if error.code not in contract.SUBMISSION_ERRORS and error.code != "file_encrypted":
                raise
            await self._record(row, planned, due.following, "failed", error.detail)

    async def _record(
        self, row: Mapping[str, Any], planned: float, following: float | None, outcome: str, reason: str
    ) -> None:
        async with self._db.transaction() as tx:
            await self._move_on(tx, row, planned, following, outcome, reason=reason)
        if outcome == "failed":
            self._logger.warning("schedule.failed", schedule=row["id"], reason=reason)

    async def _move_on(
        self,
        tx: Transaction,
        row: Mapping[str, Any],
        planned: float,
        following: float | None,
        outcome: str,
        *,
        task_id: str = "",
        reason: str = "",
    ) -> None:
        """Record a run and the time that follows; raise :class:`_LostRun` unless the schedule is as it was read."""
        values: dict[str, object] = {"next_at": following, **({"last_task_id": task_id} if task_id else {})}
        if following is None:
            values |= {"state": "ended", "reason": "It has no further time."}
        where = (schedules.c.id == row["id"], schedules.c.state == "active", schedules.c.next_at == row["next_at"])
        if (await tx.execute(update(schedules).where(*where).values(**values))).rowcount != 1:
            raise _LostRun
        run = {"schedule_id": row["id"], "planned_at": planned, "outcome": outcome, "task_id": task_id}
        added = await tx.execute(tx.insert(schedule_runs).values(reason=reason, **run).on_conflict_do_nothing())
        if added.rowcount != 1:
            raise _LostRun
        mine = schedule_runs.c.schedule_id == row["id"]
        kept = select(schedule_runs.c.planned_at).where(mine).order_by(schedule_runs.c.planned_at.desc())
        oldest = await tx.scalar(kept.offset(MAX_RUNS - 1).limit(1))
        if oldest is not None:
            await tx.execute(delete(schedule_runs).where(mine, schedule_runs.c.planned_at < oldest))
        data: dict[str, object] = {"schedule_id": row["id"], "planned_at": format_rfc3339(planned)}
        data |= {"task_id": task_id} if task_id else {"reason": reason}
        if outcome == "started":
            await self._append_event(tx, "schedule.started", row, data)
        else:
            await self._append_event(tx, "schedule.skipped" if outcome == "skipped" else "schedule.failed", row, data)

    async def _is_open(self, task_id: str) -> bool:
        if not task_id:
            return False
        async with self._db.read() as conn:
            return await conn.scalar(select(tasks.c.status).where(tasks.c.task_id == task_id)) in OPEN_STATES

    async def end_all(
        self, tx: Transaction, actor: Actor, reason: str, *, sub: str | None = None, cred: str | None = None
    ) -> None:
        """End every schedule of a principal or a credential in the actor's tenant, in the caller's transaction."""
        owner = schedules.c.sub == sub if sub is not None else schedules.c.cred == cred
        mine = (schedules.c.tenant == actor.principal.tenant, owner, schedules.c.state != "ended")
        rows = await tx.all(select(schedules).where(*mine).order_by(schedules.c.id).with_for_update())
        for row in rows:
            await self._end(tx, row_to_dict(row), actor, reason)

    async def _end_one(self, row: Mapping[str, Any], reason: str) -> None:
        async with self._db.transaction() as tx:
            current = await tx.first(select(schedules).where(schedules.c.id == row["id"]).with_for_update())
            if current is not None and current["state"] == "active":
                await self._end(tx, row_to_dict(current), _actor(row), reason)

    async def _end(self, tx: Transaction, row: Mapping[str, Any], actor: Actor, reason: str) -> None:
        values = {"state": "ended", "next_at": None, "reason": reason}
        await tx.execute(update(schedules).where(schedules.c.id == row["id"]).values(**values))
        await record_audit(tx, actor, "schedule.ended", row["id"], self._clock.now(), {"reason": reason})
        await self._append_event(tx, "schedule.ended", row, {"schedule_id": row["id"], "reason": reason})

    async def _append_event(
        self, tx: Transaction, event_type: str, row: Mapping[str, Any], data: dict[str, object]
    ) -> None:
        about = {"subject": f"schedule/{row['id']}", "tenant": row["tenant"], "source": "orchestrator"}
        await self._log.append(tx, event_type, data=data, **about)

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [
            implement(contract.CREATE_SCHEDULE, self.create),
            implement(contract.LIST_SCHEDULES, self.list),
            implement(contract.READ_SCHEDULE, self.read),
            implement(contract.PAUSE_SCHEDULE, self.pause),
            implement(contract.RESUME_SCHEDULE, self.resume),
            implement(contract.RUN_SCHEDULE, self.run_now),
            implement(contract.DELETE_SCHEDULE, self.delete),
        ]


def _actor(row: Mapping[str, Any]) -> Actor:
    return Actor(Principal(row["sub"], row["cred"], row["tenant"]), service="schedule")


def _is_schedule(tenant: str, schedule_id: str) -> tuple[Any, ...]:
    return schedules.c.id == schedule_id, schedules.c.tenant == tenant


def _task_of(row: Mapping[str, Any]) -> Task:
    return msgspec.convert(row["contract"], Task)


def _to_view(row: Mapping[str, Any], runs: tuple[ScheduleRun, ...] = ()) -> ScheduleView:
    task = _task_of(row)
    return ScheduleView(
        id=row["id"],
        cron=row["cron"],
        time_zone=row["time_zone"],
        catch_up=row["catch_up"],
        overlap=row["overlap"],
        state=row["state"],
        goal=task.goal,
        task=task,
        scope=row["scopes"],
        created_by=row["sub"],
        created_at=format_rfc3339(row["created_at"]),
        next_run=None if row["next_at"] is None else format_rfc3339(row["next_at"]),
        reason=row["reason"],
        runs=runs,
    )


def _to_run(row: Mapping[Any, Any]) -> ScheduleRun:
    return ScheduleRun(format_rfc3339(row["planned_at"]), row["outcome"], row["task_id"], row["reason"])


def _not_found() -> OctoError:
    return OctoError("There is no such schedule.", code="not_found")
