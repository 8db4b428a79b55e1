"""Calls of orchestrator, memory and monitor with the caller's own access token, exchanged and cached (RFC 8693)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import msgspec

from octollm.capability import ScopeSet, ServiceTokenSigner
from octollm.clock import Clock
from octollm.context import current_context
from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.auth import TokenExchangeRequest, TokenResponse
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.events import Event
from octollm.contracts.internal_operations import EXCHANGE_TOKEN
from octollm.contracts.services import OperationKind
from octollm.contracts.task_operations import READ_TASK, TASK_HISTORY, TASK_TEXTS
from octollm.errors import OctoError, RemoteError, map_exceptions
from octollm.lru import LruCache
from octollm.resilience import CallFailure, Deadline, RetryPolicy
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.http_client import HttpResponse, StreamedResponse

MAX_CACHED_TOKENS = 1024
"""Cached access tokens; the least recently used is evicted first."""
MAX_CACHE_SECONDS = 300.0
EXPIRY_MARGIN_SECONDS = 30.0
"""A token leaves the cache this long before it expires, so that none expires in transit."""
EXCHANGE_SECONDS = 10.0


Audience = Literal["orchestrator", "memory", "monitor"]
"""The services that public calls are forwarded to."""
AUDIENCES: tuple[Audience, ...] = ("orchestrator", "memory", "monitor")
_CALLER_CODES = frozenset({"api_key_invalid", "authority_missing", "login_refused"})
"""Refusals of an exchange that concern the caller, and not this service."""


def raise_unless_refused(error: RemoteError) -> None:
    """Raise ``unavailable`` if the orchestrator refused this service rather than its caller, whose key may be valid."""
    if error.status in (400, 401, 403) and error.code not in _CALLER_CODES:
        raise OctoError(
            "The gateway could not authenticate to the orchestrator.", code="unavailable", retry_after=5
        ) from error


def _cache_key(credential: str, audience: Audience) -> str:
    digest = hash_credential(credential)
    return digest if audience == "orchestrator" else f"{digest}:{audience}"


def hash_credential(credential: str) -> str:
    """Return the SHA-256 of a credential, by which it is cached and counted."""
    return hashlib.sha256(credential.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedToken:
    """A cached access token; ``expires_at`` is on the monotonic clock."""

    token: str = field(repr=False)
    tenant: str
    scope: str
    expires_at: float


class TokenExchangeClient:
    """Exchanges credentials for access tokens, and caches these. Failures are not cached."""

    def __init__(self, caller: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._cache: LruCache[str, CachedToken] = LruCache(MAX_CACHED_TOKENS)
        self._pending: dict[str, asyncio.Task[CachedToken]] = {}

    def is_cached(self, digest: str) -> bool:
        """Return whether the token of a credential, by its hash, is cached and valid."""
        cached = self._cache.get(digest)
        return cached is not None and cached.expires_at > self._clock.monotonic()

    async def get_token(self, credential: str, audience: Audience = "orchestrator") -> str:
        """Return an access token for the service ``audience``. Raises as :meth:`get_valid`."""
        return (await self.get_valid(credential, audience)).token

    async def get_valid(self, credential: str, audience: Audience = "orchestrator") -> CachedToken:
        """Return the token of a credential for the service ``audience``, from the cache or exchanged now.

        Raises ``api_key_invalid``, ``login_refused``, ``authority_missing``, or the error of a failed call.
        """
        digest = _cache_key(credential, audience)
        cached = self._cache.get(digest)
        if cached is not None and cached.expires_at > self._clock.monotonic():
            return cached
        # Concurrent callers of one credential share one exchange. Cancelling one must not cancel it for the others.
        pending = self._pending.get(digest)
        if pending is None:
            pending = asyncio.create_task(self._exchange(credential, audience))
            self._pending[digest] = pending
            pending.add_done_callback(lambda done: self._store(digest, done))
        return await asyncio.shield(pending)

    def get_tenant(self, credential: str) -> str:
        """Return the tenant of a cached credential; empty for any other."""
        cached = self._cache.get(hash_credential(credential))
        return "" if cached is None else cached.tenant

    def find_cached(self, credential: str, audience: Audience = "orchestrator") -> CachedToken | None:
        """Return the cached token of a credential for a service, or ``None``."""
        return self._cache.get(_cache_key(credential, audience))

    def invalidate(self, credential: str) -> None:
        """Drop the cached tokens of a credential."""
        for audience in AUDIENCES:
            self._cache.pop(_cache_key(credential, audience))

    async def close(self) -> None:
        """Cancel the pending exchanges."""
        pending = tuple(self._pending.values())
        for task in pending:
            task.cancel()
        for task in pending:
            with contextlib.suppress(asyncio.CancelledError, OctoError):
                await task

    def _store(self, digest: str, done: asyncio.Task[CachedToken]) -> None:
        del self._pending[digest]
        if done.cancelled() or done.exception() is not None:
            return
        self._cache.put(digest, done.result())

    async def _exchange(self, credential: str, audience: Audience) -> CachedToken:
        call = OutgoingCall(
            CallTarget.of(EXCHANGE_TOKEN),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, EXCHANGE_SECONDS),
            msgspec.json.encode(TokenExchangeRequest(credential, audience=audience)),
        )
        # The life counts from the request, so that a slow response cannot make a token seem younger than it is.
        requested_at = self._clock.monotonic()
        try:
            token = await self._caller.call(call, TokenResponse)
        except RemoteError as error:
            raise_unless_refused(error)
            raise
        lifetime = min(float(token.expires_in), MAX_CACHE_SECONDS)
        # A token with a short life is still used for half of it, rather than exchanged for every call.
        expires_at = requested_at + max(lifetime - EXPIRY_MARGIN_SECONDS, lifetime / 2)
        return CachedToken(token.access_token, token.tenant, token.scope, expires_at)


T = TypeVar("T")

READ_SECONDS = 10.0
"""Timeout of a call on behalf of a live connection."""
_STALE_TOKEN_CODES = frozenset({"token_expired", "token_revoked", "token_invalid"})


@dataclass(frozen=True)
class GatewayRetryPolicy(RetryPolicy):
    """The gateway's policy: it waits for a short ``Retry-After`` itself and passes a longer one on to the client."""

    max_wait: float = 1.0

    def next_delay(
        self, failure: CallFailure, *, attempt: int, is_idempotent: bool, remaining: float, random: float
    ) -> float | None:
        """Return the seconds to wait, or ``None`` to pass the failure on at once, with its ``Retry-After``."""
        if failure.retry_after is not None and failure.retry_after > self.max_wait:
            return None
        return super().next_delay(
            failure, attempt=attempt, is_idempotent=is_idempotent, remaining=remaining, random=random
        )


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """A call to forward. ``path`` is percent-encoded and includes the query."""

    name: str
    method: str
    path: str
    kind: OperationKind = "read_only"
    body: bytes | None = None
    idempotency_key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    service: Audience = "orchestrator"


