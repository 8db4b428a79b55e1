"""Submission: validating a task's contract, storing its inline files, and storing the task."""

from __future__ import annotations

import asyncio
import difflib
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from octollm.capability import Principal, ScopeSet
from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.api import TaskView
from octollm.contracts.approvals import EVERY_STEP, MAX_APPROVAL_RULES, ApprovalPolicy
from octollm.contracts.media_types import accepts_file, media_type_of
from octollm.contracts.output_schema import MAX_OUTPUT_SCHEMA
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import (
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_GOAL,
    ArmInfo,
    FileKind,
    FileRef,
    Plan,
    Task,
    TaskContext,
)
from octollm.documents.detection import detect_kind, use_of
from octollm.documents.model import DocumentError
from octollm.errors import FieldError, OctoError
from octollm.services.orchestrator.files import FileStore, validate_file_name
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.subtasks import Parent, SubTasks
from octollm.storage import Database, Transaction
from octollm.storage.characters import find_nul
from octollm.storage.programs import SqlStatement
from octollm.storage.tables.tasks import WAITING
from octollm.tasks.attempts import copy_results
from octollm.tasks.changes import NewTask
from octollm.tasks.limits import complete_budget, parse_deadline
from octollm.tasks.scheduling import MAX_PRIORITY
from octollm.tasks.state import find_reusable_steps, is_final, merge_policies
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker
from octollm.telemetry import Metrics

REFRESH_SECONDS = 1.0
"""Interval at which the waiting tasks are counted again, while tasks are submitted."""
WATCH_SECONDS = 5.0
"""Interval at which the waiting tasks are counted for ``/metrics``."""
RETRY_SECONDS = 2.0
"""What a refused client is told to wait."""
_COUNT_WAITING = f"SELECT tenant, count(*) AS waiting FROM tasks WHERE {WAITING} GROUP BY tenant"  # noqa: S608  a constant
MAX_LIST_ITEMS = 32
MAX_ITEM_LENGTH = MAX_OUTPUT_SCHEMA
"""Characters of a constraint or criterion; a criterion may be the JSON Schema of the output."""
_MAX_BLANK = 4096
"""Bytes of a table that may be blank; a longer one is read before that is said."""


MAX_APPROVAL_SECONDS = 30 * 86_400.0


class QueueBound:
    """Refuses tasks while too many wait.

    The count is as old as a second, with what this process added since. So several replicas together may let a few more
    in than the bound: it protects from a flood, and a count for each submission would cost as much as the submission.
    """

    def __init__(self, db: Database, clock: Clock, max_waiting: int, max_per_tenant: int) -> None:
        """0 is no bound."""
        self._db = db
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_per_tenant = max_per_tenant
        self._waiting: dict[str, int] = {}
        self._counted_at = float("-inf")
        self._lock = asyncio.Lock()

    async def admit(self, tenant: str) -> None:
        """Count one more task of ``tenant``.

        Raises ``rate_limited`` when the tenant has as many waiting tasks as it may have, ``overloaded`` when the
        installation has; both with the time to wait.
        """
        if not self._max_waiting and not self._max_per_tenant:
            return
        if self._clock.monotonic() - self._counted_at >= REFRESH_SECONDS:
            async with self._lock:
                if self._clock.monotonic() - self._counted_at >= REFRESH_SECONDS:
                    await self._count()
        own = self._waiting.get(tenant, 0)
        if self._max_per_tenant and own >= self._max_per_tenant:
            raise OctoError(
                f"{own} of your tasks wait for a worker, and {self._max_per_tenant} may.",
                code="rate_limited",
                retry_after=RETRY_SECONDS,
            )
        if self._max_waiting and sum(self._waiting.values()) >= self._max_waiting:
            raise OctoError(
                "As many tasks as may wait for a worker do so already.", code="overloaded", retry_after=RETRY_SECONDS
            )
        self._waiting[tenant] = own + 1

    def watch(self, metrics: Metrics, logger: LoopLogger) -> BackgroundLoop:
        """Return the loop that keeps the gauge of waiting tasks, by which replicas are scaled."""

        async def measure() -> None:
            await self._count()
            metrics.tasks_waiting.set(sum(self._waiting.values()))

        return BackgroundLoop("waiting tasks", measure, interval=WATCH_SECONDS, log=logger)

    async def _count(self) -> None:
        rows = await self._db.fetch(_COUNT_WAITING)
        self._waiting = {str(row["tenant"]): int(row["waiting"]) for row in rows}
        self._counted_at = self._clock.monotonic()


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """The budget of a task that names none, and the approvals that every task needs."""

    max_tokens: int
    max_time_seconds: float
    approval: ApprovalPolicy


