"""The feed of webhooks: events of the log become deliveries in SQL.

The feed moves its position in the log and adds the deliveries in one transaction, so no event is missed or added twice.
The replicas take turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
from sqlalchemy import func, select, update

from octollm.capability import Principal
from octollm.clock import Clock
from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import Event
from octollm.contracts.observability import DependencyStatus
from octollm.contracts.webhooks import WebhookRequest, event_selector
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import webhook_deliveries, webhook_feed, webhooks
from octollm.telemetry import Logger, Metrics

FEED_BATCH = 500
FEED_SECONDS = 0.5
"""How often a replica looks for events that another one wrote."""
NUMBERING_SECONDS = 0.02
"""How long after a commit in this process its events have their positions, as a rule."""
WATCH_SECONDS = 5.0
"""Interval at which the queues are measured for metrics and ``/ready``."""
LAG_WARNING_SECONDS = 300.0
"""A webhook whose oldest delivery waits for longer shows in ``/ready``."""

_d, _w = webhook_deliveries.c, webhooks.c


class WebhookFeed:
    """Adds the deliveries of all webhooks, within ``async with``; ``on_added`` is called after it added some."""

    def __init__(self, db: Database, log: EventLog, clock: Clock, logger: Logger, on_added: Callable[[], None]) -> None:
        self._db = db
        self._log = log
        self._clock = clock
        self._on_added = on_added
        self._woken = False
        self._is_idle = False  # no webhook was active at the last look
        self._loop = BackgroundLoop("webhook feed", self.feed, interval=FEED_SECONDS, restart=True, log=logger)
        self.check_health = self._loop.check_health
        self._remove_listener: Callable[[], None] | None = None

    async def __aenter__(self) -> WebhookFeed:
        """Start."""
        self._remove_listener = self._log.on_commit(self._on_commit)
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        if self._remove_listener is not None:
            self._remove_listener()
        await self._loop.aclose()

    def _on_commit(self) -> None:
        # Without webhooks a look at each commit would be in vain; the interval finds the first one.
        if self._is_idle:
            return
        self._woken = True
        self._loop.wake()

    async def feed(self) -> int:
        """Turn the next events of the log into deliveries, and return how many events were looked at."""
        woken, self._woken = self._woken, False
        total = 0
        while (count := await self._feed_batch()) == FEED_BATCH:
            total += count
        total += count
        if woken and not total:
            # A commit woke this round before its events had their positions.
            await asyncio.sleep(NUMBERING_SECONDS)
            total = await self._feed_batch()
        return total

    async def _feed_batch(self) -> int:
        (found_start,) = await self._db.fetch("SELECT min(start_seq) AS start FROM webhooks WHERE state = 'active'")
        self._is_idle = found_start["start"] is None
        if self._is_idle:
            return 0
        async with self._db.read() as conn:
            position = await read_feed_position(conn)
            if position is None or position == (await self._log.read_bounds(conn))[1]:
                return 0
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(webhook_feed).values(id=1, position=0).on_conflict_do_nothing())
            # Another replica that feeds right now does this one's work.
            row = await tx.first(select(webhook_feed.c.position).with_for_update(skip_locked=True))
            if row is None:
                return 0
            active = [row_to_dict(each) for each in await tx.all(select(webhooks).where(_w.state == "active"))]
            if not active:
                return 0
            position = max(row["position"], min(each["start_seq"] for each in active))
            position = await self._skip_gap(tx, position, active)
            found = await self._log.read(position, FEED_BATCH, tenant=None, connection=tx)
            if not found:
                return 0
            rows = [
                delivery_row(webhook["id"], event, self._clock.now())
                for webhook in active
                for event in select_events(webhook, found)
                if event.seq > webhook["start_seq"]
            ]
            if rows:
                await tx.execute(tx.insert(webhook_deliveries).on_conflict_do_nothing(), rows)
                tx.after_commit(self._on_added)
            await tx.execute(update(webhook_feed).values(position=found[-1].seq))
        return len(found)

    async def _skip_gap(self, tx: Transaction, position: int, active: Sequence[dict[str, Any]]) -> int:
        """Return the position after which the feed goes on; record what each webhook may have missed."""
        oldest, head = bounds = await self._log.read_bounds(tx)
        if oldest - 1 <= position <= head:
            return position
        start = oldest - 1
        for webhook in active:
            if position > head or webhook["start_seq"] < start:
                # From a log that was longer, so it says nothing about this one.
                webhook["start_seq"] = min(webhook["start_seq"], start)
                reader = webhook_subject(webhook["id"])
                await self._log.record_gap(tx, reader, position, bounds, tenant=webhook["tenant"])
        if position > head:
            await tx.execute(update(webhooks).where(_w.start_seq > start).values(start_seq=start))
        await tx.execute(update(webhook_feed).values(position=start))
        return start


class WebhookMonitor:
    """Measures the queues of all webhooks for ``/metrics`` and ``/ready``, in a loop that the owner starts."""

    def __init__(self, db: Database, log: EventLog, metrics: Metrics, logger: Logger) -> None:
        self._db = db
        self._log = log
        self._metrics = metrics
        self._behind: list[str] = []
        self.loop = BackgroundLoop("webhook queues", self.measure, interval=WATCH_SECONDS, log=logger)

    async def measure(self) -> None:
        """Set the gauges."""
        query = (
            select(_w.id, _w.tenant, _d.state, func.count().label("n"), func.min(_d.created_at).label("oldest"))
            .join_from(webhooks, webhook_deliveries, _d.webhook_id == _w.id)
            .where(_d.state.in_(("pending", "dead")))
            .group_by(_w.id, _w.tenant, _d.state)
        )
        async with self._db.read() as conn:
            rows = await conn.all(query)
            position = await read_feed_position(conn)
            _oldest, head = await self._log.read_bounds(conn)
            now = await conn.now()
        metrics = self._metrics
        for gauge in (metrics.webhook_pending, metrics.webhook_oldest_seconds, metrics.webhook_dead):
            gauge.clear()  # of those that were deleted
        behind: list[str] = []
        for row in rows:
            labels = row["tenant"], row["id"]
            if row["state"] == "dead":
                metrics.webhook_dead.labels(*labels).set(row["n"])
                continue
            age = max(0.0, now - float(row["oldest"]))
            metrics.webhook_pending.labels(*labels).set(row["n"])
            metrics.webhook_oldest_seconds.labels(*labels).set(age)
            if age > LAG_WARNING_SECONDS:
                behind.append(f"{row['id']} of {row['tenant']}: {row['n']} deliveries, {age:.0f} s")
        lag = 0 if position is None else max(0, head - position)
        metrics.webhook_feed_lag.set(lag)
        self._behind = behind

    async def check_health(self) -> DependencyStatus:
        """Return which webhooks are far behind. It is never required."""
        if self.loop.failure:
            return await self.loop.check_health()
        behind = self._behind
        detail = f"{len(behind)} webhooks are behind: {'; '.join(behind[:5])}" if behind else ""
        return DependencyStatus(ok=not behind, detail=detail, required=False)


async def read_feed_position(connection: DatabaseConnection) -> int | None:
    """Return the position after which webhooks need the log; ``None`` without active webhooks."""
    start = await connection.scalar(select(func.min(_w.start_seq)).where(_w.state == "active"))
    if start is None:
        return None
    return max(int(start), int(await connection.scalar(select(webhook_feed.c.position)) or 0))


def webhook_subject(webhook_id: str) -> str:
    """Return the subject of the events about a webhook."""
    return f"webhook/{webhook_id}"


def select_events(webhook: dict[str, Any], found: Sequence[Event]) -> list[Event]:
    """Return the events that a webhook's row selects: those of its tenant that its filters match, none about itself."""
    config = msgspec.convert(webhook["config"], WebhookRequest)
    own = webhook_subject(webhook["id"])
    try:
        selector = event_selector(config)
    except OctoError:
        # A pattern of an earlier version, whose event types are no more. It must not stop the feed of the others.
        return []
    mine = (event for event in found if event.tenant == webhook["tenant"] and event.subject != own)
    return [event for event in mine if selector.matches(event)]


