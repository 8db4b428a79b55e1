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
from octollm.events import TaskWatch
from octollm.live import Policy, Session, parse_resume
from octollm.services.reflex.auth import Door
from octollm.services.reflex.upstream import Upstream, UpstreamTask
from octollm.storage import TextStream
from octollm.telemetry import Metrics

MAX_WATCHERS = 4096
"""Open live connections of one process."""
PATIENCE_SECONDS = 10.0
"""How long one frame may wait for a watcher whose connection takes no more."""
_TASK_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SlowWatcherError(Exception):
    """The watcher's connection takes no more: what it was sent waits, up to the bound, and does not go."""


@dataclass(slots=True)
class Watching:
    """Opens sessions for whoever the door admits."""

    door: Door
    upstream: Upstream
    tokens: TextStream
    hub: TaskWatch
    clock: Clock
    metrics: Metrics
    draining: asyncio.Event
    policy: Policy = field(default_factory=Policy)
    patience: float = PATIENCE_SECONDS
    max_watchers: int = MAX_WATCHERS
    _open: int = 0

    async def session(self, credential: str, connection: HTTPConnection) -> Session:
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
        session = Session(
            task_id,
            UpstreamTask(self.upstream, credential, task_id),
            self.tokens,
            self.clock,
            resume=parse_resume(after, query.getlist("offset")),
            policy=self.policy,
        )
        await session.open()
        return session

    @contextlib.contextmanager
    def counted(self, kind: str) -> Generator[None]:
        """Count a watcher; raises ``overloaded`` past the bound."""
        if self._open >= self.max_watchers:
            raise OctoError("Too many live connections are open here.", code="overloaded", retry_after=5)
        self._open += 1
        self.metrics.watchers.labels(kind).inc()
        try:
            yield
        finally:
            self._open -= 1
            self.metrics.watchers.labels(kind).dec()

    async def hand_over(self, sending: Awaitable[None]) -> None:
        """Wait for one frame to be taken; raises :class:`SlowWatcherError` past the patience.

        Frames are made one at a time, so this one and the connection's own buffer (64 KiB) are all that waits.
        """
        try:
            async with asyncio.timeout(self.patience):
                await sending
        except TimeoutError as error:
            raise SlowWatcherError from error
