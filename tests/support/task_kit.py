"""Tasks without HTTP: a migrated database in a file, a clock set by hand, and services that are plain functions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from databases import Backend

from octollm.capability import ScopeSet
from octollm.clock import Clock, SystemClock, Uuid7Generator
from octollm.contracts.operations import AcceptResult
from octollm.contracts.task import Budget, ExecuteResult, Plan, PlanStep, Task
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Database, RedisKeys, TextStream, open_database, open_redis
from octollm.storage.engines import open_sqlite
from octollm.storage.migrations import migrate
from octollm.tasks.approvals import ApprovalStore
from octollm.tasks.attempts import AttemptReader
from octollm.tasks.calls import TaskCalls, TaskTokenMinter
from octollm.tasks.changes import NewTask
from octollm.tasks.leases import TaskLeases
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerDependencies
from octollm.tasks.store import TaskStore
from octollm.telemetry import Metrics, Tracer

START = 1_800_000_000.0
TENANT = "acme"
APPROVAL_SECONDS = 86_400.0


class ManualClock:
    """A clock that stands still until it is advanced."""

    def __init__(self, time: float = START) -> None:
        self.time = time

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


@functools.cache
def _migrated_file() -> bytes:
    """Return a SQLite file with the orchestrator's schema: copying it is faster than migrating for each test."""

    async def build(path: Path) -> None:
        async with open_database(f"sqlite:///{path}", clock=SystemClock()) as db:
            await migrate(db, "orchestrator")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        path = Path(folder) / "schema.db"
        thread.submit(lambda: asyncio.run(build(path))).result()
        return path.read_bytes()


@contextlib.asynccontextmanager
async def open_task_database(clock: Clock, backend: Backend | None = None) -> AsyncGenerator[Database]:
    """Open a private database with the orchestrator's schema."""
    if backend is not None and backend.base is not None:
        async with open_database(backend.url("octollm_orchestrator"), clock=clock) as db:
            await migrate(db, "orchestrator")
            yield db
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "orchestrator.db"
        path.write_bytes(_migrated_file())
        async with open_sqlite(path, clock, durable=False) as db:
            yield db


@dataclass(frozen=True)
class ServiceRequest:
    """One call that the orchestrator made: ``operation`` such as ``coder.execute``, and its decoded body."""

    operation: str
    key: str | None
    body: dict[str, Any]
    token: str
    on_event: Any


Handler = Callable[[ServiceRequest], Awaitable[object]]


class FakeServices:
    """In the place of the service client: each operation is a function, and every request is recorded."""

    def __init__(self) -> None:
        self.requests: list[ServiceRequest] = []
        self.handlers: dict[str, Handler] = {"judge.accept": accept_all}

    async def call(self, call: Any, answer_type: type[Any], *, on_event: Any = None) -> Any:
        request = ServiceRequest(call.target.operation, call.key, msgspec.json.decode(call.body), call.bearer, on_event)
        self.requests.append(request)
        result = await self.handlers[request.operation](request)
        # Through JSON, as on the wire: a caller may ask for a type with more members than the handler returned.
        return msgspec.json.decode(msgspec.json.encode(result), type=answer_type)

    def keys_of(self, operation: str) -> list[str]:
        """Return the last part of the idempotency keys of an operation's requests, in order."""
        return [(each.key or "").split(":", 1)[-1] for each in self.requests if each.operation == operation]


class FakeMinter:
    """Mints tokens that name their scope and epoch."""

    def mint(self, task: TaskRecord, scope: str, *_: object, **__: object) -> str:
        return f"{scope}@{task.epoch}"

    def may_lead_to(self, scope: str, call: str, _authority: ScopeSet) -> bool:
        """Say that the executor may reach the network, and nobody else."""
        return (scope, call) == ("executor:execute", "executor:http")


