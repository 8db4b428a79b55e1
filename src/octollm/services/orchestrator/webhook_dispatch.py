"""Sending of deliveries to the receivers of webhooks, by the replicas together.

A receiver is served by one replica at a time, which holds a fenced lease on it: so the order of a subject is kept, and
a slow receiver costs the others nothing. After a crash another replica sends again what was not recorded, with the
same ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import exists, select, update

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.group_commit import GroupCommit
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.stored_secrets import SecretStore
from octollm.services.orchestrator.webhook_attempts import (
    LONGEST_PAUSE,
    MAX_RETRY_AFTER,
    AttemptDecision,
    AttemptOutcome,
    ReceiverHealth,
    WebhookSender,
    decide_attempt,
    decide_disabling,
    decide_health,
    probe_pause,
)
from octollm.services.orchestrator.webhook_feed import disable_webhook, webhook_subject
from octollm.storage import Database, Transaction, is_due, is_lease_over, row_to_dict
from octollm.storage.tables import webhook_deliveries, webhooks
from octollm.telemetry import Logger

CLAIM_SECONDS = 1.0
LEASE_SECONDS = 10.0
RENEW_SECONDS = 2.0
USABLE_SECONDS = 7.0
"""How long after a renewal a lease is relied upon; the rest is for clocks and an attempt in flight."""
MAX_RECEIVERS = 64
"""Receivers that one replica serves at a time."""
CONCURRENCY = 16
"""Requests to one receiver at a time."""
BATCH = 256
CHAIN = 16
"""Deliveries of one subject in a batch, so that one subject does not hold up the others."""

_d, _w = webhook_deliveries.c, webhooks.c


@dataclass(slots=True)
class _Receiver:
    """A webhook that this replica serves."""

    webhook_id: str
    epoch: int
    health: ReceiverHealth
    renewed_at: float
    """On the monotonic clock."""
    paused: bool = False
    task: asyncio.Task[None] | None = None
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONCURRENCY))


@dataclass(frozen=True, slots=True)
class _Record:
    """The outcome of one attempt, to be stored."""

    webhook_id: str
    epoch: int
    position: int
    event_id: str
    outcome: AttemptOutcome
    decision: AttemptDecision
    health: ReceiverHealth
    pause: float
    disabled: str
    at: float
    first_attempt_at: float
    recovered: bool


class WebhookDispatcher:
    """Sends the deliveries of all webhooks, within ``async with``."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        accounts: Accounts,
        secret_store: SecretStore,
        sender: WebhookSender,
        clock: Clock,
        ids: IdGenerator,
        logger: Logger,
        count_attempt: Callable[[str], None] = lambda _outcome: None,
    ) -> None:
        """``count_attempt`` is called with the outcome of each attempt: ``delivered``, ``failed`` or ``dead``."""
        self._count_attempt = count_attempt
        self._db = db
        self._log = log
        self._accounts = accounts
        self._secrets = secret_store
        self._sender = sender
        self._clock = clock
        self._logger = logger
        self._holder = ids.hex()
        self._receivers: dict[str, _Receiver] = {}
        self._records: GroupCommit[_Record, None] = GroupCommit(self._store, name="webhook attempts")
        self._claiming = BackgroundLoop("webhooks", self.claim, interval=CLAIM_SECONDS, restart=True, log=logger)
        self._renewing = BackgroundLoop("webhook leases", self._renew, interval=RENEW_SECONDS, restart=True, log=logger)
        self._loops = (self._claiming, self._renewing)
        self.check_health = self._claiming.check_health

    async def __aenter__(self) -> WebhookDispatcher:
        """Start."""
        for loop in self._loops:
            loop.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Stop; what is in flight is sent again by whoever goes on."""
        for loop in self._loops:
            await loop.aclose()
        running = [receiver.task for receiver in self._receivers.values() if receiver.task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._release()

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._claiming.wake()

    # Leases: which receivers this replica serves.

    async def claim(self) -> None:
        """Take over receivers with due deliveries that nobody serves."""
        free = MAX_RECEIVERS - len(self._receivers)
        if free <= 0:
            return
        async with self._db.read() as conn:
            now = await conn.now()
            has_due = exists().where(
                _d.webhook_id == _w.id, _d.state == "pending", is_due(_d.due_at, now, LONGEST_PAUSE)
            )
            unserved = is_lease_over(_w.lease_until, now, LEASE_SECONDS)
            ready = (_w.state == "active", is_due(_w.paused_until, now, MAX_RETRY_AFTER), unserved, has_due)
            rows = await conn.all(select(_w.id).where(*ready).order_by(_w.lease_until, _w.id).limit(free))
        for webhook_id in [row["id"] for row in rows if row["id"] not in self._receivers]:
            began = self._clock.monotonic()
            async with self._db.transaction() as tx:
                now = await tx.now()
                row = await tx.first(
                    update(webhooks)
                    .where(_w.id == webhook_id, is_lease_over(_w.lease_until, now, LEASE_SECONDS), _w.state == "active")
                    .values(holder=self._holder, epoch=_w.epoch + 1, lease_until=now + LEASE_SECONDS)
                    .returning(_w.epoch, _w.failures, _w.failing_since)
                )
            if row is not None:
                health = ReceiverHealth(row["failures"], row["failing_since"])
                receiver = self._receivers[webhook_id] = _Receiver(webhook_id, row["epoch"], health, began)
                receiver.task = asyncio.create_task(self._serve(receiver), name=f"webhook {webhook_id}")

    async def _renew(self) -> None:
        if not self._receivers:
            return
        began = self._clock.monotonic()
        held = dict(self._receivers)
        async with self._db.transaction() as tx:
            mine = select(_w.id).where(_w.id.in_(held), _w.holder == self._holder)
            await tx.all(mine.order_by(_w.id).with_for_update(key_share=True))
            until = await tx.now() + LEASE_SECONDS
            renewed = await tx.all(
                update(webhooks)
                .where(_w.id.in_(held), _w.holder == self._holder)
                .values(lease_until=until)
                .returning(_w.id, _w.epoch)
            )
        for row in renewed:
            if held[row["id"]].epoch == row["epoch"]:
                held[row["id"]].renewed_at = began

    def _has_lease(self, receiver: _Receiver) -> bool:
        return self._clock.monotonic() - receiver.renewed_at < USABLE_SECONDS

    async def _serve(self, receiver: _Receiver) -> None:
        """Send what is due to one receiver, until nothing is, or it fails, or the lease is lost."""
        try:
            while self._has_lease(receiver) and not receiver.paused and await self._serve_batch(receiver):
                pass
        except OctoError as error:
            self._logger.warning("webhook.interrupted", webhook=receiver.webhook_id, error=error)
        except Exception as error:
            self._logger.error("webhook.crashed", webhook=receiver.webhook_id, error=error)
        finally:
            self._receivers.pop(receiver.webhook_id, None)
        await self._release(_w.id == receiver.webhook_id, _w.epoch == receiver.epoch)

    async def _release(self, *which: Any) -> None:
        # Without it a lease expires by itself.
        with contextlib.suppress(OctoError):
            async with self._db.transaction() as tx:
                await tx.execute(update(webhooks).where(_w.holder == self._holder, *which).values(lease_until=0.0))

    async def _serve_batch(self, receiver: _Receiver) -> bool:
        """Send one batch, each subject's events one after the other; return whether there was one."""
        async with self._db.read() as conn:
            webhook = await conn.first(select(webhooks).where(_w.id == receiver.webhook_id, _w.state == "active"))
            if webhook is None or webhook["epoch"] != receiver.epoch:
                return False
            now = await conn.now()
            own = (_d.webhook_id == receiver.webhook_id, _d.state == "pending")
            # A subject whose next event waits for another attempt is left alone, or its order would be lost.
            is_due_now = is_due(_d.due_at, now, LONGEST_PAUSE)
            waiting = select(_d.subject).where(*own, ~is_due_now)
            size = 1 if receiver.health.is_probing else BATCH
            due = select(webhook_deliveries).where(*own, is_due_now, _d.subject.not_in(waiting))
            rows = await conn.all(due.order_by(_d.position).limit(size))
        if not rows or not await self._is_authorized(row_to_dict(webhook)):
            return False
        chains: dict[str, list[Any]] = {}
        for row in rows:
            chain = chains.setdefault(row["subject"], [])
            if len(chain) < CHAIN:
                chain.append(row)
        secrets = self._secrets.open(webhook["id"], webhook["secrets"])
        stored: list[asyncio.Future[None]] = []
        async with asyncio.TaskGroup() as group:
            for chain in chains.values():
                group.create_task(self._send_chain(receiver, row_to_dict(webhook), secrets, chain, stored))
        # Before the next batch is read, which would have the same deliveries again.
        await asyncio.gather(*stored)
        return True

    async def _send_chain(
        self,
        receiver: _Receiver,
        webhook: dict[str, Any],
        secrets: Sequence[str],
        chain: Sequence[Any],
        stored: list[asyncio.Future[None]],
    ) -> None:
        for row in chain:
            async with receiver.slots:
                # Others of this batch may have found out that the receiver is away.
                if receiver.paused or not self._has_lease(receiver):
                    return
                began = self._clock.now()
                event = msgspec.json.decode(row["body"], type=Event)
                outcome = await self._sender.send(webhook["url"], secrets, event, webhook["config"]["format"])
            record = self._decide(receiver, row, outcome, began)
            stored.append(asyncio.shield(self._records.put(record)))
            if not outcome.delivered:
                return

    def _decide(self, receiver: _Receiver, row: Any, outcome: AttemptOutcome, began: float) -> _Record:
        now = self._clock.now()
        first = row["first_attempt_at"] or began
        jitter = random.random()  # noqa: S311  jitter is no secret
        was_probing = receiver.health.is_probing
        health = receiver.health = decide_health(receiver.health, outcome, now)
        disabled = decide_disabling(health, outcome, now)
        pause = 0.0 if outcome.delivered else probe_pause(health, outcome, jitter)
        receiver.paused = receiver.paused or bool(disabled) or pause > 0
        decision = decide_attempt(outcome, attempts=row["attempts"] + 1, first_attempt_at=first, now=now, random=jitter)
        return _Record(
            webhook_id=receiver.webhook_id,
            epoch=receiver.epoch,
            position=row["position"],
            event_id=row["event_id"],
            outcome=outcome,
            decision=decision,
            health=health,
            pause=pause,
            disabled=disabled,
            at=now,
            first_attempt_at=first,
            recovered=was_probing and outcome.delivered,
        )

    async def _is_authorized(self, webhook: dict[str, Any]) -> bool:
        """Return whether the webhook's creator may still read events; disable the webhook otherwise."""
        try:
            if (await self._accounts.current_scopes(webhook["cred"])).allows("events:read"):
                return True
        except OctoError as error:
            if error.code != "authority_missing":
                raise
        async with self._db.transaction() as tx:
            await disable_webhook(tx, self._log, webhook["id"], "Its creator may no longer read events.", self._clock)
        return False

    # Outcomes.

    async def _store(self, records: Sequence[_Record]) -> list[None]:
        """Store the outcomes of attempts in one transaction."""
        async with self._db.transaction() as tx:
            # The webhooks first, as whoever changes or disables one does: another order could deadlock.
            ids = sorted({record.webhook_id for record in records})
            await tx.all(select(_w.id).where(_w.id.in_(ids)).order_by(_w.id).with_for_update(key_share=True))
            delivered: dict[int, list[_Record]] = {}
            for record in records:
                if record.decision.state == "delivered":
                    delivered.setdefault(record.outcome.status, []).append(record)
            for status, same in delivered.items():
                await tx.execute(
                    update(webhook_deliveries)
                    .where(_d.position.in_([record.position for record in same]))
                    .values(
                        state="delivered",
                        attempts=_d.attempts + 1,
                        last_status=status,
                        last_error="",
                        finished_at=same[-1].at,
                    )
                )
            for record in records:
                if record.decision.state != "delivered":
                    await self._store_failure(tx, record)
            # The last record of a receiver has its health after all of them.
            for record in {each.webhook_id: each for each in records}.values():
                values: dict[str, Any] = {
                    "failures": record.health.failures,
                    "failing_since": record.health.failing_since,
                    "paused_until": record.at + record.pause if record.pause else 0.0,
                }
                if record.outcome.delivered:
                    values["last_delivered_at"] = record.at
                mine = (_w.id == record.webhook_id, _w.epoch == record.epoch)
                await tx.execute(update(webhooks).where(*mine).values(**values))
            for record in records:
                if record.recovered:
                    # What waited for a receiver that was away need not wait any longer.
                    waiting = (_d.webhook_id == record.webhook_id, _d.state == "pending", _d.due_at > record.at)
                    await tx.execute(update(webhook_deliveries).where(*waiting).values(due_at=record.at))
                if record.disabled:
                    await disable_webhook(tx, self._log, record.webhook_id, record.disabled, self._clock)
        for record in records:
            state = record.decision.state
            self._count_attempt("failed" if state == "pending" else state)
        return [None] * len(records)

    async def _store_failure(self, tx: Transaction, record: _Record) -> None:
        is_dead = record.decision.state == "dead"
        changed = await tx.execute(
            update(webhook_deliveries)
            .where(_d.position == record.position, _d.state == "pending")
            .values(
                state=record.decision.state,
                attempts=_d.attempts + 1,
                due_at=record.at + record.decision.pause,
                first_attempt_at=record.first_attempt_at,
                last_status=record.outcome.status,
                last_error=record.outcome.error[:500],
                finished_at=record.at if is_dead else None,
            )
        )
        if is_dead and changed.rowcount == 1:
            tenant = await tx.scalar(select(_w.tenant).where(_w.id == record.webhook_id))
            data: dict[str, object] = {"webhook_id": record.webhook_id, "event_id": record.event_id}
            await self._log.append(
                tx,
                "webhook.dead",
                subject=webhook_subject(record.webhook_id),
                tenant=tenant,
                source="orchestrator",
                data=data,
            )
