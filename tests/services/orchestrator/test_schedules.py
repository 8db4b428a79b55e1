"""Schedules: planned times over clock changes, catch-up, overlap, two replicas, and the authority of the creator."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from databases import Backend
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_kit import OrchestratorHarness, problem
from sqlalchemy import select, update

from octollm.capability import Principal
from octollm.clock import SystemClock, Uuid7Generator, format_rfc3339
from octollm.contracts.approvals import ApprovalPolicy
from octollm.contracts.schedules import CatchUp, ScheduleList, ScheduleRun, ScheduleView
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator import schedules as module
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import Actor
from octollm.services.orchestrator.files import FileStore
from octollm.services.orchestrator.schedules import SchedulesApi, check_times, find_due, next_time
from octollm.services.orchestrator.submission import QueueBound, TaskDefaults, TaskSubmitter
from octollm.services.orchestrator.subtasks import SubTasks
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import schedule_runs, schedules, tasks
from octollm.tasks.store import TaskStore
from octollm.telemetry import get_logger
from octollm.testing import ManualClock, wait_until

MINUTE = 60.0
HOUR = 3600.0
DAY = 24 * HOUR


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def times(cron: str, zone: str, after: str, count: int) -> list[str]:
    moment: float | None = at(after)
    found: list[str] = []
    for _ in range(count):
        assert moment is not None
        moment = next_time(cron, zone, moment)
        assert moment is not None
        found.append(datetime.fromtimestamp(moment, UTC).strftime("%m-%d %H:%M"))
    return found


def test_a_weekly_time_keeps_its_local_hour_over_the_year() -> None:
    # Mondays at seven in Berlin: six o'clock UTC in winter, five in summer.
    assert times("0 7 * * 1", "Europe/Berlin", "2026-03-20T00:00:00+00:00", 3) == [
        "03-23 06:00",
        "03-30 05:00",
        "04-06 05:00",
    ]


def test_a_time_in_the_skipped_hour_runs_once_after_it() -> None:
    # 2026-03-29: the clocks of Berlin go from 02:00 to 03:00 at 01:00 UTC.
    assert times("30 2 * * *", "Europe/Berlin", "2026-03-28T02:00:00+00:00", 3) == [
        "03-29 01:00",
        "03-30 00:30",
        "03-31 00:30",
    ]
    assert times("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:15:00+00:00", 3) == [
        "03-29 00:30",
        "03-29 01:00",
        "03-29 01:30",
    ]


def test_a_fixed_time_in_the_doubled_hour_runs_once_and_an_interval_runs_on() -> None:
    # 2026-10-25: the clocks of Berlin go from 03:00 back to 02:00 at 01:00 UTC.
    assert times("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00+00:00", 2) == ["10-25 00:30", "10-26 01:30"]
    assert times("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:15:00+00:00", 4) == [
        "10-25 00:30",
        "10-25 01:00",
        "10-25 01:30",
        "10-25 02:00",
    ]


@given(
    st.sampled_from(["*/7 * * * *", "30 2 * * *", "0 0 29 2 *", "15 */5 * * 1-5", "0 12 1 * *"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.floats(1.5e9, 2e9),
)
def test_the_next_time_is_always_later(cron: str, zone: str, after: float) -> None:
    found = next_time(cron, zone, after)
    assert found is not None
    assert found > after
    assert found == int(found)


@pytest.mark.parametrize(
    ("cron", "zone", "pointer"),
    [
        ("61 * * * *", "UTC", "/cron"),
        ("* * * *", "UTC", "/cron"),
        ("* * * * * *", "UTC", "/cron"),
        ("@daily", "UTC", "/cron"),
        ("", "UTC", "/cron"),
        ("0 0 * * \x00", "UTC", "/cron"),
        ("0 7 * * 1", "Mars/Olympus", "/time_zone"),
        ("0 7 * * 1", "../../etc/passwd", "/time_zone"),
        ("0 7 * * 1", "", "/time_zone"),
    ],
)
def test_what_is_no_time_is_refused_with_its_place(cron: str, zone: str, pointer: str) -> None:
    with pytest.raises(OctoError) as caught:
        check_times(cron, zone)
    assert [fault.pointer for fault in caught.value.field_errors] == [pointer]


def test_what_is_made_up_for_follows_the_policy() -> None:
    start = at("2026-01-01T00:00:00+00:00")
    for policy in ("none", "last", "all"):
        due = find_due("0 * * * *", "UTC", start, start + 5, policy)
        assert (due.planned, due.following) == (start, start + HOUR)
    late = start + 3 * HOUR + 30 * MINUTE
    assert find_due("0 * * * *", "UTC", start, late, "none") == module.DueRun(None, start + 4 * HOUR)
    assert find_due("0 * * * *", "UTC", start, late, "last") == module.DueRun(start + 3 * HOUR, start + 4 * HOUR)
    assert find_due("0 * * * *", "UTC", start, late, "all") == module.DueRun(start, start + HOUR)
    # On time after an outage: the last time is not missed.
    assert find_due("0 * * * *", "UTC", start, start + 3 * HOUR + 1, "none").planned == start + 3 * HOUR


def test_a_long_outage_is_bounded() -> None:
    start = at("2026-01-01T00:00:00+00:00")
    now = start + 300 * DAY
    due = find_due("* * * * *", "UTC", start, now, "all")
    assert due.planned == now - (module.MAX_CAUGHT_UP - 1) * MINUTE
    assert find_due("* * * * *", "UTC", start, now, "last").planned == now


class Installation:
    """The parts of an orchestrator that schedules need, and two replicas of them on one database."""

    def __init__(self, db: Database, clock: ManualClock) -> None:
        self.db = db
        self.clock = clock
        self.ids = Uuid7Generator(SystemClock())
        self.log = EventLog(db, clock, self.ids)
        self.accounts = Accounts(db, clock, self.ids, lambda _tenant: ("coder",))
        self.woken = 0
        self.replicas = [self._replica(), self._replica()]

    def _replica(self) -> SchedulesApi:
        registry: Any = SimpleNamespace(
            arm_names=lambda _tenant: frozenset({"coder"}),
            operation_scopes=lambda _tenant: frozenset(),
            list_arms=lambda _tenant: (),
        )
        worker: Any = SimpleNamespace(wake=self._wake)
        submitter = TaskSubmitter(
            TaskStore(self.db, self.log, self.clock),
            FileStore(self.db, self.clock),
            registry,
            worker,
            TaskDefaults(1000, 600.0, ApprovalPolicy()),
            self.clock,
            self.ids,
            cast("SubTasks", None),  # a schedule submits none
            QueueBound(self.db, self.clock, 0, 0),
        )
        idempotency = SqlIdempotencyStore(self.db, self.ids.hex())
        return SchedulesApi(
            self.db, self.log, self.accounts, submitter, idempotency, self.clock, self.ids, get_logger("orchestrator")
        )

    def _wake(self) -> None:
        self.woken += 1

    async def add(self, cron: str = "0 * * * *", *, catch_up: CatchUp = "last", overlap: str = "allow") -> str:
        """Add a schedule of a new key; return its id."""
        await self.accounts.set_local_key("octo_local_x")
        creator = Actor(Principal("local-user", "local", "local"))
        key = (await self.accounts.create("nightly", "user", creator, None)).key
        schedule_id = self.ids.hex()
        async with self.db.transaction() as tx:
            await tx.execute(
                tx.insert(schedules).values(
                    id=schedule_id,
                    tenant="local",
                    cron=cron,
                    time_zone="UTC",
                    catch_up=catch_up,
                    overlap=overlap,
                    contract={"goal": "Report"},
                    scopes="tasks:* files:*",
                    sub=f"key-{key.id}",
                    cred=key.id,
                    state="active",
                    next_at=next_time(cron, "UTC", self.clock.now()),
                    created_at=self.clock.now(),
                )
            )
        self.key_id = key.id
        return schedule_id

    async def tick(self) -> None:
        """Let both replicas work at once."""
        await asyncio.gather(*(replica.run_due() for replica in self.replicas))

    async def runs(self, schedule_id: str) -> list[tuple[float, str]]:
        query = select(schedule_runs).where(schedule_runs.c.schedule_id == schedule_id)
        async with self.db.read() as conn:
            rows = await conn.all(query.order_by(schedule_runs.c.planned_at))
        return [(row["planned_at"], row["outcome"]) for row in rows]

    async def count_tasks(self) -> int:
        async with self.db.read() as conn:
            return len(await conn.all(select(tasks.c.task_id)))

    async def events(self, schedule_id: str) -> list[str]:
        found = await self.log.read_subject(f"schedule/{schedule_id}", tenant="local")
        return [event.event_type for event in found]

    async def state(self, schedule_id: str) -> dict[str, Any]:
        async with self.db.read() as conn:
            row = await conn.first(select(schedules).where(schedules.c.id == schedule_id))
        assert row is not None
        return dict(row)


@pytest.fixture
async def kit(backend: Backend) -> AsyncIterator[Installation]:
    clock = ManualClock(at("2026-01-01T00:00:30+00:00"))
    async with open_database(backend.url("octollm_orchestrator"), clock=clock) as db:
        await migrate(db, "orchestrator")
        yield Installation(db, clock)


async def test_two_replicas_run_each_time_once(kit: Installation) -> None:
    schedule_id = await kit.add()
    start = at("2026-01-01T01:00:00+00:00")
    for hour in range(5):
        kit.clock.time = start + hour * HOUR - 1
        await kit.tick()
        kit.clock.time = start + hour * HOUR + 1
        await kit.tick()
        await kit.tick()
    assert await kit.runs(schedule_id) == [(start + hour * HOUR, "started") for hour in range(5)]
    assert await kit.count_tasks() == 5
    assert await kit.events(schedule_id) == ["schedule.started"] * 5
    assert kit.woken == 5
    assert (await kit.state(schedule_id))["next_at"] == start + 5 * HOUR


@pytest.mark.parametrize(("catch_up", "started"), [("none", 0), ("last", 1), ("all", 6)])
async def test_an_outage_is_made_up_for(kit: Installation, catch_up: CatchUp, started: int) -> None:
    schedule_id = await kit.add(catch_up=catch_up)
    kit.clock.time = at("2026-01-01T06:30:00+00:00")
    for _ in range(8):
        await kit.tick()
    outcomes = [outcome for _, outcome in await kit.runs(schedule_id)]
    assert outcomes.count("started") == await kit.count_tasks() == started
    assert (await kit.state(schedule_id))["next_at"] == at("2026-01-01T07:00:00+00:00")


async def test_a_time_is_left_out_while_the_last_task_is_open(kit: Installation) -> None:
    schedule_id = await kit.add(overlap="skip")
    first = at("2026-01-01T01:00:00+00:00")
    for hour in range(2):
        kit.clock.time = first + hour * HOUR
        await kit.tick()
    async with kit.db.transaction() as tx:
        await tx.execute(update(tasks).values(status="completed"))
    kit.clock.time = first + 2 * HOUR
    await kit.tick()
    assert [outcome for _, outcome in await kit.runs(schedule_id)] == ["started", "skipped", "started"]
    assert await kit.events(schedule_id) == ["schedule.started", "schedule.skipped", "schedule.started"]


async def test_a_schedule_ends_with_the_credential_of_its_creator(kit: Installation) -> None:
    schedule_id = await kit.add()
    actor = Actor(Principal("local-user", "local", "local"))
    async with kit.db.transaction() as tx:
        await kit.accounts.revoke(kit.key_id, actor, tx)
    kit.clock.time = at("2026-01-01T01:00:01+00:00")
    await kit.tick()
    state = await kit.state(schedule_id)
    assert (state["state"], state["next_at"]) == ("ended", None)
    assert await kit.count_tasks() == 0
    assert await kit.events(schedule_id) == ["schedule.ended"]


async def test_a_task_that_is_refused_is_a_failed_run_and_the_schedule_goes_on(kit: Installation) -> None:
    schedule_id = await kit.add()
    async with kit.db.transaction() as tx:
        contract = {"goal": "Report", "assigned_arm": "gone"}
        await tx.execute(update(schedules).values(contract=contract))
    kit.replicas[0]._submitter.registry.refresh_on_miss = _nothing  # pyright: ignore[reportPrivateUsage]
    kit.replicas[1]._submitter.registry.refresh_on_miss = _nothing  # pyright: ignore[reportPrivateUsage]
    kit.clock.time = at("2026-01-01T01:00:01+00:00")
    await kit.tick()
    assert [outcome for _, outcome in await kit.runs(schedule_id)] == ["failed"]
    assert (await kit.state(schedule_id))["state"] == "active"


async def _nothing() -> None:
    return None


async def test_the_runs_that_are_kept_are_bounded(kit: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 3)
    schedule_id = await kit.add()
    for hour in range(1, 7):
        kit.clock.time = at("2026-01-01T00:00:00+00:00") + hour * HOUR
        await kit.tick()
    assert len(await kit.runs(schedule_id)) == 3


def view(answer: Any) -> ScheduleView:
    assert answer.status in (200, 201), answer.body
    return msgspec.json.decode(answer.body, type=ScheduleView)


BODY = {"goal": "Report", "cron": "0 7 * * 1", "time_zone": "Europe/Berlin"}


async def test_a_schedule_over_http(orch: OrchestratorHarness) -> None:
    made = await orch.send("POST", "/schedules", BODY, Idempotency_Key="one")
    again = await orch.send("POST", "/schedules", BODY, Idempotency_Key="one")
    schedule = view(made)
    assert view(again).id == schedule.id
    assert made.headers["location"] == f"/schedules/{schedule.id}"
    assert schedule.next_run is not None
    assert datetime.fromisoformat(schedule.next_run).weekday() == 0
    path = f"/schedules/{schedule.id}"
    assert view(await orch.send("POST", f"{path}/pause")).next_run is None
    assert view(await orch.send("POST", f"{path}/pause")).state == "paused"
    assert view(await orch.send("POST", f"{path}/resume")).next_run == schedule.next_run
    task = msgspec.json.decode((await orch.send("POST", f"{path}/run", Idempotency_Key="now")).body)
    repeated = msgspec.json.decode((await orch.send("POST", f"{path}/run", Idempotency_Key="now")).body)
    assert task["task_id"] == repeated["task_id"]
    assert (await orch.finished(task["task_id"])).status == "completed"
    listed = msgspec.json.decode((await orch.send("GET", "/schedules")).body, type=ScheduleList)
    assert [each.id for each in listed.schedules] == [schedule.id]
    for _ in range(2):
        assert (await orch.send("DELETE", path, Idempotency_Key="gone")).status == 200
    assert (await orch.send("DELETE", path)).status == 404


async def test_a_due_schedule_of_a_running_orchestrator_completes_a_task(orch: OrchestratorHarness) -> None:
    schedule = view(await orch.send("POST", "/schedules", BODY))
    planned = float(int(time.time()))

    def bring_forward() -> None:
        with contextlib.closing(sqlite3.connect(orch.home / "data" / "orchestrator.db", timeout=10)) as db, db:
            db.execute("UPDATE schedules SET next_at = ?", (planned,))

    # In a thread: the service, in this event loop, may hold the lock that it waits for.
    await asyncio.to_thread(bring_forward)

    async def runs() -> tuple[ScheduleRun, ...]:
        return view(await orch.send("GET", f"/schedules/{schedule.id}")).runs

    await wait_until(runs, description="the loop of the service found it", timeout=20)
    [run] = await runs()
    assert (run.outcome, run.planned_at) == ("started", format_rfc3339(planned))
    assert (await orch.finished(run.task_id)).output == "done: Report"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cron": "61 * * * *"}, "invalid_body"),
        ({"cron": "0 0 30 2 *"}, "invalid_body"),
        ({"time_zone": "Mars"}, "invalid_body"),
        ({"deadline": "2030-01-02T03:04:05Z"}, "invalid_body"),
        ({"catch_up": "some"}, "invalid_body"),
        ({"goal": " "}, "goal_invalid"),
        ({"assigned_arm": "nobody"}, "arm_unknown"),
        ({"crons": "* * * * *"}, "unknown_field"),
    ],
)
async def test_a_wrong_schedule_is_refused(orch: OrchestratorHarness, change: dict[str, Any], code: str) -> None:
    assert problem(await orch.send("POST", "/schedules", {**BODY, **change}))["code"] == code


async def test_the_number_of_schedules_is_bounded(orch: OrchestratorHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SCHEDULES", 1)
    view(await orch.send("POST", "/schedules", BODY))
    assert problem(await orch.send("POST", "/schedules", BODY))["code"] == "state_conflict"


async def test_another_tenant_sees_no_schedule(orch: OrchestratorHarness) -> None:
    schedule = view(await orch.send("POST", "/schedules", BODY))
    made = await orch.send("POST", "/keys", {"name": "other", "scope": "user", "tenant": "other"})
    mine = orch.bearer
    orch.bearer = await orch.login(msgspec.json.decode(made.body)["secret"])
    path = f"/schedules/{schedule.id}"
    for method, where in (
        ("GET", path),
        ("DELETE", path),
        *(("POST", f"{path}/{x}") for x in ("pause", "resume", "run")),
    ):
        assert (await orch.send(method, where)).status == 404
    listed = msgspec.json.decode((await orch.send("GET", "/schedules")).body, type=ScheduleList)
    assert listed.schedules == ()
    orch.bearer = mine
    assert view(await orch.send("GET", path)).state == "active"


async def test_revoking_a_key_or_a_principal_ends_their_schedules(orch: OrchestratorHarness) -> None:
    owner = orch.bearer
    for kind in ("key", "sub"):
        made = msgspec.json.decode((await orch.send("POST", "/keys", {"name": kind, "scope": "user"})).body)
        orch.bearer = await orch.login(made["secret"])
        schedule = view(await orch.send("POST", "/schedules", BODY))
        orch.bearer = owner
        if kind == "key":
            assert (await orch.send("DELETE", f"/keys/{made['key']['id']}")).status == 200
        else:
            body = {"kind": "sub", "value": f"key-{made['key']['id']}"}
            assert (await orch.send("POST", "/revocations", body)).status == 200
        ended = view(await orch.send("GET", f"/schedules/{schedule.id}"))
        assert (ended.state, ended.next_run) == ("ended", None)
        assert "revoked" in ended.reason
        assert problem(await orch.send("POST", f"/schedules/{schedule.id}/resume"))["code"] == "state_conflict"