class RecordingLog:
    """Records the names of logged events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def debug(self, event: str, **_: object) -> None:
        self.events.append(event)

    info = warning = error = debug


async def accept_all(_request: ServiceRequest) -> AcceptResult:
    return AcceptResult(accepted=True, score=1.0)


def answer(output: str) -> Handler:
    """Return an arm that answers every step alike."""

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        return ExecuteResult(output)

    return execute


def plan_of(*steps: PlanStep) -> Handler:
    """Return a planner with one plan."""

    async def plan(_request: ServiceRequest) -> Plan:
        return Plan(steps)

    return plan


def plan_step(name: str, *depends_on: str, arm: str = "coder") -> PlanStep:
    return PlanStep(name, name.upper(), arm, f"goal of {name}", depends_on)


def raises(error: OctoError) -> Handler:
    """Return a service that fails."""

    async def fail(_request: ServiceRequest) -> object:
        raise error

    return fail


@dataclass(frozen=True)
class TaskKit:
    """One orchestrator's parts around tasks; ``services`` answers its calls."""

    db: Database
    clock: ManualClock
    ids: Uuid7Generator
    log: EventLog
    store: TaskStore
    approvals: ApprovalStore
    ledger: BudgetLedger
    services: FakeServices
    deps: RunnerDependencies

    async def submit(self, *, budget: Budget | None = None, seconds: float = 600.0, **contract: Any) -> str:
        """Store a task and return its id."""
        task = Task(contract.pop("goal", "do it"), budget=budget or Budget(), **contract)
        task_id = f"task-{self.ids.hex()}"
        await self.store.create(
            NewTask(task_id, TENANT, "ada", "key-1", "", task, "corr", "", self.clock.now() + seconds)
        )
        return task_id

    async def submit_below(self, parent: str, **contract: Any) -> str:
        """Store a sub-task and return its id."""
        share, task_id = await self.ledger.share(parent), f"task-{self.ids.hex()}"
        task = Task("part of it", budget=Budget(max_tokens=1000), parent_task_id=parent, **contract)
        ends_at = self.clock.now() + 600
        new = NewTask(task_id, TENANT, "ada", "key-1", "", task, "corr", "", ends_at, ancestors=share.ancestors)
        await self.store.create(new)
        return task_id

    async def claim(self, holder: str = "w1") -> TaskRecord:
        """Claim the next task for ``holder``."""
        claimed = await TaskLeases(self.db, holder).acquire(exclude=frozenset())
        assert claimed is not None, "there is a task to claim"
        return await self.store.get(claimed[0])

    async def events(self, task_id: str) -> list[tuple[str, dict[str, Any]]]:
        """Return type and data of a task's events."""
        page = await self.store.history(task_id, TENANT, 0, 200)
        return [(event.event_type, event.data) for event in page.events]

    async def event_types(self, task_id: str) -> list[str]:
        return [name for name, _ in await self.events(task_id)]

    def calls(self, task: TaskRecord) -> TaskCalls:
        return TaskCalls(self.deps.client, self.deps.token_minter, task, ScopeSet())


@contextlib.asynccontextmanager
async def open_task_kit(clock: ManualClock | None = None, backend: Backend | None = None) -> AsyncGenerator[TaskKit]:
    """Open the parts over a database and a Redis of their own; ``backend`` is another than SQLite."""
    clock = clock or ManualClock()
    ids = Uuid7Generator(clock)
    async with open_task_database(clock, backend) as db, open_redis("memory://") as redis:
        log = EventLog(db, clock, ids)
        store = TaskStore(db, log, clock)
        approvals = ApprovalStore(db, store, clock, default_seconds=APPROVAL_SECONDS)
        ledger = BudgetLedger(db, clock, ids)
        services = FakeServices()

        async def nothing(*_: object) -> Any:
            return ()

        async def no_file(_tenant: str, digest: str) -> bytes:
            raise OctoError(f"There is no file {digest}.", code="file_not_found")

        async def no_texts(*_: object) -> dict[str, str]:
            return {}

        async def all_scopes(_task: TaskRecord) -> ScopeSet:
            return ScopeSet()

        deps = RunnerDependencies(
            store=store,
            approvals=approvals,
            ledger=ledger,
            stream=TextStream(redis, RedisKeys()),
            client=cast("Any", services),
            token_minter=cast("TaskTokenMinter", FakeMinter()),
            clock=clock,
            log=RecordingLog(),
            metrics=Metrics("orchestrator"),
            tracer=Tracer("orchestrator", clock),
            load_allowed_scopes=all_scopes,
            list_arms=nothing,
            load_file=no_file,
            load_texts=no_texts,
            store_texts=nothing,
            attempts=AttemptReader(db),
        )
        yield TaskKit(db, clock, ids, log, store, approvals, ledger, services, deps)
