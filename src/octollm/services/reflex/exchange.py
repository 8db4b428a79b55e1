"""API keys for access tokens: RFC 8693 token exchange with the orchestrator, cached for a short while."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.contracts.api import TokenExchangeRequest, TokenResponse
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.caller import CallTarget, OutgoingCall, ServiceClient

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
