"""The attempts at a task's steps in the database: what each was given, and what became of it.

The rows are written in the transactions of ``step.started``, ``step.completed`` and ``step.failed``. A text that is too
long for a row is stored as a file of the tenant, once, and named by its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import and_, func, literal, or_, select, tuple_

from octollm.clock import format_rfc3339
from octollm.contracts.api import decode_cursor, encode_cursor
from octollm.contracts.attempts import (
    MAX_EXCERPT,
    AttemptList,
    AttemptQuery,
    AttemptRequest,
    AttemptResult,
    AttemptStatus,
    AttemptView,
    TextExcerpt,
)
from octollm.contracts.task import PlanStep
from octollm.rpc.client import OUTAGE_CODES
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.programs import Program, SqlStatement, insert_statement, update_statement
from octollm.storage.tables import attempts, reservations, steps, task_files, tasks
from octollm.tasks.records import TaskRecord

FILE_ROLE = "attempt"
"""The role of files that an attempt made: they are kept for as long as the task."""


def excerpt(text: str) -> TextExcerpt:
    """Return a text as an attempt holds it."""
    if len(text) <= MAX_EXCERPT:
        return TextExcerpt(text, len(text))
    return TextExcerpt(text[:MAX_EXCERPT], len(text), hashlib.sha256(text.encode()).hexdigest())


def repeats_call(code: str, *, has_result: bool) -> bool:
    """Return whether the attempt after one that failed with ``code`` repeats its call of the arm, with the same key.

    It does unless the arm itself has refused or failed. A result that nobody could judge (``has_result``) is there
    already, and after an outage the arm may have done the work: under a new key it would do it twice, also what it may
    do at most once.
    """
    return has_result or code in OUTAGE_CODES


class AttemptStart(NamedTuple):
    """What an attempt begins with. ``deadline_at`` is the task's deadline (epoch seconds) as it is by now."""

    request: AttemptRequest
    deadline_at: float | None


class NewAttempt(NamedTuple):
    """An attempt that begins; it gets the task's instructions in addition to its ``request``."""

    task: TaskRecord
    step: PlanStep
    attempt: int
    request: AttemptRequest
    trace_id: str


_KEYS = ("task_id", "step", "attempt")
_BEGIN = insert_statement(
    "attempts",
    (*_KEYS, "arm", "title", "request", "trace_id", "started_at", "run", "status"),
    " ON CONFLICT (task_id, step, attempt) DO UPDATE SET run = excluded.run, status = excluded.status,"
    " finished_at = NULL RETURNING request",
)
_END = update_statement("attempts", ("status", "outcome", "finished_at"), _KEYS)
_STORE_TEXT = insert_statement(
    "files",
    ("tenant", "digest", "name", "size", "media_type", "body", "created_at"),
    " ON CONFLICT (tenant, digest) DO UPDATE SET created_at = excluded.created_at",
)
_REFER = insert_statement(
    "task_files", ("task_id", "role", "step", "name", "digest", "created_at"), " ON CONFLICT DO NOTHING"
)


def begin_attempts(new: Sequence[tuple[NewAttempt, Sequence[str]]], now: float) -> Program[list[AttemptRequest]]:
    """Store that attempts begin, in the transaction that has locked their tasks; return their requests.

    Each comes with the instructions that its task has. A worker that took the task over goes on with the attempt that
    is there, and with the request that it began with: a repeated call needs the same body.
    """
    if not new:
        return []
    values: list[tuple[object, ...]] = []
    for (task, step, attempt, asked, trace_id), instructions in new:
        request = msgspec.json.encode(msgspec.structs.replace(asked, instructions=tuple(instructions))).decode()
        values.append(
            (task.task_id, step.id, attempt, step.arm, step.title, request, trace_id, now, task.epoch, "running")
        )
    rows = yield SqlStatement(_BEGIN, values, many=True, returns=True)
    return [msgspec.json.decode(row["request"], type=AttemptRequest) for row in rows]