@dataclass(frozen=True, slots=True)
class ValidatedTask:
    """A contract that is ready to be stored; ``deadline_at`` in epoch seconds."""

    contract: Task
    deadline_at: float


def validate_contract(
    contract: Task, defaults: TaskDefaults, arms: frozenset[str], scopes: frozenset[str], clock: Clock
) -> ValidatedTask:
    """Return ``contract`` with its defaults filled in. ``scopes`` are those of the operations of services and arms.

    Raises ``goal_invalid``, ``budget_invalid``, ``deadline_invalid``, ``approval_invalid``, ``arm_unknown``,
    ``file_invalid`` or ``invalid_body``, each with a JSON Pointer to the fault.
    """
    if (pointer := find_nul(contract)) is not None:
        # SQLite would store it, and PostgreSQL does not.
        raise _field_error("invalid_body", pointer, "A text contains U+0000, which cannot be stored.")
    if not contract.goal.strip():
        raise _field_error("goal_invalid", "/goal", "The goal is empty; describe what the task should do.")
    if len(contract.goal) > MAX_GOAL:
        raise _field_error(
            "goal_invalid", "/goal", f"The goal may have at most {MAX_GOAL} characters; put more into files."
        )
    if contract.task_id is not None:
        raise _field_error("invalid_body", "/task_id", "The service assigns the task's id; leave it out.")
    for name, items in (("constraints", contract.constraints), ("acceptance_criteria", contract.acceptance_criteria)):
        if len(items) > MAX_LIST_ITEMS or any(len(item) > MAX_ITEM_LENGTH for item in items):
            raise _field_error(
                "invalid_body", f"/{name}", f"At most {MAX_LIST_ITEMS} entries of {MAX_ITEM_LENGTH} characters."
            )
    if abs(contract.priority) > MAX_PRIORITY:
        raise _field_error("invalid_body", "/priority", f"From {-MAX_PRIORITY} to {MAX_PRIORITY}.")
    if contract.assigned_arm is not None and contract.assigned_arm not in arms:
        arm_names = ", ".join(sorted(arms))
        raise _field_error(
            "arm_unknown", "/assigned_arm", f"There is no arm {contract.assigned_arm!r}; the arms are {arm_names}."
        )
    _validate_files(contract.context)
    _validate_approval(contract.approval, arms, scopes)
    budget = complete_budget(
        contract.budget, max_tokens=defaults.max_tokens, max_time_seconds=defaults.max_time_seconds
    )
    now = clock.now()
    deadline = now + (budget.max_time_seconds or defaults.max_time_seconds)
    if contract.deadline is not None:
        deadline = min(deadline, parse_deadline(contract.deadline, now))
    approval = merge_policies(defaults.approval, contract.approval)
    return ValidatedTask(msgspec.structs.replace(contract, budget=budget, approval=approval), deadline)


