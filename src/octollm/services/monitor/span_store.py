"""Spans in SQL: storing them, reading those of one task, and pruning by age and number in the background."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select

from octollm.concurrency import BackgroundLoop
from octollm.contracts.observability import SpanView, TraceView
from octollm.contracts.services import SERVICES
from octollm.storage import Database, row_to_dict
from octollm.storage.tables import spans
from octollm.telemetry import Logger, Span, mask
from octollm.telemetry.spans import TASK_ATTRIBUTE, TENANT_ATTRIBUTE


@dataclass(frozen=True, slots=True)
class SpanOwnership:
    """A span's place in its trace. ``tenant`` and ``task`` are empty unless a built-in service named them."""

    span_id: str
    parent_id: str
    tenant: str = ""
    task: str = ""


def select_task_spans(candidates: Sequence[SpanOwnership], tenant: str, task: str) -> list[int]:
    """Return the indices of the spans of one trace that belong to ``task`` of ``tenant``, in order.

    These are the spans that name both; their ancestors, as far as they are the tenant's own and no other task's (how
    the task was submitted); and their descendants that name nobody else (what services did in their own name).
    """
    by_id: dict[str, list[int]] = defaultdict(list)
    # The client chooses the trace id, so several tasks and tenants may share a trace: the id alone proves nothing.
    children: dict[str, list[int]] = defaultdict(list)
    for index, span in enumerate(candidates):
        by_id[span.span_id].append(index)
        children[span.parent_id].append(index)

    def parents_of(index: int) -> Iterable[int]:
        parents = by_id[candidates[index].parent_id] if candidates[index].parent_id else []
        return [each for each in parents if candidates[each].tenant == tenant and candidates[each].task in ("", task)]

    def children_of(index: int) -> Iterable[int]:
        return [
            each
            for each in children[candidates[index].span_id]
            if candidates[each].tenant in ("", tenant) and candidates[each].task in ("", task)
        ]

    own = {index for index, span in enumerate(candidates) if span.tenant == tenant and span.task == task}
    # Descend from the task's own spans only: other children of an ancestor were not done for this task.
    return sorted(_reach(own, parents_of) | _reach(own, children_of))


def _reach(start: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> set[int]:
    """Return ``start`` and everything that can be reached from it."""
    reached = set(start)
    pending = list(reached)
    while pending:
        for each in neighbours(pending.pop()):
            if each not in reached:
                reached.add(each)
                pending.append(each)
    return reached


MAX_AGE_SECONDS = 7 * 86_400.0
MAX_STORED_SPANS = 500_000
"""Spans in the database; a task has about a hundred."""
MAX_READ_SPANS = 5_000
"""Spans of one response."""
MAX_TRACES = 16
"""Traces of one task that are read. A task has one, unless its token was used by hand in several."""
_PRUNE_BATCH = 5_000
_MAX_NAME = 64
"""Characters of a tenant or a task in the database."""


class SpanStore:
    """The spans of all tenants, read by task."""

    def __init__(self, db: Database, *, max_spans: int = MAX_STORED_SPANS, max_age: float = MAX_AGE_SECONDS) -> None:
        """``max_age`` is in seconds."""
        self._db = db
        self._max_spans = max_spans
        self._max_age = max_age

    async def add(self, spans_received: Sequence[Span]) -> None:
        """Store spans; a span that is stored already stays as it is.

        Tenant and task are believed of built-in services only. The spans of other arms are found as descendants of
        the calls that they served. Raises ``unavailable`` and ``overloaded``.
        """
        if not spans_received:
            return
        async with self._db.transaction() as tx:
            now = await tx.now()
            await tx.execute(
                tx.insert(spans).on_conflict_do_nothing(), [_build_row(span, now) for span in spans_received]
            )

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
        own = _filter_task_rows([row_to_dict(row) for row in rows[:MAX_READ_SPANS]], tenant, task_id)
        return TraceView(task_id, tuple(_build_view(row) for row in own), complete=len(rows) <= MAX_READ_SPANS)

    async def prune(self) -> int:
        """Delete a batch of the spans that are too old or too many; return how many. 0 means that none is left."""
        async with self._db.transaction() as tx:
            now = await tx.now()
            newest = await tx.scalar(select(func.max(spans.c.id))) or 0
            expired = (
                select(spans.c.id)
                .where((spans.c.received_at < now - self._max_age) | (spans.c.id <= newest - self._max_spans))
                .order_by(spans.c.id)
                .limit(_PRUNE_BATCH)
            )
            return (await tx.execute(delete(spans).where(spans.c.id.in_(expired)))).rowcount


def _build_row(span: Span, now: float) -> dict[str, object]:
    # Built-in services put no secret into a span and name the right tenant. Other arms are not trusted to.
    is_built_in = span.service in SERVICES
    attributes = dict(span.attributes)
    tenant, task = attributes.pop(TENANT_ATTRIBUTE, ""), attributes.pop(TASK_ATTRIBUTE, "")
    return {
        "tenant": _bounded_name(tenant) if is_built_in else "",
        "task_id": _bounded_name(task) if is_built_in else "",
        "trace_id": span.trace.trace_id,
        "span_id": span.trace.span_id,
        "parent_id": span.parent_id,
        "service": span.service,
        "name": span.name if is_built_in else str(mask(span.name)),
        "kind": span.kind,
        "started_at": span.start_ns / 1e9,
        "duration_ms": (span.end_ns - span.start_ns) / 1e6,
        "code": span.code,
        "message": span.message if is_built_in else str(mask(span.message)),
        "attributes": attributes if is_built_in else mask(attributes),
        "received_at": now,
    }


def _bounded_name(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= _MAX_NAME else ""


def _filter_task_rows(rows: Sequence[Mapping[str, Any]], tenant: str, task_id: str) -> list[Mapping[str, Any]]:
    """Return the rows of the task, in their order."""
    by_trace: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_trace[row["trace_id"]].append(index)
    selected: list[int] = []
    for indices in by_trace.values():
        ownership = [
            SpanOwnership(row["span_id"], row["parent_id"], row["tenant"], row["task_id"])
            for row in (rows[index] for index in indices)
        ]
        selected += [indices[each] for each in select_task_spans(ownership, tenant, task_id)]
    return [rows[index] for index in sorted(selected)]


def _build_view(row: Mapping[str, Any]) -> SpanView:
    names = ("trace_id", "span_id", "parent_id", "service", "name", "kind", "code", "message", "attributes")
    return SpanView(start=row["started_at"], duration_ms=row["duration_ms"], **{name: row[name] for name in names})


PRUNE_SECONDS = 60.0


def prune_loop(store: SpanStore, log: Logger) -> BackgroundLoop:
    """Return the loop that keeps ``store`` within its bounds."""

    async def prune() -> None:
        while await store.prune():
            pass

    return BackgroundLoop("span pruning", prune, interval=PRUNE_SECONDS, restart=True, log=log)
