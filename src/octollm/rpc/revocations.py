"""A service's copy of the revocation list: subscribed to the orchestrator's NDJSON stream for as long as the service runs; stale data refuses calls that are not read-only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine

import msgspec

from octollm.capability import Revocations, ServiceTokenSigner
from octollm.clock import Clock
from octollm.context import RequestContext, current_context, set_context, start_trace
from octollm.contracts.auth import RevocationUpdate
from octollm.contracts.observability import DependencyStatus
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.http_client import StreamedResponse
from octollm.telemetry import Logger

STALE_SECONDS = 60.0
"""Without news for so long, what is not safe is refused."""
LATE_SECONDS = 15.0
"""Without news for so long, ``/ready`` says so; there is a line every five seconds even when nothing is new."""
QUIET_SECONDS = 5.0
"""A loss that is over by then is not logged."""
STREAM_SECONDS = 3600.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
MAX_LINE = 1024 * 1024
PRUNE_SECONDS = 600.0
_TARGET = CallTarget("orchestrator", "revocations", "GET", "/revocations", "read_only")


class RevocationSubscriber:
    """Follows the orchestrator's revocations into ``known``, which this service's verifiers use."""

    def __init__(self, client: ServiceClient, signer: ServiceTokenSigner, clock: Clock, log: Logger) -> None:
        self.revocations = Revocations()
        self._client = client
        self._signer = signer
        self._clock = clock
        self._log = log
        self._last_news_at: float | None = None
        self._pruned = clock.monotonic()
        self._failing_since = 0.0
        self._outage_logged = False
        self.failure = ""

    def check(self, *, read_only: bool) -> None:
        """Raise ``revocations_unknown`` when a token may have been revoked without this service having heard of it.

        Before everything was read once, that is so for every call; later, without news for a minute, for those that
        are not ``safe``.
        """
        heard = self._last_news_at
        if heard is None:
            raise _revocations_unknown("What is revoked is not known here yet.")
        if not read_only and self._clock.monotonic() - heard > STALE_SECONDS:
            raise _revocations_unknown(
                "What is revoked has not been heard of for too long, so only what changes nothing is done."
            )

    async def check_readiness(self) -> DependencyStatus:
        """Say for ``/ready`` whether news come; not ready before all that is in force was read once."""
        if self._last_news_at is None:
            return DependencyStatus(
                ok=False, detail=self.failure or "The orchestrator has not told yet what is revoked."
            )
        age = self._clock.monotonic() - self._last_news_at
        if age <= LATE_SECONDS:
            return DependencyStatus(ok=True, required=False)
        refused = "; what is not safe is refused" if age > STALE_SECONDS else ""
        why = f": {self.failure}" if self.failure else ""
        return DependencyStatus(ok=False, detail=f"Nothing was heard for {age:.0f} s{refused}{why}", required=False)

    @contextlib.asynccontextmanager
    async def run(self, *also: Callable[[], Coroutine[object, object, None]]) -> AsyncGenerator[None]:
        """Follow for as long as the context is open, and do what else has to be heard of for as long."""
        tasks = {asyncio.create_task(work(), name="revocations") for work in (self._follow, *also)}
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = "What follows the revocations has ended; the log says why."
            self._log.error("revocations.crashed", error=error)

    async def _follow(self) -> None:
        # It goes on for ever and belongs to no call: it leaves no trace.
        set_context(RequestContext(current_context().service, trace=start_trace()))
        pause = FIRST_PAUSE
        while True:
            began = self._clock.monotonic()
            try:
                await self._read()
            except OctoError as error:
                self._on_failure(error)
            if self._last_news_at is not None and self._last_news_at > began:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _on_failure(self, error: OctoError) -> None:
        """Note why nothing is heard; it is logged when that lasts, since a service stops and starts now and then."""
        now = self._clock.monotonic()
        self._failing_since = self._failing_since or now
        self.failure = error.detail
        if not self._outage_logged and now - self._failing_since > QUIET_SECONDS:
            self._outage_logged = True
            self._log.warning("revocations.not_heard", error=error)

    async def _read(self) -> None:
        call = OutgoingCall(
            _TARGET,
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, STREAM_SECONDS),
            headers={"Accept": NDJSON},
        )
        await self._client.stream(call, self._consume)

    async def _consume(self, streamed: StreamedResponse) -> None:
        rest = b""
        async for chunk in streamed.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise OctoError("The orchestrator sent a line that is too long.", code="peer_protocol")
            for line in lines:
                try:
                    news = msgspec.json.decode(line, type=RevocationUpdate)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise OctoError(
                        "The orchestrator sent a line that is no revocation.", code="peer_protocol"
                    ) from error
                self._apply(news)

    def _apply(self, news: RevocationUpdate) -> None:
        for each in news.revocations:
            self.revocations.add(each.kind, each.value, each.at, each.tenant)
        if news.floor is not None:
            self.revocations.raise_floor(news.floor)
        now = self._clock.monotonic()
        if now - self._pruned > PRUNE_SECONDS:
            self._pruned = now
            self.revocations.prune(self._clock.now())
        # In the middle of what is in force, nothing is known for certain yet.
        if news.whole or (self._last_news_at is not None and not news.revocations):
            self._last_news_at = now
            self.failure = ""
            self._failing_since = 0.0
            if self._outage_logged:
                self._outage_logged = False
                self._log.info("revocations.heard_again")


def _revocations_unknown(detail: str) -> OctoError:
    return OctoError(detail, code="revocations_unknown", retry_after=1)
