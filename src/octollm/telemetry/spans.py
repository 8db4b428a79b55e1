"""Spans and the tracer: sampling, parent spans, errors, and the bounded export buffer.

Spans are exported as OTLP. The recorder is our own because it costs about 5 µs a span, the OpenTelemetry SDK's 20.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import msgspec

from octollm.clock import Clock
from octollm.context import TraceContext, current_context, set_context, start_trace
from octollm.errors import OctoError

T = TypeVar("T")

SpanKind = Literal["internal", "server", "client", "producer", "consumer"]
SpanValue = str | bool | int | float | tuple[str, ...]

TENANT_ATTRIBUTE = "octollm.tenant"
TASK_ATTRIBUTE = "octollm.task_id"
"""Attributes by which the monitor looks up the spans of a task."""

DEFAULT_SAMPLE_RATIO = 0.01
"""The share of requests without a trace context that start a sampled trace."""
SLOW_SECONDS = 1.0
"""The span of a slower request is exported even when its trace is not sampled."""
UNSAMPLED_OPERATIONS = frozenset({"health", "ready", "metrics", "traces.receive", "revocations"})
"""Periodic operations: they start no sampled trace, and their access log is at debug level."""

MAX_BUFFERED_SPANS = 4096
"""Spans that a process buffers for export; when it is full, the oldest is dropped."""


@dataclass(slots=True)
class Span:
    """One unit of work. ``code`` is the error code of its failure, empty on success.

    Times are nanoseconds since the epoch. Everybody who may read the task may read its attributes: no secrets in them.
    """

    service: str
    name: str
    kind: SpanKind
    trace: TraceContext
    parent_id: str = ""
    start_ns: int = 0
    end_ns: int = 0
    attributes: dict[str, SpanValue] = field(default_factory=dict[str, SpanValue])
    code: str = ""
    message: str = ""
    monotonic_start: float = field(default=0.0, compare=False)
    """Start on the monotonic clock, so that setting the wall clock does not change a duration."""

    def record_error(self, error: BaseException) -> None:
        """Set code and message from ``error``; of a foreign exception only its type, as its text may hold secrets."""
        if isinstance(error, OctoError):
            self.code, self.message = error.code, error.detail
        elif isinstance(error, asyncio.CancelledError):
            self.code = "cancelled"
        else:
            self.code, self.message = "internal", type(error).__name__


class ExportBuffer(Generic[T]):
    """A bounded queue of items to export. When it is full, the oldest is dropped and counted in ``dropped``."""

    def __init__(self, limit: int = MAX_BUFFERED_SPANS) -> None:
        self._waiting: deque[T] = deque()
        self._limit = limit
        self.dropped = 0
        self.has_items = asyncio.Event()
        """Set while the buffer is not empty."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: T) -> None:
        """Append ``item``."""
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(item)
        self.has_items.set()

    def take(self, limit: int) -> list[T]:
        """Remove and return the oldest items, at most ``limit``."""
        items = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        if not self._waiting:
            self.has_items.clear()
        return items

    def requeue(self, items: list[T]) -> None:
        """Put back items whose export failed; the oldest ones that no longer fit are dropped."""
        room = self._limit - len(self._waiting)
        newest = items[len(items) - room :] if room < len(items) else items
        self.dropped += len(items) - len(newest)
        self._waiting.extendleft(reversed(newest))
        if self._waiting:
            self.has_items.set()


class Tracer:
    """Starts and ends the spans of one service.

    Exported are the spans of sampled traces, and single spans that failed or were slow. Without a ``buffer`` nothing is
    exported. ``sample_ratio`` is the share of requests without a trace context that start a sampled trace.
    """

    def __init__(
        self,
        service: str,
        clock: Clock,
        buffer: ExportBuffer[Span] | None = None,
        *,
        sample_ratio: float = DEFAULT_SAMPLE_RATIO,
    ) -> None:
        self._service = service
        self._clock = clock
        self._buffer = buffer
        self._sample_ratio = sample_ratio

    def start(self, name: str, kind: SpanKind = "internal") -> Span:
        """Start a child of the current span; the caller must call :meth:`end`."""
        context = current_context()
        parent = context.trace
        if parent is None:
            return self._begin(name, kind, start_trace(), "")
        span = self._begin(name, kind, parent.child(), parent.span_id)
        if parent.sampled:
            if context.tenant:
                span.attributes[TENANT_ATTRIBUTE] = context.tenant
            if context.task_id:
                span.attributes[TASK_ATTRIBUTE] = context.task_id
        return span

    def receive(self, name: str, caller: TraceContext | None, *, sampled: bool) -> Span:
        """Start the server span of a request. Without a ``caller`` it starts a trace, ``sampled`` or by the ratio."""
        if caller is None:
            sampled = sampled or (name not in UNSAMPLED_OPERATIONS and random.random() < self._sample_ratio)  # noqa: S311  no secret
            return self._begin(name, "server", start_trace(sampled=sampled), "")
        return self._begin(name, "server", caller.child(), caller.span_id)

    def end(self, span: Span, *, keep: bool = False) -> None:
        """End a span and buffer it for export; ``keep`` does so even when its trace is not sampled."""
        if self._buffer is not None and (keep or span.trace.sampled):
            span.end_ns = span.start_ns + int((self._clock.monotonic() - span.monotonic_start) * 1e9)
            self._buffer.put(span)

    def export(self, span: Span) -> None:
        """Buffer a span that has ended and was recorded elsewhere, if its trace is sampled."""
        if self._buffer is not None and span.trace.sampled:
            self._buffer.put(span)

    @contextlib.contextmanager
    def span(self, name: str, kind: SpanKind = "internal") -> Generator[Span]:
        """Run the block in a child span; an exception that leaves the block becomes the span's error."""
        before = current_context()
        span = self.start(name, kind)
        set_context(msgspec.structs.replace(before, trace=span.trace))
        try:
            yield span
        except BaseException as error:
            span.record_error(error)
            raise
        finally:
            set_context(before)
            self.end(span)

    def _begin(self, name: str, kind: SpanKind, trace: TraceContext, parent_id: str) -> Span:
        clock = self._clock
        return Span(
            self._service, name, kind, trace, parent_id, int(clock.now() * 1e9), monotonic_start=clock.monotonic()
        )