def delivery_row(webhook_id: str, event: Event, now: float) -> dict[str, Any]:
    """Return the row of a delivery that is due now."""
    return {
        "webhook_id": webhook_id,
        "event_id": event.id,
        "event_type": event.event_type,
        "subject": event.subject,
        "body": msgspec.json.encode(event).decode(),
        "state": "pending",
        "attempts": 0,
        "due_at": now,
        "created_at": now,
        "last_status": 0,
        "last_error": "",
    }


async def disable_webhook(
    tx: Transaction, log: EventLog, webhook_id: str, reason: str, clock: Clock, *, actor: Actor | None = None
) -> None:
    """Disable an active webhook; its pending deliveries become dead letters, and the event says why."""
    now = clock.now()
    row = await tx.first(
        update(webhooks)
        .where(_w.id == webhook_id, _w.state == "active")
        .values(state="disabled", reason=reason, updated_at=now, failures=0, failing_since=None, paused_until=0.0)
        .returning(_w.tenant, _w.sub, _w.cred)
    )
    if row is None:
        return
    await tx.execute(
        update(webhook_deliveries)
        .where(_d.webhook_id == webhook_id, _d.state == "pending")
        .values(state="dead", finished_at=now)
    )
    actor = actor or Actor(Principal(row["sub"], row["cred"], row["tenant"]), service="orchestrator")
    await record_audit(tx, actor, "webhook.disabled", webhook_id, now, {"reason": reason})
    data: dict[str, object] = {"webhook_id": webhook_id, "reason": reason}
    await log.append(
        tx,
        "webhook.disabled",
        subject=webhook_subject(webhook_id),
        tenant=row["tenant"],
        source="orchestrator",
        data=data,
    )