def end_attempt(
    task: TaskRecord,
    step: str,
    attempt: int,
    status: AttemptStatus,
    outcome: AttemptResult,
    output: str,
    now: float,
) -> list[SqlStatement]:
    """Return the writes of what became of an attempt. ``output`` is the whole text of ``outcome.output``."""
    encoded = msgspec.json.encode(outcome).decode()
    writes = [SqlStatement(_END, (status, encoded, now, task.task_id, step, attempt))]
    digests = [artifact.digest for artifact in outcome.artifacts]
    if outcome.output is not None and outcome.output.digest:
        digest, body = outcome.output.digest, output.encode()
        stored = (task.tenant, digest, "output.txt", len(body), "text/plain; charset=utf-8", body, now)
        writes.append(SqlStatement(_STORE_TEXT, stored))
        digests.insert(0, digest)
    # That a file belongs to the task, so that retention keeps it.
    writes += [SqlStatement(_REFER, (task.task_id, FILE_ROLE, step, digest, digest, now)) for digest in digests]
    return writes


async def copy_results(tx: Transaction, source: str, target: str, names: Sequence[str]) -> None:
    """Copy completed steps of a task to one that was forked from it, with the attempts that were accepted."""
    if not names:
        return
    accepted = attempts.c.status.in_(("accepted", "reused"))
    for table, where, changes in (
        (steps, steps.c.step.in_(names), {"plan_number": literal(1), "run": literal(0)}),
        (attempts, and_(attempts.c.step.in_(names), accepted), {"status": literal("reused")}),
        (task_files, and_(task_files.c.role == FILE_ROLE, task_files.c.step.in_(names)), {}),
    ):
        columns = {"task_id": literal(target), **changes}
        query = select(*(columns.get(each.name, each) for each in table.c)).where(table.c.task_id == source, where)
        await tx.execute(tx.insert(table).from_select([each.name for each in table.c], query))


