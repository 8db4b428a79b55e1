"""What is revoked, as a service knows it: told by the orchestrator in a stream for as long as the service runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine

import msgspec

from octollm.capability import Revocations, SelfSigner
from octollm.clock import Clock
from octollm.context import Scene, current_scene, new_trace, set_scene
from octollm.contracts.health import Dependency
from octollm.contracts.revocations import RevocationNews
from octollm.contracts.stream import NDJSON
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.http import Streamed
from octollm.telemetry import Log

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
_TARGET = Target("orchestrator", "revocations", "GET", "/revocations", "read_only")


class Revoked:
    """Follows the orchestrator's revocations into ``known``, which this service's verifiers use."""

    def __init__(self, caller: Caller, signer: SelfSigner, clock: Clock, log: Log) -> None:
        self.known = Revocations()
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._log = log
        self._heard: float | None = None
        self._pruned = clock.monotonic()
        self._failing_since = 0.0
        self._told_log = False
        self.failure = ""

    def check(self, *, safe: bool) -> None:
        """Raise ``revocations_unknown`` when a token may have been revoked without this service having heard of it.

        Before everything was read once, that is so for every call; later, without news for a minute, for those that
        are not ``safe``.
        """
        heard = self._heard
        if heard is None:
            raise _unknown("What is revoked is not known here yet.")
        if not safe and self._clock.monotonic() - heard > STALE_SECONDS:
            raise _unknown("What is revoked has not been heard of for too long, so only what changes nothing is done.")

    async def checkup(self) -> Dependency:
        """Say for ``/ready`` whether news come; not ready before all that is in force was read once."""
        if self._heard is None:
            return Dependency(ok=False, detail=self.failure or "The orchestrator has not told yet what is revoked.")
        age = self._clock.monotonic() - self._heard
        if age <= LATE_SECONDS:
            return Dependency(ok=True, required=False)
        refused = "; what is not safe is refused" if age > STALE_SECONDS else ""
        why = f": {self.failure}" if self.failure else ""
        return Dependency(ok=False, detail=f"Nothing was heard for {age:.0f} s{refused}{why}", required=False)

    @contextlib.asynccontextmanager
    async def following(self, *also: Callable[[], Coroutine[object, object, None]]) -> AsyncGenerator[None]:
        """Follow for as long as the context is open, and do what else has to be heard of for as long."""
        tasks = {asyncio.create_task(work(), name="revocations") for work in (self._follow, *also)}
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = "What follows the revocations has ended; the log says why."
            self._log.error("revocations.crashed", error=error)

    async def _follow(self) -> None:
        # It goes on for ever and belongs to no call: it leaves no trace.
        set_scene(Scene(current_scene().service, trace=new_trace()))
        pause = FIRST_PAUSE
        while True:
            began = self._clock.monotonic()
            try:
                await self._read()
            except OctoError as error:
                self._failed(error)
            if self._heard is not None and self._heard > began:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _failed(self, error: OctoError) -> None:
        """Note why nothing is heard; it is logged when that lasts, since a service stops and starts now and then."""
        now = self._clock.monotonic()
        self._failing_since = self._failing_since or now
        self.failure = error.detail
        if not self._told_log and now - self._failing_since > QUIET_SECONDS:
            self._told_log = True
            self._log.warning("revocations.not_heard", error=error)

    async def _read(self) -> None:
        call = Outgoing(
            _TARGET,
            self._signer.svc_token("orchestrator"),
            Deadline.after(self._clock, STREAM_SECONDS),
            headers={"Accept": NDJSON},
        )
        await self._caller.stream(call, self._consume)

    async def _consume(self, streamed: Streamed) -> None:
        rest = b""
        async for chunk in streamed.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise OctoError("The orchestrator sent a line that is too long.", code="peer_protocol")
            for line in lines:
                try:
                    news = msgspec.json.decode(line, type=RevocationNews)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise OctoError(
                        "The orchestrator sent a line that is no revocation.", code="peer_protocol"
                    ) from error
                self._told(news)

    def _told(self, news: RevocationNews) -> None:
        for each in news.revocations:
            self.known.add(each.kind, each.value, each.at, each.tenant)
        if news.floor is not None:
            self.known.raise_floor(news.floor)
        now = self._clock.monotonic()
        if now - self._pruned > PRUNE_SECONDS:
            self._pruned = now
            self.known.prune(self._clock.now())
        # In the middle of what is in force, nothing is known for certain yet.
        if news.whole or (self._heard is not None and not news.revocations):
            self._heard = now
            self.failure = ""
            self._failing_since = 0.0
            if self._told_log:
                self._told_log = False
                self._log.info("revocations.heard_again")


def _unknown(detail: str) -> OctoError:
    return OctoError(detail, code="revocations_unknown", retry_after=1)
