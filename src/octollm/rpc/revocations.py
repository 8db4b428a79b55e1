"""A service's copy of the revocation list, kept up to date by the orchestrator's NDJSON stream.

While the copy is stale, the service refuses calls that are not read-only: a token may have been revoked meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm.capability import Revocations, ServiceTokenSigner
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop
from octollm.context import RequestContext, current_context, set_context, start_trace
from octollm.contracts.auth import RevocationUpdate
from octollm.contracts.internal_operations import READ_REVOCATIONS
from octollm.contracts.observability import DependencyStatus
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.framing import iter_ndjson
from octollm.resilience import Backoff, Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.http_client import StreamedResponse
from octollm.telemetry import Logger

STALE_SECONDS = 60.0
"""Age of the last update at which calls that are not read-only are refused."""
LATE_SECONDS = 15.0
"""Age of the last update at which ``/ready`` reports it; the stream has a line at least every five seconds."""
QUIET_SECONDS = 5.0
"""A shorter interruption is not logged."""
STREAM_SECONDS = 3600.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
MAX_LINE = 1024 * 1024
PRUNE_SECONDS = 600.0


class RevocationSubscriber:
    """Copies the orchestrator's revocations into ``revocations``, which this service's verifiers check."""

    def __init__(self, client: ServiceClient, signer: ServiceTokenSigner, clock: Clock, log: Logger) -> None:
        self.revocations = Revocations()
        self._client = client
        self._signer = signer
        self._clock = clock
        self._updated_at: float | None = None
        self._pruned = clock.monotonic()
        # A short interruption is not logged, since services restart now and then.
        self._loop = BackgroundLoop(
            "revocations",
            self._read,
            interval=FIRST_PAUSE,
            backoff=Backoff(FIRST_PAUSE, LONGEST_PAUSE),
            log=log,
            log_after=QUIET_SECONDS,
        )

    @property
    def failure(self) -> str:
        """Return why the last connection failed; empty while updates arrive."""
        return self._loop.failure

    def check(self, *, read_only: bool) -> None:
        """Raise ``revocations_unknown`` when this service may not know of a revocation.

        Until the list was read once, that refuses every call; after a minute without an update, those that are not
        read-only.
        """
        updated_at = self._updated_at
        if updated_at is None:
            raise _revocations_unknown("The revocation list has not been read yet.")
        if not read_only and self._clock.monotonic() - updated_at > STALE_SECONDS:
            raise _revocations_unknown("The revocation list is out of date, so only read-only calls are served.")

    async def check_readiness(self) -> DependencyStatus:
        """Return the state of the copy for ``/ready``: not ready until the whole list was read once."""
        if self._updated_at is None:
            return DependencyStatus(ok=False, detail=self.failure or "The revocation list has not been read yet.")
        age = self._clock.monotonic() - self._updated_at
        if age <= LATE_SECONDS:
            return DependencyStatus(ok=True, required=False)
        refused = "; calls that are not read-only are refused" if age > STALE_SECONDS else ""
        reason = f": {self.failure}" if self.failure else ""
        return DependencyStatus(
            ok=False, detail=f"The revocation list is {age:.0f} s old{refused}{reason}", required=False
        )

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncGenerator[None]:
        """Follow the stream while the context is open."""
        async with self._loop:
            yield

    async def _read(self) -> None:
        # A stream without an end belongs to no call: an unsampled trace keeps its span from being exported.
        set_context(RequestContext(current_context().service, trace=start_trace()))
        call = OutgoingCall(
            CallTarget.of(READ_REVOCATIONS),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, STREAM_SECONDS),
            headers={"Accept": NDJSON},
        )
        await self._client.stream(call, self._consume)

    async def _consume(self, streamed: StreamedResponse) -> None:
        try:
            async for update in iter_ndjson(streamed.chunks, RevocationUpdate, MAX_LINE):
                self._apply(update)
        except ValueError as error:
            raise OctoError(
                f"The orchestrator sent a malformed revocation update: {error}", code="peer_protocol"
            ) from error

    def _apply(self, batch: RevocationUpdate) -> None:
        for each in batch.revocations:
            self.revocations.add(each.kind, each.value, each.at, each.tenant)
        if batch.floor is not None:
            self.revocations.raise_floor(batch.floor)
        now = self._clock.monotonic()
        if now - self._pruned > PRUNE_SECONDS:
            self._pruned = now
            self.revocations.prune(self._clock.now())
        # The first list comes in several batches, and the one marked whole ends it. Later, an empty one is a heartbeat.
        if batch.whole or (self._updated_at is not None and not batch.revocations):
            self._updated_at = now
            self._loop.report_success()


def _revocations_unknown(detail: str) -> OctoError:
    return OctoError(detail, code="revocations_unknown", retry_after=1)
