"""Request context in a context variable: request and correlation id, W3C trace context, tenant, task and step.

Every log line and span carries it. The format of ``traceparent`` is that of W3C Trace Context, level 1.
"""

from __future__ import annotations

import random
import re
from contextvars import ContextVar

import msgspec

REQUEST_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
"""A valid request or correlation id; any other is replaced by a generated one."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


class TraceContext(msgspec.Struct, frozen=True):
    """Trace id, span id and sampling flag; the ids are lower-case hex."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        """Return the ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def child(self) -> TraceContext:
        """Return the context of a new span in the same trace."""
        return TraceContext(self.trace_id, _span_id(), self.sampled)


def parse_traceparent(text: str | None) -> TraceContext | None:
    """Parse a ``traceparent`` header; ``None`` when it is absent or malformed (section 3.2: the trace restarts)."""
    match = _TRACEPARENT.fullmatch(text or "")
    if match is None:
        return None
    trace_id, span_id, flags = match.groups()
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


def start_trace(*, sampled: bool = False) -> TraceContext:
    """Start a trace. A ``sampled`` one records spans here and in every service that its calls reach."""
    return TraceContext(f"{random.getrandbits(128) or 1:032x}", _span_id(), sampled)


def _span_id() -> str:
    # Not a secret, and needed twice a call: random bytes of the system cost ten times as much. Python seeds this
    # generator anew after a fork.
    return f"{random.getrandbits(64) or 1:016x}"


class RequestContext(msgspec.Struct, frozen=True):
    """Identifiers of the request that the running asyncio task serves; empty where unknown."""

    service: str = ""
    request_id: str = ""
    correlation_id: str = ""
    trace: TraceContext | None = None
    task_id: str = ""
    step: str = ""
    tenant: str = ""


_EMPTY_CONTEXT = RequestContext()
_context: ContextVar[RequestContext] = ContextVar("octollm_request_context", default=_EMPTY_CONTEXT)


def current_context() -> RequestContext:
    """Return the request context of the running asyncio task."""
    return _context.get()


def set_context(context: RequestContext) -> None:
    """Set the request context of the running asyncio task; each request has a task of its own."""
    _context.set(context)
