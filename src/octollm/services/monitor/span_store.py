"""Spans in SQL: which spans of a trace belong to a task, storing and reading them, and pruning by age and number in the background."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select

from octollm.contracts.observability import SpanView, TraceView
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.rpc.health import DependencyStatus
from octollm.storage import Database, row_to_dict
from octollm.storage.tables import spans
from octollm.telemetry import Logger, Span, mask
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class SpanOwnership:
    """Where one span is: ``tenant`` and ``task`` are empty where no built-in service named them."""

    span_id: str
    parent_id: str
    tenant: str = ""
    task: str = ""


def select_task_spans(candidates: Sequence[SpanOwnership], tenant: str, task: str) -> list[int]:
    """Return the indexes of the spans of one trace that belong to ``task`` of ``tenant``, in their order.

    They are those that name both; the spans above one, as far as they are the tenant's own and no other task's (how
    it was submitted); and the spans below one that name nobody else (what was done in a service's own name).
    """
    by_id: dict[str, list[int]] = defaultdict(list)
    below: dict[str, list[int]] = defaultdict(list)
    for index, span in enumerate(candidates):
        by_id[span.span_id].append(index)
        below[span.parent_id].append(index)

    def above(index: int) -> Iterable[int]:
        found = by_id[candidates[index].parent_id] if candidates[index].parent_id else []
        return [each for each in found if candidates[each].tenant == tenant and candidates[each].task in ("", task)]

    def under(index: int) -> Iterable[int]:
        found = below[candidates[index].span_id]
        return [
            each for each in found if candidates[each].tenant in ("", tenant) and candidates[each].task in ("", task)
        ]

    kept = {index for index, span in enumerate(candidates) if span.tenant == tenant and span.task == task}
    lineage = set(kept)
    waiting = list(kept)
    while waiting:
        for each in above(waiting.pop()):
            if each not in lineage:
                lineage.add(each)
                waiting.append(each)
    # What is above is not what was done for the task: only what is below the task's own spans is.
    waiting = list(kept)
    while waiting:
        for each in under(waiting.pop()):
            if each not in kept:
                kept.add(each)
                waiting.append(each)
    return sorted(kept | lineage)


MAX_AGE_SECONDS = 7 * 86_400.0
MAX_STORED_SPANS = 500_000
"""Spans that are kept; a goal makes about a hundred."""
MAX_READ_SPANS = 5_000
"""Spans of one answer."""
MAX_TRACES = 16
"""Traces of one task that are read: it has one, unless its token was used by hand in several."""
_PRUNE_BATCH = 5_000
_MAX_NAME = 64
"""Characters of a tenant or a task in the database."""


class SpanStore:
    """The spans of every tenant. A reader is given those of one task of its own."""

    def __init__(self, db: Database, *, max_spans: int = MAX_STORED_SPANS, max_age: float = MAX_AGE_SECONDS) -> None:
        """``max_age`` is in seconds."""
        self._db = db
        self._max_spans = max_spans
        self._max_age = max_age

    async def add(self, sent: Sequence[Span]) -> None:
        """Store spans; one that is there already stays as it is.

        Whom a span is for is believed of built-in services only. What others send is found below the calls that they
        served. Raises ``unavailable`` and ``overloaded``.
        """
        if not sent:
            return
        async with self._db.transaction() as tx:
            now = await tx.now()
            await tx.execute(tx.insert(spans).on_conflict_do_nothing(), [_build_row(span, now) for span in sent])

    async def read_task(self, tenant: str, task_id: str) -> TraceView:
        """Return the spans of a task."""
        async with self._db.read() as conn:
            traces = await conn.all(
                select(spans.c.trace_id)
                .where(spans.c.tenant == tenant, spans.c.task_id == task_id)
                .group_by(spans.c.trace_id)
                .order_by(func.min(spans.c.id))
                .limit(MAX_TRACES)
            )
            rows = await conn.all(
                select(spans)
                .where(
                    spans.c.trace_id.in_([row["trace_id"] for row in traces]),
                    spans.c.tenant.in_((tenant, "")),
                )
                .order_by(spans.c.started_at, spans.c.id)
                .limit(MAX_READ_SPANS + 1)
            )
        found = _filter_task_rows([row_to_dict(row) for row in rows[:MAX_READ_SPANS]], tenant, task_id)
        return TraceView(task_id, tuple(_build_view(row) for row in found), complete=len(rows) <= MAX_READ_SPANS)

    async def prune(self) -> int:
        """Forget some of the spans that are too old or too many; return how many. At 0 none is left to forget."""
        async with self._db.transaction() as tx:
            now = await tx.now()
            newest = await tx.scalar(select(func.max(spans.c.id))) or 0
            doomed = (
                select(spans.c.id)
                .where((spans.c.received_at < now - self._max_age) | (spans.c.id <= newest - self._max_spans))
                .order_by(spans.c.id)
                .limit(_PRUNE_BATCH)
            )
            return (await tx.execute(delete(spans).where(spans.c.id.in_(doomed)))).rowcount


def _build_row(span: Span, now: float) -> dict[str, object]:
    # Our services put no secret into a span, and say truly whom it is for; an arm of somebody else's may be careless.
    ours = span.service in SERVICES
    attributes = dict(span.attributes)
    tenant, task = attributes.pop(TENANT_ATTRIBUTE, ""), attributes.pop(TASK_ATTRIBUTE, "")
    return {
        "tenant": _bounded_name(tenant) if ours else "",
        "task_id": _bounded_name(task) if ours else "",
        "trace_id": span.trace.trace_id,
        "span_id": span.trace.span_id,
        "parent_id": span.parent_id,
        "service": span.service,
        "name": span.name if ours else str(mask(span.name)),
        "kind": span.kind,
        "started_at": span.start_ns / 1e9,
        "duration_ms": (span.end_ns - span.start_ns) / 1e6,
        "code": span.code,
        "message": span.message if ours else str(mask(span.message)),
        "attributes": attributes if ours else mask(attributes),
        "received_at": now,
    }


def _bounded_name(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _MAX_NAME else ""


def _filter_task_rows(rows: Sequence[Mapping[str, Any]], tenant: str, task_id: str) -> list[Mapping[str, Any]]:
    """Return the rows of the task, trace by trace, in the order of the rows."""
    by_trace: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_trace[row["trace_id"]].append(index)
    kept: list[int] = []
    for indexes in by_trace.values():
        placed = [
            SpanOwnership(row["span_id"], row["parent_id"], row["tenant"], row["task_id"])
            for row in (rows[index] for index in indexes)
        ]
        kept += [indexes[each] for each in select_task_spans(placed, tenant, task_id)]
    return [rows[index] for index in sorted(kept)]


def _build_view(row: Mapping[str, Any]) -> SpanView:
    names = ("trace_id", "span_id", "parent_id", "service", "name", "kind", "code", "message", "attributes")
    return SpanView(start=row["started_at"], duration_ms=row["duration_ms"], **{name: row[name] for name in names})


PRUNE_SECONDS = 60.0


class SpanPruner:
    """Keeps the store within its bounds. When it cannot, ``/ready`` says why."""

    def __init__(self, store: SpanStore, log: Logger) -> None:
        self._store = store
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._failure = ""

    async def __aenter__(self) -> SpanPruner:
        self._task = asyncio.create_task(self._run(), name="monitor prune")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def checkup(self) -> DependencyStatus:
        """Say whether old spans are forgotten."""
        return DependencyStatus(ok=not self._failure, detail=self._failure, required=False)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = "Old spans are no longer forgotten; the log says why."
            self._log.error("spans.pruning_crashed", error=error)

    async def _run(self) -> None:
        while True:
            try:
                while await self._store.prune():
                    pass
                self._failure = ""
            except OctoError as error:
                self._failure = f"Old spans cannot be forgotten: {error.detail}"
                self._log.warning("spans.not_pruned", error=error)
            await asyncio.sleep(PRUNE_SECONDS)