class AttemptReader:
    """Reads the attempts of all tasks."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def list(self, task_id: str, query: AttemptQuery) -> AttemptList:
        """Return a page of a task's attempts, oldest first; raise ``invalid_parameter`` for an invalid cursor."""
        order = attempts.c.started_at, attempts.c.step, attempts.c.attempt
        conditions = [attempts.c.task_id == task_id]
        if query.step:
            conditions.append(attempts.c.step == query.step)
        if query.cursor:
            at, last = decode_cursor(query.cursor)
            step, _, number = last.rpartition(":")
            attempt = int(number) if number.isdecimal() and len(number) < 9 else 0
            later = and_(attempts.c.started_at == at, tuple_(*order[1:]) > tuple_(literal(step), literal(attempt)))
            conditions.append(or_(attempts.c.started_at > at, later))
        async with self._db.read() as conn:
            task = await conn.first(select(tasks.c.status, tasks.c.finished_at).where(tasks.c.task_id == task_id))
            found = select(attempts).where(*conditions).order_by(*order).limit(query.limit + 1)
            rows = [row_to_dict(row) for row in await conn.all(found)]
            used = await _load_usage(conn, task_id) if rows else {}
        page = rows[: query.limit]
        ended_at, is_paused = (None, False) if task is None else (task["finished_at"], task["status"] == "paused")
        cursor = None
        if len(rows) > query.limit:
            cursor = encode_cursor(page[-1]["started_at"], f"{page[-1]['step']}:{page[-1]['attempt']}")
        return AttemptList(tuple(_attempt_from_row(row, used, ended_at, is_paused=is_paused) for row in page), cursor)

    async def count_failures(self, task_id: str, step: str) -> int:
        """Return how many attempts at a step were rejected or failed. Those that a person interrupted do not count."""
        conditions = (
            attempts.c.task_id == task_id,
            attempts.c.step == step,
            attempts.c.status.in_(("rejected", "failed")),
        )
        async with self._db.read() as conn:
            return int(await conn.scalar(select(func.count()).select_from(attempts).where(*conditions)) or 0)

    async def load_failure_code(self, task_id: str, step: str, attempt: int) -> str:
        """Return why an attempt failed: the code of a call's failure, or ``not_accepted`` for a rejected result."""
        where = attempts.c.task_id == task_id, attempts.c.step == step, attempts.c.attempt == attempt
        async with self._db.read() as conn:
            row = await conn.first(select(attempts.c.outcome).where(*where))
        outcome = msgspec.convert((row and row["outcome"]) or {}, AttemptResult)
        return "not_accepted" if outcome.error is None else outcome.error.code

    async def call_of(self, task_id: str, step: str, attempt: int) -> int:
        """Return the first of the attempts whose call of the arm ``attempt`` repeats; by default that is itself.

        A call with another body, for example because a person added an instruction, is none that is repeated.
        """
        mine = attempts.c.task_id == task_id, attempts.c.step == step, attempts.c.attempt <= attempt
        columns = attempts.c.attempt, attempts.c.status, attempts.c.request, attempts.c.outcome
        async with self._db.read() as conn:
            rows = await conn.all(select(*columns).where(*mine).order_by(attempts.c.attempt.desc()).limit(1000))
        first = attempt
        for later, row in pairwise(rows):
            if row["status"] != "failed" or row["outcome"] is None or row["request"] != later["request"]:
                break
            outcome = msgspec.convert(row["outcome"], AttemptResult)
            if outcome.error is None or not repeats_call(outcome.error.code, has_result=outcome.output is not None):
                break
            first = int(row["attempt"])
        return first

    async def has_file(self, task_id: str, digest: str) -> bool:
        """Return whether an attempt of the task made the file."""
        query = select(task_files.c.digest).where(
            task_files.c.task_id == task_id, task_files.c.role == FILE_ROLE, task_files.c.digest == digest
        )
        async with self._db.read() as conn:
            return await conn.first(query.limit(1)) is not None


async def _load_usage(conn: DatabaseConnection, task_id: str) -> dict[tuple[str, int], tuple[int, float]]:
    """Return the settled tokens and cost of a task's model calls by step and attempt."""
    query = (
        select(
            reservations.c.step,
            reservations.c.attempt,
            func.sum(reservations.c.used_tokens).label("tokens"),
            func.sum(reservations.c.used_cost_usd).label("cost"),
        )
        .where(reservations.c.task_id == task_id)
        .group_by(reservations.c.step, reservations.c.attempt)
    )
    return {(row["step"], row["attempt"]): (int(row["tokens"]), float(row["cost"])) for row in await conn.all(query)}


def _attempt_from_row(
    row: Mapping[str, Any],
    used: Mapping[tuple[str, int], tuple[int, float]],
    ended_at: float | None,
    *,
    is_paused: bool,
) -> AttemptView:
    status, finished_at = row["status"], row["finished_at"]
    if status == "running" and ended_at is not None:
        # The task ended around it, which writes no row for each attempt.
        status, finished_at = "cancelled", ended_at
    elif status == "running" and is_paused:
        status = "interrupted"
    tokens, cost = used.get((row["step"], row["attempt"]), (0, 0.0))
    return AttemptView(
        step=row["step"],
        attempt=row["attempt"],
        arm=row["arm"],
        title=row["title"],
        status=status,
        run=row["run"],
        started_at=format_rfc3339(row["started_at"]),
        finished_at=None if finished_at is None else format_rfc3339(finished_at),
        duration_ms=None if finished_at is None else int((finished_at - row["started_at"]) * 1000),
        request=msgspec.convert(row["request"], AttemptRequest),
        outcome=msgspec.convert(row["outcome"] or {}, AttemptResult),
        tokens=tokens,
        cost_usd=cost,
        trace_id=row["trace_id"],
    )
