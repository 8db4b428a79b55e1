"""Request context in a context variable: request and correlation id, W3C trace context, tenant, task and step.

Every log line and span carries it. ``traceparent`` and ``tracestate`` are those of W3C Trace Context, level 2;
``baggage`` is that of W3C Baggage.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from contextvars import ContextVar

import msgspec

REQUEST_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
"""A valid request or correlation id; any other is replaced by a generated one."""

MAX_TRACESTATE = 4096
"""Characters of a ``tracestate`` that is passed on; the standard asks for at least 512."""
MAX_STATE_MEMBERS = 32
MAX_BAGGAGE = 8192
"""Characters of a ``baggage`` that is passed on, the most that the standard asks for."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_SAMPLED, _RANDOM = 1, 2
_STATE_KEY = r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_STATE_VALUE = r"[ !-+\--<>-~]{0,255}[!-+\--<>-~]"
_STATE_MEMBER = re.compile(rf"{_STATE_KEY}={_STATE_VALUE}")
_BAGGAGE = re.compile(r"[ -~\t]+")


class TraceContext(msgspec.Struct, frozen=True):
    """Trace id, span id and flags; the ids are lower-case hex.

    ``random`` says that at least the last 56 bits of the trace id are random. ``state`` is the ``tracestate`` of the
    vendors on the way, which is passed on as it came.
    """

    trace_id: str
    span_id: str
    sampled: bool = True
    random: bool = False
    state: str = ""

    @property
    def traceparent(self) -> str:
        """Return the ``traceparent`` header."""
        flags = (_SAMPLED if self.sampled else 0) | (_RANDOM if self.random else 0)
        return f"00-{self.trace_id}-{self.span_id}-0{flags}"

    def child(self) -> TraceContext:
        """Return the context of a new span in the same trace."""
        return TraceContext(self.trace_id, _span_id(), self.sampled, self.random, self.state)


def parse_traceparent(text: str | None, state: str = "") -> TraceContext | None:
    """Parse a ``traceparent`` header; ``None`` when it is absent or malformed (section 3.2: the trace restarts).

    A version that is not known yet is read as version 00, and may have more fields (section 3.2.4). ``state`` is the
    parsed ``tracestate``.
    """
    match = _TRACEPARENT.fullmatch(text or "")
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    bits = int(flags, 16)
    return TraceContext(trace_id, span_id, bool(bits & _SAMPLED), bool(bits & _RANDOM), state)


def parse_tracestate(values: Iterable[str]) -> str:
    """Return the value of one or more ``tracestate`` headers; empty if it is malformed or too large (section 3.3)."""
    members = [member.strip(" \t") for value in values for member in value.split(",")]
    members = [member for member in members if member]
    if len(members) > MAX_STATE_MEMBERS or not all(_STATE_MEMBER.fullmatch(member) for member in members):
        return ""
    state = ",".join(members)
    return state if len(state) <= MAX_TRACESTATE else ""


def parse_baggage(values: Iterable[str]) -> str:
    """Return the value of one or more ``baggage`` headers, as it is passed on; empty if it is too large or no text."""
    baggage = ",".join(value.strip(" \t") for value in values if value.strip(" \t"))
    return baggage if len(baggage) <= MAX_BAGGAGE and _BAGGAGE.fullmatch(baggage) else ""


def start_trace(*, sampled: bool = False) -> TraceContext:
    """Start a trace. A ``sampled`` one records spans here and in every service that its calls reach."""
    return TraceContext(f"{random.getrandbits(128) or 1:032x}", _span_id(), sampled, random=True)


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
    baggage: str = ""
    """The caller's ``baggage``, for the calls of this request to other services."""


_EMPTY_CONTEXT = RequestContext()
_context: ContextVar[RequestContext] = ContextVar("octollm_request_context", default=_EMPTY_CONTEXT)


def current_context() -> RequestContext:
    """Return the request context of the running asyncio task."""
    return _context.get()


def set_context(context: RequestContext) -> None:
    """Set the request context of the running asyncio task; each request has a task of its own."""
    _context.set(context)