def _validate_approval(policy: ApprovalPolicy, arms: frozenset[str], scopes: frozenset[str]) -> None:
    if len(policy.steps) > MAX_APPROVAL_RULES:
        raise _field_error("approval_invalid", "/approval/steps", f"At most {MAX_APPROVAL_RULES} names.")
    for index, rule in enumerate(policy.steps):
        # Refused rather than ignored: with a misspelt rule, the step would start without an approval.
        if rule not in {EVERY_STEP, *arms, *scopes}:
            near = difflib.get_close_matches(rule, (*arms, *scopes), 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise _field_error(
                "approval_invalid",
                f"/approval/steps/{index}",
                f"{rule!r} is not the name of an arm, the scope of an operation, or `*`.{hint}",
            )
    seconds, cost = policy.expires_seconds, policy.cost_above_usd
    if seconds is not None and not 1 <= seconds <= MAX_APPROVAL_SECONDS:
        raise _field_error(
            "approval_invalid", "/approval/expires_seconds", f"Seconds from 1 to {MAX_APPROVAL_SECONDS:g}."
        )
    if cost is not None and not 0 <= cost < math.inf:
        raise _field_error("approval_invalid", "/approval/cost_above_usd", "US dollars, 0 or more.")


async def store_inline_files(contract: Task, tenant: str, store: FileStore) -> Task:
    """Store inline texts and return ``contract`` with every file referenced by its digest.

    Raises ``file_invalid`` for a digest that is not stored.
    """
    files: list[FileRef] = []
    digests = [file.digest for file in contract.context.files if file.digest is not None]
    missing = await store.find_missing(tenant, digests) if digests else set[str]()
    for index, file in enumerate(contract.context.files):
        if file.digest is not None:
            if file.digest in missing:
                raise _field_error(
                    "file_invalid",
                    f"/context/files/{index}/digest",
                    f"{file.name} is not stored; send it with POST /files first.",
                )
            files.append(FileRef(file.name, file.digest))
        else:
            stored = await store.put(tenant, file.name, "text/plain; charset=utf-8", (file.text or "").encode())
            files.append(FileRef(file.name, stored.digest))
    context = msgspec.structs.replace(contract.context, files=tuple(files))
    return msgspec.structs.replace(contract, context=context)


@dataclass(frozen=True, slots=True)
class Submission:
    """A task to submit: whose it is, the scopes that it may use, and the trace that it belongs to."""

    principal: Principal
    authority: ScopeSet
    contract: Task
    correlation_id: str
    traceparent: str
    fork: Fork | None = None
    parent: Parent | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a retry or a fork comes from. A fork has the ``plan``, and the results of the steps ``reused``."""

    task_id: str
    plan: Plan | None = None
    reused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskSubmitter:
    """Validates and stores tasks, whoever submits them."""

    store: TaskStore
    files: FileStore
    registry: ServiceRegistry
    worker: Worker
    defaults: TaskDefaults
    clock: Clock
    ids: IdGenerator
    subtasks: SubTasks
    queue: QueueBound

    async def submit(
        self,
        submission: Submission,
        record: Callable[[Transaction, str], Awaitable[None]] | None = None,
        *,
        statements: Callable[[str], Sequence[SqlStatement]] | None = None,
    ) -> TaskView:
        """Store a task and wake the worker.

        What ``record`` writes, or ``statements`` returns, is part of the task's transaction; both are given its id.
        Raises what :func:`validate_contract`, :func:`store_inline_files`, :func:`detect_file_kinds` and
        :meth:`QueueBound.admit` raise.
        """
        principal, fork, parent = submission.principal, submission.fork, submission.parent
        validated = await self.validate(submission.contract, principal.tenant)
        if parent is None:
            # After the validation: a wrong task is answered as such, and takes no place. Sub-tasks have bounds of their
            # own, and their parent waits for them.
            await self.queue.admit(principal.tenant)
        contract, deadline_at = validated.contract, validated.deadline_at
        if parent is None:
            contract = msgspec.structs.replace(contract, parent_task_id=None)
        else:
            # The parent's share takes the place of the installation's default.
            budget = msgspec.structs.replace(contract.budget, max_tokens=submission.contract.budget.max_tokens)
            contract = msgspec.structs.replace(contract, budget=budget)
            contract, deadline_at = self.subtasks.inherit(parent, contract, deadline_at)
        task_id = f"task-{self.ids.hex()}"
        new = NewTask(
            task_id=task_id,
            tenant=principal.tenant,
            sub=principal.sub,
            cred=principal.cred,
            authority=str(submission.authority),
            contract=contract,
            correlation_id=submission.correlation_id,
            traceparent=submission.traceparent,
            deadline_at=deadline_at,
            ancestors=() if parent is None else parent.share.ancestors,
            forked_from=None if fork is None else fork.task_id,
            plan=None if fork is None else fork.plan,
        )

        async def write(tx: Transaction) -> None:
            if parent is not None:
                await self.subtasks.lock(tx, parent)
            if fork is not None:
                await copy_results(tx, fork.task_id, task_id, fork.reused)
            if record is not None:
                await record(tx, task_id)

        hook = None if fork is None and parent is None and record is None else write
        view = await self.store.create(new, hook, () if statements is None else statements(task_id))
        self.worker.wake()
        return view

    async def find_fork(self, task_id: str, tenant: str, from_step: str | None) -> tuple[Task, Fork]:
        """Return the contract of a task that has ended, to be submitted again, and what comes with it.

        ``from_step`` is as in :class:`ForkRequest`; ``None`` begins with a plan. Raises ``task_not_found``,
        ``state_conflict`` for a task that has not ended or has no plan, and ``step_unknown``.
        """
        await self.store.view(task_id, tenant)
        task = await self.store.get(task_id)
        if not is_final(task.status):
            raise OctoError(f"The task is {task.status}; it has to end first.", code="state_conflict")
        contract = task.contract
        if contract.deadline is not None and (task.deadline_at or 0.0) <= self.clock.now():
            # That of the first run, which has passed. The time limit of the budget begins anew.
            contract = msgspec.structs.replace(contract, deadline=None)
        # It stands for itself: the task that the first run belonged to may have ended.
        contract = msgspec.structs.replace(contract, parent_task_id=None)
        if from_step is None:
            return contract, Fork(task_id)
        if task.plan is None:
            raise OctoError("The task ended before it had a plan; retry it instead.", code="state_conflict")
        completed = {step.step for step in await self.store.steps(task_id) if step.status == "completed"}
        reused = find_reusable_steps(task.plan.steps, completed, from_step)
        return contract, Fork(task_id, task.plan, tuple(reused))

    async def validate(self, contract: Task, tenant: str) -> ValidatedTask:
        """Return a contract that is ready to be stored, with its inline files stored; raise as :meth:`submit`."""
        arms = self.registry.arm_names(tenant)
        if contract.assigned_arm is not None and contract.assigned_arm not in arms:
            # It may have registered at another replica since the last refresh.
            await self.registry.refresh_on_miss()
            arms = self.registry.arm_names(tenant)
        validated = validate_contract(contract, self.defaults, arms, self.registry.operation_scopes(tenant), self.clock)
        stored = await store_inline_files(validated.contract, tenant, self.files)
        stored = await detect_file_kinds(stored, tenant, self.files, self.registry.list_arms(tenant))
        return ValidatedTask(stored, validated.deadline_at)


def _validate_files(context: TaskContext) -> None:
    if len(context.files) > MAX_FILES:
        raise _field_error("file_invalid", "/context/files", f"A task may have at most {MAX_FILES} files.")
    names: set[str] = set()
    for index, file in enumerate(context.files):
        pointer = f"/context/files/{index}"
        try:
            validate_file_name(file.name)
        except OctoError as error:
            raise _field_error("file_invalid", f"{pointer}/name", error.detail) from error
        if file.name in names:
            raise _field_error(
                "file_invalid",
                f"{pointer}/name",
                f"Two files are named {file.name}. Give one another name: the names tell them apart.",
            )
        names.add(file.name)
        if (file.digest is None) == (file.text is None):
            raise _field_error("file_invalid", pointer, "A file needs either a digest or a text.")
        if file.text is not None and len(file.text.encode()) > MAX_FILE_BYTES:
            raise _field_error("file_invalid", f"{pointer}/text", f"A file may have at most {MAX_FILE_BYTES} bytes.")


async def detect_file_kinds(contract: Task, tenant: str, store: FileStore, arms: Iterable[ArmInfo]) -> Task:
    """Return ``contract`` with the kind of each file by its content.

    Raises ``file_encrypted``, or ``file_invalid`` for a file that is neither text nor a table and that no arm of
    ``arms`` accepts. The arm that a task is assigned to sees for itself.
    """
    has_own_arm = contract.assigned_arm is not None and contract.assigned_arm not in BUILT_IN_ARMS
    accepted = frozenset(word for arm in arms if arm.name not in BUILT_IN_ARMS for word in arm.accepts)
    files: list[FileRef] = []
    for index, file in enumerate(contract.context.files):
        if file.digest is None:
            files.append(file)
            continue
        _stored, body = await store.get(tenant, file.digest)
        try:
            kind: FileKind = use_of(await asyncio.to_thread(detect_kind, file.name, body))
            if kind == "table" and len(body) < _MAX_BLANK and not body.strip():
                # Said before a plan is made for it. An empty text or program may be meant.
                raise DocumentError("The file is empty, so it is no table.")
        except DocumentError as error:
            if not has_own_arm and not accepts_file(accepted, file.name):
                is_encrypted = error.code == "file_encrypted"
                hint = "" if is_encrypted else f" No arm of your own reads {media_type_of(file.name)} either."
                raise _field_error(
                    "file_encrypted" if is_encrypted else "file_invalid",
                    f"/context/files/{index}",
                    f"{file.name}: {error.detail.rstrip('.')}.{hint}",
                ) from error
            kind = "binary"
        files.append(msgspec.structs.replace(file, kind=kind))
    context = msgspec.structs.replace(contract.context, files=tuple(files))
    return msgspec.structs.replace(contract, context=context)


def _field_error(code: str, pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code=code, field_errors=(FieldError(pointer, detail),))
