"""The event sink: copies the whole log, in its order, to a system outside, which `OCTOLLM_EVENT_SINK` names.

One replica at a time does so, under a fenced lease. Its position in the log moves after the sink has acknowledged the
events. After any interruption it goes on after the last event that the sink has, so that nothing is missing, whatever
was acknowledged and lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from sqlalchemy import select, update

from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop, wait_for_event
from octollm.config import Settings
from octollm.contracts.events import Event
from octollm.contracts.observability import DependencyStatus
from octollm.contracts.subscriptions import Lag, SinkView
from octollm.errors import OctoError
from octollm.events import EventLog, LogTail
from octollm.events.subscriptions import age_after
from octollm.resilience import Backoff
from octollm.rpc.service import ServiceBase
from octollm.rpc.tls import external_context
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.services.orchestrator.jetstream import JetStreamSink
from octollm.storage import Database, DatabaseConnection, Transaction, is_lease_over
from octollm.storage.tables import events, relay_state
from octollm.telemetry import Logger, Metrics

BATCH = 500
"""Events after which the position is saved."""
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0
"""How often the log is read when no batch was announced, and how often another replica asks for the lease."""
SINK_BACKOFF = Backoff(0.1, 5.0)
"""Pauses while the sink, or the database, is away."""
WATCH_SECONDS = 5.0
"""Interval at which lag is measured for metrics and ``/ready``."""
LAG_WARNING_SECONDS = 300.0
"""A sink whose oldest event waits for longer shows in ``/ready``."""
READER = "sink"
"""Its name in ``log.gap``, and that of its row."""

_own = relay_state.c.name == READER
Start = Literal["earliest", "latest"]


class SinkConnection(Protocol):
    """An open connection to the system outside. After a failure it is closed, and another one is opened."""

    last_event_id: str | None

    @property
    def is_empty(self) -> bool:
        """Return whether the sink has never had an event."""
        ...

    def check(self) -> None:
        """Raise ``unavailable`` when the connection has failed."""
        ...

    async def publish(self, events: Sequence[Event], on_stored: Callable[[Event, bool], None]) -> None:
        """Store events in order, and call ``on_stored`` in order with those that are stored.

        The flag says whether the sink had the event already. Raises ``unavailable``; what was reported as stored
        before stays so.
        """
        ...


@dataclass(frozen=True, slots=True)
class SinkLease:
    """The right to feed the sink: its fencing token, and the position after which to go on."""

    fence: int
    position: int


class SinkPosition:
    """The lease and the position in SQL."""

    def __init__(self, db: Database, log: EventLog, holder: str, start: Start) -> None:
        self._db = db
        self._log = log
        self._holder = holder
        self._start: Start = start

    async def acquire(self) -> SinkLease | None:
        """Acquire the lease; return ``None`` while another replica holds it."""
        async with self._db.read() as connection:
            row = await connection.first(select(relay_state).where(_own))
            if row is not None and not is_lease_over(row["lease_until"], await connection.now(), LEASE_SECONDS):
                return None
        async with self._db.transaction() as tx:
            # A new sink starts here rather than with its first connection, so `latest` skips no event in between.
            insert = tx.insert(relay_state).values(name=READER, lease_until=0.0, published=await self.first(tx))
            await tx.execute(insert.on_conflict_do_nothing())
            row = await tx.first(select(relay_state).where(_own).with_for_update())
            assert row is not None
            now = await tx.now()
            if not is_lease_over(row["lease_until"], now, LEASE_SECONDS):
                return None
            lease = SinkLease(int(row["fence"]) + 1, int(row["published"]))
            values = {"holder": self._holder, "fence": lease.fence, "lease_until": now + LEASE_SECONDS}
            await tx.execute(update(relay_state).where(_own).values(values))
        return lease

    async def first(self, connection: DatabaseConnection) -> int:
        """Return the position after which a new sink begins."""
        oldest, head = await self._log.read_bounds(connection)
        return head if self._start == "latest" else oldest - 1

    async def resume(self, lease: SinkLease, connection: SinkConnection) -> int:
        """Return the position after which to go on, by what the sink has.

        An acknowledgement may have been lost on its way to us, and what was acknowledged may be lost at the sink, such
        as by a power failure or the restore of a backup. The last event that the sink has is right in all cases.
        """
        async with self._db.read() as snapshot:
            if connection.is_empty and self._start == "earliest":
                return await self.first(snapshot)
            if connection.last_event_id is None:
                return lease.position
            last = await snapshot.scalar(select(events.c.seq).where(events.c.id == connection.last_event_id))
        # Otherwise retention has deleted it, or it is of another installation.
        return lease.position if last is None else int(last)

    async def save(self, fence: int, position: int) -> None:
        """Save the position and renew the lease. Raises ``fence_lost`` when another replica holds it."""
        async with self._db.transaction() as tx:
            await self._save(tx, fence, position)

    async def _save(self, tx: Transaction, fence: int, position: int) -> None:
        values = {"published": position, "lease_until": await tx.now() + LEASE_SECONDS}
        changed = await tx.execute(update(relay_state).where(_own, relay_state.c.fence == fence).values(values))
        if changed.rowcount != 1:
            raise OctoError("Another replica holds the lease of the event sink.", code="fence_lost")

    async def release(self, fence: int, position: int) -> None:
        """Save the position and end the lease at once, if it is still held."""
        async with self._db.transaction() as tx:
            values = {"published": position, "lease_until": 0.0}
            await tx.execute(update(relay_state).where(_own, relay_state.c.fence == fence).values(values))

    async def skip_gap(self, fence: int, position: int) -> int:
        """Return the position of the oldest event - 1, since the log does not go on after ``position``; record that."""
        async with self._db.transaction() as tx:
            oldest, head = bounds = await self._log.read_bounds(tx)
            if oldest - 1 <= position <= head:
                return position
            await self._save(tx, fence, oldest - 1)
            await self._log.record_gap(tx, READER, position, bounds, tenant=SYSTEM_TENANT)
        return oldest - 1


class EventSink:
    """Feeds the sink within ``async with``, while this replica holds the lease, and measures its lag."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        tail: LogTail,
        position: SinkPosition,
        connect: Callable[[], AbstractAsyncContextManager[SinkConnection]],
        clock: Clock,
        logger: Logger,
        metrics: Metrics,
        *,
        name: str,
    ) -> None:
        """``name`` is the sink's for users."""
        self.name = name
        self._db = db
        self._log = log
        self._tail = tail
        self._store = position
        self._connect = connect
        self._clock = clock
        self._logger = logger
        self._metrics = metrics
        self._position = 0
        self._saved_at = 0.0
        self._lag = Lag()
        self._wakeup = asyncio.Event()
        self._remove_listener: Callable[[], None] | None = None
        self._loop = BackgroundLoop("event sink", self._feed, backoff=SINK_BACKOFF, restart=True, log=logger)
        self._watch = BackgroundLoop("event sink lag", self._measure, interval=WATCH_SECONDS, restart=True, log=logger)

    async def __aenter__(self) -> EventSink:
        """Start. The sink need not be up yet."""
        self._remove_listener = self._tail.on_batch(self._wakeup.set)
        self._loop.start()
        self._watch.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, save the position and release the lease, so that another replica goes on at once."""
        if self._remove_listener is not None:
            self._remove_listener()
        for loop in (self._loop, self._watch):
            await loop.aclose()

    async def _feed(self) -> None:
        """Acquire the lease and feed the sink until that fails; or wait while another replica does."""
        lease = await self._store.acquire()
        if lease is None:
            await asyncio.sleep(POLL_SECONDS)
            return
        self._position = lease.position
        try:
            async with self._connect() as connection:
                await self._resume(lease, connection)
                self._loop.report_success()
                while True:
                    await self._feed_batch(lease, connection)
        except OctoError as error:
            if error.code != "fence_lost":
                raise
        finally:
            # Given up also when the sink is away: another replica may reach it. Without it the lease expires.
            with contextlib.suppress(OctoError):
                await self._store.release(lease.fence, self._position)

    async def _resume(self, lease: SinkLease, connection: SinkConnection) -> None:
        self._position = await self._store.resume(lease, connection)
        if self._position != lease.position:
            self._logger.warning("event_sink.resumed", saved=lease.position, after=self._position)
        await self._save(lease)

    async def _feed_batch(self, lease: SinkLease, connection: SinkConnection) -> None:
        self._wakeup.clear()
        if batch := await self._read(lease):
            await connection.publish(batch, self._on_stored)
            await self._save(lease)
            self._loop.report_success()
            return
        connection.check()
        if self._clock.monotonic() - self._saved_at >= RENEW_SECONDS:
            await self._save(lease)
        await wait_for_event(self._wakeup, POLL_SECONDS, clear=False)

    async def _save(self, lease: SinkLease) -> None:
        await self._store.save(lease.fence, self._position)
        self._saved_at = self._clock.monotonic()

    async def _read(self, lease: SinkLease) -> Sequence[Event]:
        """Return the next events: from memory, or from the log when memory does not have them."""
        if page := self._tail.window.after(self._position, BATCH):
            return page
        try:
            return await self._log.read_page(self._position, BATCH, tenant=None, from_oldest=False)
        except OctoError as error:
            if error.code not in ("position_expired", "position_unknown"):
                raise
        self._position = await self._store.skip_gap(lease.fence, self._position)
        return []

    def _on_stored(self, event: Event, duplicate: bool) -> None:
        self._position = event.seq
        self._metrics.sink_events.labels("duplicate" if duplicate else "stored").inc()

    async def read_lag(self) -> Lag:
        """Return how far the sink is behind the log, whichever replica feeds it."""
        async with self._db.read() as connection:
            position = await read_sink_position(connection)
            if position is None:
                position = await self._store.first(connection)
            _oldest, head = await self._log.read_bounds(connection)
            if position >= head:
                return Lag()
            return Lag(head - position, await age_after(connection, position, await connection.now()))

    async def view(self) -> SinkView:
        """Return the sink for users."""
        return SinkView(self.name, await self.read_lag())

    async def _measure(self) -> None:
        lag = self._lag = await self.read_lag()
        self._metrics.sink_lag.set(lag.positions)
        self._metrics.sink_lag_seconds.set(lag.seconds)

    async def check_health(self) -> DependencyStatus:
        """Return what fails, or how far the sink is behind. It is never required."""
        detail = self._loop.failure or self._watch.failure
        if not detail and self._lag.seconds > LAG_WARNING_SECONDS:
            detail = f"The event sink is behind: {self._lag.positions} events, {self._lag.seconds:.0f} s."
        return DependencyStatus(ok=not detail, detail=detail, required=False)


async def read_sink_position(connection: DatabaseConnection) -> int | None:
    """Return the position after which the sink needs the log; ``None`` before its first start."""
    position = await connection.scalar(select(relay_state.c.published).where(_own))
    return None if position is None else int(position)


@contextlib.asynccontextmanager
async def open_event_sink(
    base: ServiceBase, settings: Settings, db: Database, log: EventLog, tail: LogTail
) -> AsyncGenerator[EventSink | None]:
    """Feed the sink of the settings while the context is open; yield ``None`` without one.

    Raises :class:`SettingError` when it cannot be used.
    """
    url = settings.event_sink
    if url is None:
        yield None
        return
    target = JetStreamSink(url, settings.event_sink_credentials, external_context(settings.tls_ca))
    position = SinkPosition(db, log, base.ids.hex(), url.start)
    async with EventSink(
        db,
        log,
        tail,
        position,
        target.connect,
        base.clock,
        base.log,
        base.metrics,
        name=f"nats stream {url.stream}",
    ) as sink:
        yield sink
