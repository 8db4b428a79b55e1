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

AuthKind = Literal["capability", "service", "public", "gateway"]
STREAM_SECONDS = 3600.0
"""Seconds for a stream whose reader names no deadline."""


class Emitter(Protocol):
    """Streams text and progress to the caller before the response."""

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send the text that was written since the last call; ``reset`` discards the text that was sent before."""
        ...

    async def progress(self, percent: float, message: str = "") -> None:
        """Send the progress, from 0 to 100."""
        ...


class NullEmitter:
    """The emitter of a call without a stream: nothing is sent before the response."""

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
    """An operation of a service: a typed async function and its authorization.

    ``scope`` may hold ``{names}`` of path parameters: they become selectors. ``body`` is ``None`` when there is
    none, or ``bytes`` for raw ones. The handler returns a value that is encoded as JSON, an
    :class:`OperationResponse`, or a Starlette response. ``docs`` has what only the API description needs.
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
    """A Struct with the parameters of the query."""
    body: Any = None
    response: Any = None
    status: int = 200
    raw: bool = False
    """The handler gets the unparsed body; ``body`` only describes it."""
    cacheable: bool = False
    """Responses have an ETag, and a caller that has the current one gets 304 (RFC 9110 section 13.1.2)."""
    strict: bool = False
    max_body: int = 4 * 1024 * 1024
    limited: bool = True
    """Whether a call counts towards the limit on concurrent calls; long-lived streams do not."""
    secret_response: bool = False
    """The response holds a secret: it is encrypted where it is stored for a repeated call."""
    traced: bool = False
    """A call without a trace context starts a trace that is always recorded."""
    openai_errors: bool = False
    """Problem documents also have the member ``error`` that OpenAI clients read."""
    timeout: float = 300.0
    """Seconds for a call without a deadline."""
    summary: str = ""
    docs: OperationDocs = field(default_factory=OperationDocs)

    @property
    def takes_key(self) -> bool:
        """Return whether the operation honours an ``Idempotency-Key``."""
        return self.claims_key and self.kind != "read_only"

    @property
    def decodes_body(self) -> bool:
        """Return whether the body is JSON that is decoded to the type ``body``."""
        return self.body not in (None, bytes) and not self.raw

    @property
    def streams(self) -> bool:
        """Say whether it answers in lines where the caller wants them: what is handed on, or is no JSON, does not."""
        return self.response is not None and not self.raw and self.docs.media_type == JSON


def implement(
    declared: DeclaredOperation[Any, Any],
    handler: Handler,
    *,
    auth: AuthKind | None = None,
    raw: bool = False,
    strict: bool | None = None,
    timeout: float = 300.0,
    example: object = None,
) -> Operation:
    """Return the operation by which ``handler`` serves what is declared.

    Without ``auth`` the service itself serves the operation, and the declaration determines the authorization. The
    gateway passes ``auth``. It serves the public path, and uses the full id as the name, since it serves the operations
    of several services. ``strict`` refuses unknown members of a body, as the public API does. Services ignore unknown
    members in calls from each other, so that two versions can run together. A live stream does not count towards the
    limit on concurrent calls.
    """
    streams = declared.is_live_stream
    at_gateway = auth is not None
    if auth is None:
        auth = "service" if declared.callers else "public" if declared.anonymous else "capability"
    return Operation(
        declared.id if at_gateway else declared.id.removeprefix(f"{declared.service}:"),
        declared.method,
        (not at_gateway and declared.service_path) or declared.path,
        handler,
        # Of a call that a service token authorizes, the scope is the list of the admitted services.
        scope=declared.callers or declared.scope,
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
        strict=not declared.callers if strict is None else strict,
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
