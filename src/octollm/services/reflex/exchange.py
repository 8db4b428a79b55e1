"""API keys for access tokens: RFC 8693 token exchange with the orchestrator, cached for a short while."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from octollm.capability import SelfSigner
from octollm.clock import Clock
from octollm.contracts.api import ExchangeRequest, TokenAnswer
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target

MAX_HELD = 1024
"""Access tokens that are held; the one not used for longest goes first."""
MAX_HELD_SECONDS = 300.0
MARGIN_SECONDS = 30.0
"""A token is dropped so long before it ends, so that none ends on its way."""
EXCHANGE_SECONDS = 10.0
_TARGET = Target("orchestrator", "token", "POST", "/token", "read_only")


def digest_of(secret: str) -> str:
    """Return the name by which a credential is held and counted: its SHA-256."""
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Held:
    """An access token that is held, and what it is for; ``until`` on the monotonic clock."""

    token: str = field(repr=False)
    tenant: str
    scope: str
    until: float


class Exchange:
    """Gets access tokens for credentials. A refusal is not kept: the next try asks again."""

    def __init__(self, caller: Caller, signer: SelfSigner, clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Held]] = {}

    def holds(self, digest: str) -> bool:
        """Say whether a credential was exchanged a short while ago."""
        held = self._held.get(digest)
        return held is not None and held.until > self._clock.monotonic()

    async def token(self, secret: str) -> str:
        """Return an access token for the orchestrator.

        Raises ``api_key_invalid``, or what keeps the orchestrator from answering.
        """
        digest = digest_of(secret)
        held = self._held.get(digest)
        if held is not None and held.until > self._clock.monotonic():
            self._held.move_to_end(digest)
            return held.token
        asking = self._asking.get(digest)
        if asking is None:
            asking = asyncio.create_task(self._ask(secret))
            self._asking[digest] = asking
            asking.add_done_callback(lambda done: self._asked(digest, done))
        # One who asked goes away; the others still wait for the answer.
        return (await asyncio.shield(asking)).token

    def tenant(self, secret: str) -> str:
        """Return the tenant of a credential that was exchanged a short while ago; empty when it was not."""
        held = self._held.get(digest_of(secret))
        return "" if held is None else held.tenant

    def held(self, secret: str) -> Held:
        """Return what is held for a credential that was admitted just now; raise ``api_key_invalid`` otherwise."""
        held = self._held.get(digest_of(secret))
        if held is None:
            raise OctoError("The credential is not known.", code="api_key_invalid")
        return held

    def drop(self, secret: str) -> None:
        """Forget the token of a credential: it was refused."""
        self._held.pop(digest_of(secret), None)

    async def close(self) -> None:
        """End the exchanges under way."""
        asking = tuple(self._asking.values())
        for task in asking:
            task.cancel()
        for task in asking:
            with contextlib.suppress(asyncio.CancelledError, OctoError):
                await task

    def _asked(self, digest: str, done: asyncio.Task[Held]) -> None:
        del self._asking[digest]
        if done.cancelled() or done.exception() is not None:
            return
        self._held[digest] = done.result()
        while len(self._held) > MAX_HELD:
            self._held.popitem(last=False)

    async def _ask(self, secret: str) -> Held:
        call = Outgoing(
            _TARGET,
            self._signer.svc_token("orchestrator"),
            Deadline.after(self._clock, EXCHANGE_SECONDS),
            msgspec.json.encode(ExchangeRequest(secret)),
        )
        asked_at = self._clock.monotonic()
        try:
            answer = await self._caller.answer(call, TokenAnswer)
        except RemoteError as error:
            if error.status in (400, 401, 403) and error.code not in ("api_key_invalid", "login_refused"):
                # It is this service that was refused, not the caller; that is no answer to the caller's key.
                raise OctoError(
                    "The public door could not prove itself to the orchestrator.", code="unavailable", retry_after=5
                ) from error
            raise
        lifetime = min(float(answer.expires_in), MAX_HELD_SECONDS)
        until = asked_at + max(lifetime - MARGIN_SECONDS, lifetime / 2)
        return Held(answer.access_token, answer.tenant, answer.scope, until)
