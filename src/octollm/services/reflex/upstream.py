"""The orchestrator as reflex calls it: a cached RFC 8693 token exchange per credential, and requests sent with the caller's own access token."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

import msgspec

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.context import current_context
from octollm.contracts.api import EventList, StepTexts, TaskView, TokenExchangeRequest, TokenResponse
from octollm.contracts.events import Event
from octollm.contracts.services import OperationKind
from octollm.errors import OctoError, RemoteError
from octollm.resilience import CallFailure, Deadline, RetryPolicy
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.http_client import HttpResponse, StreamedResponse

MAX_CACHED_TOKENS = 1024
"""Access tokens that are held; the one not used for longest goes first."""
MAX_CACHE_SECONDS = 300.0
EXPIRY_MARGIN_SECONDS = 30.0
"""A token is dropped so long before it ends, so that none ends on its way."""
EXCHANGE_SECONDS = 10.0
_EXCHANGE_TARGET = CallTarget("orchestrator", "token", "POST", "/token", "read_only")


def hash_credential(credential: str) -> str:
    """Return the name by which a credential is held and counted: its SHA-256."""
    return hashlib.sha256(credential.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedToken:
    """An access token that is held, and what it is for; ``until`` on the monotonic clock."""

    token: str = field(repr=False)
    tenant: str
    scope: str
    expires_at: float


class TokenExchangeClient:
    """Gets access tokens for credentials. A refusal is not kept: the next try asks again."""

    def __init__(self, caller: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._cache: OrderedDict[str, CachedToken] = OrderedDict()
        self._pending: dict[str, asyncio.Task[CachedToken]] = {}

    def is_cached(self, digest: str) -> bool:
        """Say whether a credential was exchanged a short while ago."""
        held = self._cache.get(digest)
        return held is not None and held.expires_at > self._clock.monotonic()

    async def get_token(self, credential: str) -> str:
        """Return an access token for the orchestrator.

        Raises ``api_key_invalid``, or what keeps the orchestrator from answering.
        """
        digest = hash_credential(credential)
        held = self._cache.get(digest)
        if held is not None and held.expires_at > self._clock.monotonic():
            self._cache.move_to_end(digest)
            return held.token
        asking = self._pending.get(digest)
        if asking is None:
            asking = asyncio.create_task(self._exchange(credential))
            self._pending[digest] = asking
            asking.add_done_callback(lambda done: self._store(digest, done))
        # One who asked goes away; the others still wait for the answer.
        return (await asyncio.shield(asking)).token

    def get_tenant(self, credential: str) -> str:
        """Return the tenant of a credential that was exchanged a short while ago; empty when it was not."""
        held = self._cache.get(hash_credential(credential))
        return "" if held is None else held.tenant

    def get_cached(self, credential: str) -> CachedToken:
        """Return what is held for a credential that was admitted just now; raise ``api_key_invalid`` otherwise."""
        held = self._cache.get(hash_credential(credential))
        if held is None:
            raise OctoError("The credential is not known.", code="api_key_invalid")
        return held

    def invalidate(self, credential: str) -> None:
        """Forget the token of a credential: it was refused."""
        self._cache.pop(hash_credential(credential), None)

    async def close(self) -> None:
        """End the exchanges under way."""
        asking = tuple(self._pending.values())
        for task in asking:
            task.cancel()
        for task in asking:
            with contextlib.suppress(asyncio.CancelledError, OctoError):
                await task

    def _store(self, digest: str, done: asyncio.Task[CachedToken]) -> None:
        del self._pending[digest]
        if done.cancelled() or done.exception() is not None:
            return
        self._cache[digest] = done.result()
        while len(self._cache) > MAX_CACHED_TOKENS:
            self._cache.popitem(last=False)

    async def _exchange(self, credential: str) -> CachedToken:
        call = OutgoingCall(
            _EXCHANGE_TARGET,
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, EXCHANGE_SECONDS),
            msgspec.json.encode(TokenExchangeRequest(credential)),
        )
        asked_at = self._clock.monotonic()
        try:
            answer = await self._caller.call(call, TokenResponse)
        except RemoteError as error:
            if error.status in (400, 401, 403) and error.code not in ("api_key_invalid", "login_refused"):
                # It is this service that was refused, not the caller; that is no answer to the caller's key.
                raise OctoError(
                    "The public door could not prove itself to the orchestrator.", code="unavailable", retry_after=5
                ) from error
            raise
        lifetime = min(float(answer.expires_in), MAX_CACHE_SECONDS)
        until = asked_at + max(lifetime - EXPIRY_MARGIN_SECONDS, lifetime / 2)
        return CachedToken(answer.access_token, answer.tenant, answer.scope, until)


T = TypeVar("T")

READ_SECONDS = 10.0
"""The longest wait for one look at a task on behalf of a watcher."""
_STALE_TOKEN_CODES = frozenset({"token_expired", "token_revoked", "token_invalid"})


@dataclass(frozen=True)
class GatewayRetryPolicy(RetryPolicy):
    """The policy of calls made at the door: short waits are waited here, long ones are left to the client."""

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
    """One call to be forwarded. ``path`` is encoded and has its query, if any."""

    name: str
    method: str
    path: str
    kind: OperationKind = "read_only"
    body: bytes | None = None
    idempotency_key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Upstream:
    """Calls the orchestrator in the name of a credential."""

    def __init__(self, caller: ServiceClient, exchange: TokenExchangeClient, clock: Clock) -> None:
        self._caller = caller
        self._exchange = exchange
        self._clock = clock

    async def send(self, credential: str, request: UpstreamRequest, deadline: Deadline) -> HttpResponse:
        """Return the whole answer. Raises the orchestrator's problem as it was told."""
        return await self._send_with_token(credential, request, deadline, self._caller.send)

    async def stream(
        self,
        credential: str,
        request: UpstreamRequest,
        deadline: Deadline,
        consume: Callable[[StreamedResponse], Awaitable[None]],
    ) -> None:
        """Hand the answer over as it comes. Raises the orchestrator's problem as it was told."""
        await self._send_with_token(credential, request, deadline, lambda call: self._caller.stream(call, consume))

    async def _send_with_token(
        self,
        credential: str,
        request: UpstreamRequest,
        deadline: Deadline,
        send: Callable[[OutgoingCall], Awaitable[T]],
    ) -> T:
        token = await self._exchange.get_token(credential)
        try:
            return await send(self._build_call(request, token, deadline))
        except RemoteError as error:
            if error.code not in _STALE_TOKEN_CODES:
                raise
        # The token was revoked, or its signer's key changed. Refused calls did not begin: one more try is safe.
        self._exchange.invalidate(credential)
        token = await self._exchange.get_token(credential)
        return await send(self._build_call(request, token, deadline))

    def _build_call(self, request: UpstreamRequest, token: str, deadline: Deadline) -> OutgoingCall:
        headers = dict(request.headers)
        request_id = current_context().request_id
        if request_id:
            headers["X-Request-ID"] = request_id
        return OutgoingCall(
            CallTarget("orchestrator", request.name, request.method, request.path, request.kind),
            token,
            deadline,
            request.body,
            request.idempotency_key,
            request.content_type,
            headers,
        )

    async def read(self, credential: str, name: str, path: str, response_type: type[T]) -> T:
        """Read something typed from the orchestrator."""
        answer = await self.send(
            credential, UpstreamRequest(name, "GET", path), Deadline.after(self._clock, READ_SECONDS)
        )
        return _decode_response(answer, response_type)

    async def cancel(self, credential: str, task_id: str) -> TaskView:
        """Cancel a task. Raises ``scope_missing``, ``task_not_found``, ``state_conflict``."""
        asked = UpstreamRequest("tasks.cancel", "POST", f"/tasks/{quote(task_id, safe='')}/cancel", "idempotent", b"")
        return _decode_response(await self.send(credential, asked, Deadline.after(self._clock, READ_SECONDS)), TaskView)


class UpstreamTask:
    """One task as one caller may see it: the source of a live session."""

    def __init__(self, upstream: Upstream, credential: str, task_id: str) -> None:
        self._upstream = upstream
        self._credential = credential
        self._path = f"/tasks/{quote(task_id, safe='')}"

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        return await self._upstream.read(self._credential, "tasks.read", self._path, TaskView)

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return the events behind version ``after``."""
        path = f"{self._path}/history?after={after}&limit={limit}"
        return (await self._upstream.read(self._credential, "tasks.history", path, EventList)).events

    async def texts(self) -> StepTexts:
        """Return the text of each step as it was last saved."""
        return await self._upstream.read(self._credential, "tasks.texts", f"{self._path}/texts", StepTexts)


def _decode_response(response: HttpResponse, response_type: type[T]) -> T:
    try:
        return msgspec.json.decode(response.body, type=response_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OctoError("The orchestrator answered in another form than agreed.", code="peer_protocol") from error
