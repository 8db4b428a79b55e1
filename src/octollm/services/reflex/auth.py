"""Who is at the door: an API key, or the local user where that is trusted."""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection, Request

from octollm.errors import OctoError
from octollm.rpc.call import Operation
from octollm.rpc.opened import Opened
from octollm.services.reflex.addresses import OurNames
from octollm.services.reflex.doorstep import port_of
from octollm.services.reflex.exchange import Exchange, digest_of
from octollm.services.reflex.guessing import Guessing
from octollm.services.reflex.rate import Rate, address_bucket
from octollm.services.reflex.session import shown_session
from octollm.services.reflex.trust import check_local
from octollm.telemetry import Metrics

_KEY = re.compile(r"[!-~]{1,8192}")


class Door:
    """Admits callers. What it hands on is the caller's credential, which leaves this process only in an exchange."""

    def __init__(
        self,
        exchange: Exchange,
        rate: Rate,
        ours: OurNames,
        metrics: Metrics,
        *,
        guessing: Guessing,
        local_key: str | None,
    ) -> None:
        """``local_key`` is the local user's credential; ``None`` where a local peer is nobody in particular."""
        self._exchange = exchange
        self._rate = rate
        self._ours = ours
        self._metrics = metrics
        self._guessing = guessing
        self._local_key = local_key

    async def admit(self, connection: HTTPConnection) -> str:
        """Return the credential of who asks, known to be valid and within its rate.

        Raises ``token_missing``, ``token_malformed``, ``api_key_invalid``, ``origin_refused``, ``rate_limited``.
        """
        try:
            return await self._admit(connection)
        except OctoError as error:
            self._metrics.screened.labels(error.code).inc()
            raise

    def tenant(self, credential: str) -> str:
        """Return the tenant of a caller who was admitted, as the orchestrator named it."""
        return self._exchange.tenant(credential)

    async def count(self, credential: str) -> None:
        """Count one more call of a caller who was admitted; raises ``rate_limited``."""
        await self._rate.hit(f"key:{digest_of(credential)}")

    async def _admit(self, connection: HTTPConnection) -> str:
        peer = connection.client.host if connection.client is not None else ""
        credential = self._credential(connection, peer)
        digest = digest_of(credential)
        if not self._exchange.holds(digest):
            # Guessing keys is counted by address: each guess would have a bucket of its own.
            await self._rate.hit(address_bucket(peer))
            async with self._guessing.trying(credential):
                await self._exchange.token(credential)
        await self._exchange.token(credential)
        await self._rate.hit(f"key:{digest}")
        return credential

    def _credential(self, connection: HTTPConnection, peer: str) -> str:
        values = connection.headers.getlist("authorization")
        if values:
            scheme, _, key = values[0].partition(" ")
            key = key.strip()
            if len(values) > 1 or scheme.lower() != "bearer" or not _KEY.fullmatch(key):
                raise OctoError("The Authorization header must be one `Bearer <API key>`.", code="token_malformed")
            return key
        session = shown_session(connection, self._ours)
        if session is not None:
            return session
        if self._local_key is None:
            raise OctoError("An API key is needed as a bearer token.", code="token_missing")
        check_local(connection.headers, peer, port_of(connection.scope), self._ours)
        return self._local_key


class DoorOpener:
    """Opens an operation to whoever the door admits; what they may do there the orchestrator says."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def open(self, request: Request, operation: Operation) -> Opened:
        """Return the caller's credential as the bearer of the call."""
        del operation
        credential = await self._door.admit(request)
        return Opened(bearer=credential, door_tenant=self._door.tenant(credential))