class Upstream:
    """Calls the orchestrator, the memory or the monitor with the access token of a credential."""

    def __init__(self, caller: ServiceClient, exchange: TokenExchangeClient, clock: Clock) -> None:
        self._caller = caller
        self._exchange = exchange
        self._clock = clock

    def get_cached_token(self, credential: str) -> CachedToken | None:
        """Return the access token that a credential is called with now; ``None`` if it is not cached."""
        return self._exchange.find_cached(credential)

    def get_tenant(self, credential: str) -> str:
        """Return the tenant of an authenticated credential."""
        return self._exchange.get_tenant(credential)

    async def may_call(self, credential: str, declared: DeclaredOperation[Any, Any]) -> bool:
        """Return whether a credential's scopes allow an operation. Raises the error of a failed exchange."""
        audience = cast("Audience", declared.service)
        try:
            await self._exchange.get_token(credential, audience)
        except OctoError as error:
            if error.code == "authority_missing":
                return False
            raise
        cached = self._exchange.find_cached(credential, audience)
        return cached is not None and ScopeSet.parse(cached.scope).allows(declared.scope)

    async def send(self, credential: str, request: UpstreamRequest, deadline: Deadline) -> HttpResponse:
        """Return the response. Raises the service's problem as a :class:`RemoteError`."""
        return await self._send_with_token(credential, request, deadline, self._caller.send)

    async def stream(
        self,
        credential: str,
        request: UpstreamRequest,
        deadline: Deadline,
        consume: Callable[[StreamedResponse], Awaitable[None]],
    ) -> None:
        """Pass the response to ``consume`` as a stream. Raises as :meth:`send`."""
        await self._send_with_token(credential, request, deadline, lambda call: self._caller.stream(call, consume))

    async def _send_with_token(
        self,
        credential: str,
        request: UpstreamRequest,
        deadline: Deadline,
        send: Callable[[OutgoingCall], Awaitable[T]],
    ) -> T:
        token = await self._exchange.get_token(credential, request.service)
        try:
            return await send(self._build_call(request, token, deadline))
        except RemoteError as error:
            if error.code not in _STALE_TOKEN_CODES:
                raise
        # The cached token was revoked, or its signing key rotated. A refused call has not begun: retry it once.
        self._exchange.invalidate(credential)
        token = await self._exchange.get_token(credential, request.service)
        try:
            return await send(self._build_call(request, token, deadline))
        except RemoteError as error:
            if error.code not in _STALE_TOKEN_CODES:
                raise
            # The credential is valid: it was exchanged just now. That the service does not accept its token yet is not
            # the caller's to mend: a browser would ask for another key.
            raise OctoError(
                f"The {request.service} does not accept a new token yet.", code="unavailable", retry_after=1
            ) from error

    def _build_call(self, request: UpstreamRequest, token: str, deadline: Deadline) -> OutgoingCall:
        headers = dict(request.headers)
        request_id = current_context().request_id
        if request_id:
            headers["X-Request-ID"] = request_id
        return OutgoingCall(
            CallTarget(request.service, request.name, request.method, request.path, request.kind),
            token,
            deadline,
            request.body,
            request.idempotency_key,
            request.content_type,
            headers,
        )

    async def call(
        self,
        credential: str,
        declared: DeclaredOperation[Any, T],
        query: str = "",
        *,
        body: object = None,
        key: str | None = None,
        **parameters: str,
    ) -> T:
        """Call a declared operation, and return its decoded response. ``key`` is its idempotency key."""
        path = declared.format_service_path(**parameters)
        request = UpstreamRequest(
            declared.id,
            declared.method,
            f"{path}?{query}" if query else path,
            declared.kind,
            None if declared.method == "GET" else b"" if body is None else msgspec.json.encode(body),
            key,
            service=cast("Audience", declared.service),
        )
        response = await self.send(credential, request, self.create_deadline())
        with map_exceptions(
            OctoError("A service's response does not fit its type.", code="peer_protocol"),
            msgspec.DecodeError,
            UnicodeDecodeError,
        ):
            return msgspec.json.decode(response.body, type=declared.response)

    def create_deadline(self) -> Deadline:
        """Return the deadline of a call on behalf of a live connection that begins now."""
        return Deadline.after(self._clock, READ_SECONDS)


class UpstreamTask:
    """A task as one caller may read it: the source of a live session."""

    def __init__(self, upstream: Upstream, credential: str, task_id: str) -> None:
        self._upstream = upstream
        self._credential = credential
        self._task_id = task_id

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        return await self._upstream.call(self._credential, READ_TASK, task_id=self._task_id)

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return the events after version ``after``."""
        query = f"after={after}&limit={limit}"
        return (await self._upstream.call(self._credential, TASK_HISTORY, query, task_id=self._task_id)).events

    async def texts(self) -> StepTexts:
        """Return the text of each step as last saved."""
        return await self._upstream.call(self._credential, TASK_TEXTS, task_id=self._task_id)
