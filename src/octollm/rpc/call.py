"""An incoming call (caller, deadline, span, emitter) and the declaration of the operation that serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, Protocol

import msgspec
from msgspec import UNSET
from starlette.requests import Request

from octollm.capability import VerifiedChain
from octollm.context import TraceContext
from octollm.contracts.declarations import JSON, DeclaredOperation
from octollm.contracts.services import OperationKind
from octollm.resilience import Deadline
from octollm.telemetry import Span

AuthKind = Literal["capability", "service", "public", "door"]
STREAM_SECONDS = 3600.0
"""Seconds for a stream whose reader names no deadline."""


class Emitter(Protocol):
    """What a handler tells its caller before its answer."""

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send text that was written since the last one; ``reset`` voids what was sent before."""
        ...

    async def progress(self, percent: float, message: str = "") -> None:
        """Send how far the work is, from 0 to 100."""
        ...


class NullEmitter:
    """The emitter of a call that asked for one answer: nothing is sent before it."""

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send nothing."""

    async def progress(self, percent: float, message: str = "") -> None:
        """Send nothing."""


class IncomingCall(msgspec.Struct, frozen=True):
    """One incoming call."""

    service: str
    operation: str
    request: Request
    request_id: str
    correlation_id: str
    span: Span
    """The span of this call; a handler may add to its attributes."""
    deadline: Deadline
    verified: VerifiedChain | None = None
    """The capability that was shown; ``None`` where the operation is not opened by one."""
    peer: str = ""
    """The service that speaks for itself, where the operation is opened by a service token."""
    bearer: str = ""
    key: str | None = None
    """The ``Idempotency-Key``, when one was sent."""
    body: bytes = b""
    document: Any = UNSET
    """The body as parsed JSON, where the operation is strict about its members."""
    query: Any = None
    """The query of the URL, in the type that the operation names for it."""
    emit: Emitter = msgspec.field(default_factory=NullEmitter)

    @property
    def trace(self) -> TraceContext:
        """Return where this call is in its trace."""
        return self.span.trace

    @property
    def path(self) -> Mapping[str, str]:
        """Return the parameters of the path."""
        return self.request.path_params

    @property
    def authority(self) -> VerifiedChain:
        """Return the capability; the kit has made sure that there is one."""
        if self.verified is None:
            raise AssertionError(f"{self.service}:{self.operation} is not opened by a capability")
        return self.verified

    @property
    def tenant(self) -> str:
        """Return the tenant that the call is for."""
        return self.authority.tenant


Handler = Callable[[IncomingCall, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class OperationDocs:
    """What the description of an operation says besides its types."""

    media_type: str = JSON
    """The media type of the answer."""
    stream_media_type: str = ""
    """The media type of the answer where it is asked for as it comes, if that is another."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Headers that it reads, besides those of every call: what each is for."""
    error_codes: Sequence[str] = ()
    """Error codes of its own, besides those that follow from how it is opened and what it takes."""
    other_statuses: Sequence[int] = ()
    """Further statuses that come with the same type of answer."""
    example: object = None
    """A body that can be sent."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a service: a typed async function and what opens it.

    ``scope`` may hold ``{names}`` of path parameters: they become selectors. ``body`` is ``None`` when there is
    none, or ``bytes`` for raw ones. The handler returns a value that becomes JSON, a :class:`Reply`, or a
    Starlette response. ``docs`` is what only its description needs.
    """

    name: str
    method: str
    path: str
    handler: Handler
    scope: str = ""
    kind: OperationKind = "read_only"
    claims_key: bool = True
    """Whether an ``Idempotency-Key`` is claimed and the response stored; false where a repeat is harmless anyway."""
    auth: AuthKind = "capability"
    query: Any = None
    """A Struct of what the query may hold."""
    body: Any = None
    response: Any = None
    status: int = 200
    raw: bool = False
    """The body is handed over as it came; ``body`` only describes it."""
    cacheable: bool = False
    """Answers have an ETag, and a caller who has that answer is told so with 304 (RFC 9110 section 13.1.2)."""
    strict: bool = False
    max_body: int = 4 * 1024 * 1024
    limited: bool = True
    """Counts against the bound on concurrent calls; long-lived streams do not."""
    secret_response: bool = False
    """The response holds a secret: it is encrypted where it is stored for a repeated call."""
    traced: bool = False
    """A call that comes without a trace begins one whose spans are kept."""
    timeout: float = 300.0
    """Seconds for a call that names no deadline."""
    summary: str = ""
    docs: OperationDocs = field(default_factory=OperationDocs)

    @property
    def takes_key(self) -> bool:
        """Say whether an ``Idempotency-Key`` makes a difference."""
        return self.claims_key and self.kind != "read_only"

    @property
    def decodes_body(self) -> bool:
        """Say whether the body is JSON that becomes a value of the type ``body``."""
        return self.body not in (None, bytes) and not self.raw

    @property
    def streams(self) -> bool:
        """Say whether it answers in lines where the caller wants them: what is handed on, or is no JSON, does not."""
        return self.response is not None and not self.raw and self.docs.media_type == JSON


def implement(
    declared: DeclaredOperation[Any, Any],
    handler: Handler,
    *,
    auth: AuthKind = "capability",
    raw: bool = False,
    strict: bool = True,
    timeout: float = 300.0,
    example: object = None,
) -> Operation:
    """Return the operation by which ``handler`` serves what is declared.

    With ``auth="capability"`` this is the service that does the work; otherwise it is the gateway, which serves the
    public path. ``strict`` refuses unknown members of a body: so does the public API, while services ignore them, so
    that two versions can run together. A live stream of events does not count against the bound on concurrent calls.
    """
    streams = declared.is_live_stream
    return Operation(
        declared.id.removeprefix(f"{declared.service}:"),
        declared.method,
        (auth == "capability" and declared.service_path) or declared.path,
        handler,
        scope=declared.scope,
        kind=declared.kind,
        claims_key=declared.claims_key,
        auth=auth,
        query=declared.query,
        body=None if declared.body is NoneType else declared.body,
        response=None if declared.response in (NoneType, bytes) else declared.response,
        status=declared.status,
        raw=raw,
        cacheable=declared.cacheable,
        secret_response=declared.secret_response,
        strict=strict,
        max_body=declared.body_limit,
        limited=not streams,
        traced=declared.starts_trace,
        timeout=STREAM_SECONDS if streams else timeout,
        summary=declared.summary,
        docs=OperationDocs(
            declared.media_type,
            declared.stream_media_type,
            declared.headers,
            declared.error_codes,
            declared.other_statuses,
            example,
        ),
    )


@dataclass(frozen=True, slots=True)
class OperationResponse:
    """A value with a status and headers of its own."""

    value: object
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
