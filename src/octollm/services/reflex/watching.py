"""What the two ways of watching a task share: sessions, bounds, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Generator
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.events import TaskWatchHub
from octollm.live import LiveSession, SessionTiming, parse_resume_position
from octollm.services.reflex.auth import CredentialAuthenticator
from octollm.services.reflex.upstream import Upstream, UpstreamTask
from octollm.storage import TextStream
from octollm.telemetry import Metrics

MAX_WATCHERS = 4096
"""Open live connections of one process."""
SEND_TIMEOUT_SECONDS = 10.0
"""How long one frame may wait for a watcher whose connection takes no more."""
_TASK_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SlowConsumerError(Exception):
    """The watcher's connection takes no more: what it was sent waits, up to the bound, and does not go."""


@dataclass(slots=True)
class LiveConnections:
    """Opens sessions for whoever the door admits."""

    authenticator: CredentialAuthenticator
    upstream: Upstream
    text_stream: TextStream
    hub: TaskWatchHub
    clock: Clock
    metrics: Metrics
    draining: asyncio.Event
    timing: SessionTiming = field(default_factory=SessionTiming)
    send_timeout: float = SEND_TIMEOUT_SECONDS
    max_watchers: int = MAX_WATCHERS
    _open: int = 0

    async def open_session(self, credential: str, connection: HTTPConnection) -> LiveSession:
        """Return an open session on the task that ``connection`` names, from where it says it goes on.

        Raises ``task_not_found``, ``scope_missing``, ``invalid_parameter``, ``draining``.
        """
        task_id = str(connection.path_params["task_id"])
        if not _TASK_ID.fullmatch(task_id):
            raise OctoError("There is no such task.", code="task_not_found")
        if self.draining.is_set():
            raise OctoError("The service is shutting down.", code="draining", retry_after=1)
        query = connection.query_params
        afters = query.getlist("after")
        if len(afters) > 1:
            raise OctoError("`after` may be given once.", code="invalid_parameter")
        # A browser's EventSource connects again with this header and the address it was first given.
        after = connection.headers.get("last-event-id") or (afters[0] if afters else None)
        session = LiveSession(
            task_id,
            UpstreamTask(self.upstream, credential, task_id),
            self.text_stream,
            self.clock,
            position=parse_resume_position(after, query.getlist("offset")),
            timing=self.timing,
        )
        await session.open()
        return session

    @contextlib.contextmanager
    def count_connection(self, kind: str) -> Generator[None]:
        """Count a watcher; raises ``overloaded`` past the bound."""
        if self._open >= self.max_watchers:
            raise OctoError("Too many live connections are open here.", code="overloaded", retry_after=5)
        self._open += 1
        self.metrics.live_connections.labels(kind).inc()
        try:
            yield
        finally:
            self._open -= 1
            self.metrics.live_connections.labels(kind).dec()

    async def send_within_timeout(self, sending: Awaitable[None]) -> None:
        """Wait for one frame to be taken; raises :class:`SlowConsumerError` past the patience.

        Frames are made one at a time, so this one and the connection's own buffer (64 KiB) are all that waits.
        """
        try:
            async with asyncio.timeout(self.send_timeout):
                await sending
        except TimeoutError as error:
            raise SlowConsumerError from error
