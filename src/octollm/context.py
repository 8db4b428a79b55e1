"""The identifiers of the work at hand, carried by a context variable so that every log line has them."""

from __future__ import annotations

import random
import re
from contextvars import ContextVar

import msgspec

ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
"""An acceptable request or correlation id; anything else is replaced."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


class Trace(msgspec.Struct, frozen=True):
    """A W3C trace context (Trace Context level 1): ids in lower-case hex."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        """Return the ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def child(self) -> Trace:
        """Return a new span of the same trace."""
        return Trace(self.trace_id, _span_id(), self.sampled)


def parse_traceparent(text: str | None) -> Trace | None:
    """Read a ``traceparent`` header; ``None`` when it is absent or malformed (section 3.2 says: restart)."""
    match = _TRACEPARENT.fullmatch(text or "")
    if match is None:
        return None
    trace_id, span_id, flags = match.groups()
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & 1))


def new_trace(*, sampled: bool = False) -> Trace:
    """Start a trace. Only what is ``sampled`` leaves spans behind, here and wherever its calls go."""
    return Trace(f"{random.getrandbits(128) or 1:032x}", _span_id(), sampled)


def _span_id() -> str:
    # No secret, and needed twice a call: asking the system for random bytes costs ten times as much. After a fork
    # the generator is seeded anew.
    return f"{random.getrandbits(64) or 1:016x}"


class Scene(msgspec.Struct, frozen=True):
    """Who is working on what: attached to every log line of the work."""

    service: str = ""
    request_id: str = ""
    correlation_id: str = ""
    trace: Trace | None = None
    task_id: str = ""
    step: str = ""
    tenant: str = ""


_EMPTY = Scene()
_scene: ContextVar[Scene] = ContextVar("octollm_scene", default=_EMPTY)


def current_scene() -> Scene:
    """Return the scene of the running task."""
    return _scene.get()


def set_scene(scene: Scene) -> None:
    """Set the scene of the running asyncio task (each request has a task of its own)."""
    _scene.set(scene)
