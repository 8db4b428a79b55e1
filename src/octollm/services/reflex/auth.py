"""Authentication of public requests: API key, session cookie, or the trusted local user; each within its rate limit."""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection, Request

from octollm.errors import OctoError
from octollm.rpc.auth import AuthContext
from octollm.rpc.call import Operation
from octollm.services.reflex.guard import AllowedHosts, check_local_user, get_server_port, read_session_cookie
from octollm.services.reflex.throttle import FailedLoginThrottle, RateLimiter, get_address_bucket
from octollm.services.reflex.upstream import TokenExchangeClient, hash_credential
from octollm.telemetry import Metrics

_BEARER_VALUE = re.compile(r"[!-~]{1,8192}")


class CredentialAuthenticator:
    """Authenticates callers by API key, session or loopback trust, within their rate limits.

    The result is the caller's credential. It leaves this process only in a token exchange.
    """

    def __init__(
        self,
        exchange: TokenExchangeClient,
        rate_limiter: RateLimiter,
        allowed_hosts: AllowedHosts,
        metrics: Metrics,
        *,
        throttle: FailedLoginThrottle,
        local_key: str | None,
    ) -> None:
        """``local_key`` is the local user's credential; ``None`` where loopback is not trusted."""
        self._exchange = exchange
        self._rate_limiter = rate_limiter
        self._allowed_hosts = allowed_hosts
        self._metrics = metrics
        self._throttle = throttle
        self._local_key = local_key

    async def authenticate(self, connection: HTTPConnection) -> str:
        """Return the credential of the caller, valid and within its rate limit.

        Raises ``token_missing``, ``token_malformed``, ``api_key_invalid``, ``origin_refused``, ``rate_limited``.
        """
        try:
            return await self._authenticate(connection)
        except OctoError as error:
            self._metrics.rejected_requests.labels(error.code).inc()
            raise

    def get_tenant(self, credential: str) -> str:
        """Return the tenant of an authenticated caller, as the orchestrator named it."""
        return self._exchange.get_tenant(credential)

    async def check_rate_limit(self, credential: str) -> None:
        """Count one more call of an authenticated caller. Raises ``rate_limited``."""
        await self._rate_limiter.hit(f"key:{hash_credential(credential)}")

    async def _authenticate(self, connection: HTTPConnection) -> str:
        peer = connection.client.host if connection.client is not None else ""
        credential = self._read_credential(connection, peer)
        digest = hash_credential(credential)
        if not self._exchange.is_cached(digest):
            # Count guesses by address: by key, each guess would have a bucket of its own.
            await self._rate_limiter.hit(get_address_bucket(peer))
            async with self._throttle.attempt(credential):
                await self._exchange.get_token(credential)
        await self._exchange.get_token(credential)
        await self._rate_limiter.hit(f"key:{digest}")
        return credential

    def _read_credential(self, connection: HTTPConnection, peer: str) -> str:
        # An explicit key comes first: what a browser sends by itself needs a check of its origin, a key does not.
        values = connection.headers.getlist("authorization")
        if values:
            scheme, _, key = values[0].partition(" ")
            key = key.strip()
            if len(values) > 1 or scheme.lower() != "bearer" or not _BEARER_VALUE.fullmatch(key):
                raise OctoError("The Authorization header must be one `Bearer <API key>`.", code="token_malformed")
            return key
        session = read_session_cookie(connection, self._allowed_hosts)
        if session is not None:
            return session
        if self._local_key is None:
            raise OctoError("An API key is needed as a bearer token.", code="token_missing")
        check_local_user(connection.headers, peer, get_server_port(connection.scope), self._allowed_hosts)
        return self._local_key


class GatewayAuthenticator:
    """Authenticates the gateway's operations. The orchestrator decides what the caller may do."""

    def __init__(self, authenticator: CredentialAuthenticator) -> None:
        self._authenticator = authenticator

    async def authenticate(self, request: Request, operation: Operation) -> AuthContext:
        """Return the caller's credential as the bearer of the call."""
        del operation
        credential = await self._authenticator.authenticate(request)
        return AuthContext(bearer=credential, gateway_tenant=self._authenticator.get_tenant(credential))
