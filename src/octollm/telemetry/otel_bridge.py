"""Spans that an arm's own libraries record with OpenTelemetry, joined to the trace of the call that they work for.

Nothing here depends on OpenTelemetry: a library that records with it has imported its API. Without an SDK, its
propagators still pass the call's trace on.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Generator, Mapping
from typing import Any, cast

from octollm.context import TraceContext, current_context
from octollm.masking import mask
from octollm.telemetry.spans import Span, SpanKind, SpanValue, Tracer

MAX_PENDING = 4096
"""Spans that have begun and not ended; those beyond are left out."""
MAX_ATTRIBUTES = 64
_KINDS: dict[str, SpanKind] = {
    "INTERNAL": "internal",
    "SERVER": "server",
    "CLIENT": "client",
    "PRODUCER": "producer",
    "CONSUMER": "consumer",
}


class OpenTelemetryBridge:
    """Makes a call's span the parent of OpenTelemetry's, and exports these with the spans of the service."""

    def __init__(self, tracer: Tracer, service: str) -> None:
        self._recorder = _SpanRecorder(tracer, service)
        self._provider: object = None

    @contextlib.contextmanager
    def attached(self, trace: TraceContext) -> Generator[None]:
        """Run the block as a part of ``trace`` for OpenTelemetry, too. Does nothing where nobody has imported it."""
        api: Any = sys.modules.get("opentelemetry.trace")
        context: Any = sys.modules.get("opentelemetry.context")
        if api is None or context is None:
            yield
            return
        self._record_provider(api.get_tracer_provider())
        flags = api.TraceFlags((1 if trace.sampled else 0) | (2 if trace.random else 0))
        state = api.TraceState.from_header([trace.state] if trace.state else [])
        parent = api.SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), True, flags, state)
        token = context.attach(api.set_span_in_context(api.NonRecordingSpan(parent)))
        try:
            yield
        finally:
            context.detach(token)

    def _record_provider(self, provider: Any) -> None:
        # The API's own provider records nothing; that of an SDK may be set at any time, once.
        if provider is not self._provider and hasattr(provider, "add_span_processor"):
            self._provider = provider
            self._recorder.loop = asyncio.get_running_loop()
            provider.add_span_processor(self._recorder)


class _SpanRecorder:
    """A span processor of the SDK: it hands on the spans that belong to calls of ``service``."""

    def __init__(self, tracer: Tracer, service: str) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._tracer = tracer
        self._service = service
        self._pending: set[int] = set()

    def on_start(self, span: Any, parent_context: object = None) -> None:
        """Remember a span that begins within a call; those of other work of the process are not ours to export."""
        del parent_context
        context, own = current_context(), span.get_span_context()
        is_ours = context.trace is not None and context.trace.trace_id == f"{own.trace_id:032x}"
        if is_ours and context.service == self._service and len(self._pending) < MAX_PENDING:
            self._pending.add(own.span_id)

    def on_end(self, span: Any) -> None:
        """Export a span. It may have ended in any thread, and after the service."""
        own = span.get_span_context()
        if own.span_id not in self._pending:
            return
        self._pending.discard(own.span_id)
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._tracer.export, _convert(span, self._service))

    def _on_ending(self, span: object) -> None:
        """Do nothing: the SDK calls it before the end."""

    def shutdown(self) -> None:
        """Do nothing: the service flushes its spans itself."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Return that nothing is left here to flush."""
        del timeout_millis
        return True


def _convert(span: Any, service: str) -> Span:
    own, parent = span.get_span_context(), span.parent
    attributes = _convert_attributes(span.attributes or {})
    has_failed = span.status.status_code.name == "ERROR"
    return Span(
        service,
        str(mask(span.name)),
        _KINDS.get(span.kind.name, "internal"),
        TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", bool(own.trace_flags & 1)),
        "" if parent is None else f"{parent.span_id:016x}",
        int(span.start_time),
        int(span.end_time),
        attributes,
        str(attributes.pop("error.type", "error")) if has_failed else "",
        str(mask(span.status.description or "")) if has_failed else "",
    )


def _convert_attributes(given: Mapping[str, object]) -> dict[str, SpanValue]:
    attributes: dict[str, SpanValue] = {}
    for name, value in list(given.items())[:MAX_ATTRIBUTES]:
        # With its name, for that may say that the value is a secret.
        [masked] = cast("dict[str, object]", mask({name: value})).values()
        if isinstance(masked, str | bool | int | float):
            attributes[name] = masked
        elif isinstance(masked, list | tuple):
            attributes[name] = tuple(str(each) for each in cast("list[object]", masked))
    return attributes
