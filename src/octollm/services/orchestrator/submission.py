"""Submission: validating a task's contract and storing its inline files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import msgspec

from octollm.clock import Clock
from octollm.contracts.media_types import accepts_file, media_type_of
from octollm.contracts.output_schema import MAX_OUTPUT_SCHEMA
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import (
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_GOAL,
    ArmInfo,
    Budget,
    FileKind,
    FileRef,
    Task,
    TaskContext,
)
from octollm.documents.detection import detect_kind, use_of
from octollm.documents.model import DocumentError
from octollm.errors import FieldError, OctoError
from octollm.services.orchestrator.files import FileStore, validate_file_name

MAX_LIST_ITEMS = 32
MAX_ITEM_LENGTH = MAX_OUTPUT_SCHEMA
"""Characters of a constraint or criterion; a criterion may be the JSON Schema of the output."""
MAX_TASK_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class BudgetDefaults:
    """The budget of a task that names none."""

    max_tokens: int
    max_time_seconds: float


@dataclass(frozen=True, slots=True)
class ValidatedTask:
    """A contract that is ready to be stored; ``deadline_at`` in epoch seconds."""

    contract: Task
    deadline_at: float


def validate_contract(contract: Task, defaults: BudgetDefaults, arms: frozenset[str], clock: Clock) -> ValidatedTask:
    """Return ``contract`` with its defaults filled in.

    Raises ``goal_invalid``, ``budget_invalid``, ``deadline_invalid``, ``arm_unknown``, ``file_invalid`` or
    ``invalid_body``, each with a JSON Pointer to the fault.
    """
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
    if contract.assigned_arm is not None and contract.assigned_arm not in arms:
        arm_names = ", ".join(sorted(arms))
        raise _field_error(
            "arm_unknown", "/assigned_arm", f"There is no arm {contract.assigned_arm!r}; the arms are {arm_names}."
        )
    _validate_files(contract.context)
    budget = _validate_budget(contract.budget, defaults)
    now = clock.now()
    deadline = now + (budget.max_time_seconds or defaults.max_time_seconds)
    if contract.deadline is not None:
        deadline = min(deadline, _validate_deadline(contract.deadline, now))
    return ValidatedTask(msgspec.structs.replace(contract, budget=budget), deadline)


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
            raise _field_error("file_invalid", f"{pointer}/name", f"Two files are named {file.name}.")
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
        except DocumentError as error:
            if not has_own_arm and not accepts_file(accepted, file.name):
                raise _field_error(
                    "file_encrypted" if error.code == "file_encrypted" else "file_invalid",
                    f"/context/files/{index}",
                    f"{file.name}: {error.detail} No arm that answers accepts {media_type_of(file.name)}.",
                ) from error
            kind = "binary"
        files.append(msgspec.structs.replace(file, kind=kind))
    context = msgspec.structs.replace(contract.context, files=tuple(files))
    return msgspec.structs.replace(contract, context=context)


def _validate_budget(budget: Budget, defaults: BudgetDefaults) -> Budget:
    if budget.max_tokens is not None and not 1 <= budget.max_tokens <= 100_000_000:
        raise _field_error("budget_invalid", "/budget/max_tokens", "From 1 to 100000000 tokens.")
    if budget.max_cost_usd is not None and not 0 < budget.max_cost_usd <= 1e6:
        raise _field_error("budget_invalid", "/budget/max_cost_usd", "More than 0 and at most 1000000 US dollars.")
    if budget.max_time_seconds is not None and not 0 < budget.max_time_seconds <= MAX_TASK_SECONDS:
        raise _field_error(
            "budget_invalid", "/budget/max_time_seconds", f"More than 0 and at most {MAX_TASK_SECONDS:g} seconds."
        )
    if budget.max_retries is not None and not 0 <= budget.max_retries <= 10:
        raise _field_error("budget_invalid", "/budget/max_retries", "From 0 to 10 retries.")
    return Budget(
        max_tokens=defaults.max_tokens if budget.max_tokens is None else budget.max_tokens,
        max_cost_usd=budget.max_cost_usd,
        max_time_seconds=defaults.max_time_seconds if budget.max_time_seconds is None else budget.max_time_seconds,
        max_retries=budget.max_retries,
    )


def _validate_deadline(text: str, now: float) -> float:
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise _field_error(
            "deadline_invalid", "/deadline", "A time as in RFC 3339, e.g. 2030-01-02T03:04:05Z."
        ) from error
    if at.tzinfo is None:
        raise _field_error("deadline_invalid", "/deadline", "The time needs an offset, e.g. Z.")
    if at.timestamp() <= now:
        raise _field_error("deadline_invalid", "/deadline", "The deadline is in the past.")
    return at.timestamp()


def _field_error(code: str, pointer: str, detail: str) -> OctoError:
    return OctoError(detail, code=code, field_errors=(FieldError(pointer, detail),))
