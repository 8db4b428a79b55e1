"""Webhooks that go out, over HTTP: create, change, rotate, test; their deliveries, dead letters and replay.

:func:`open_webhooks` puts both directions together.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET
from sqlalchemy import and_, delete, func, or_, select, update

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.concurrency import BackgroundLoop
from octollm.config import Settings
from octollm.contracts import webhooks as contract
from octollm.contracts.api import Acknowledgement, decode_cursor, encode_cursor
from octollm.contracts.events import Event
from octollm.contracts.hooks import SecretRotation
from octollm.contracts.webhooks import (
    NewWebhook,
    WebhookDelivery,
    WebhookDeliveryList,
    WebhookDeliveryQuery,
    WebhookList,
    WebhookReplay,
    WebhookReplayResult,
    WebhookRequest,
    WebhookTestResult,
    WebhookView,
    event_selector,
)
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.egress import EgressClient, EgressPolicy
from octollm.rpc.health import ReadinessCheck
from octollm.rpc.service import ServiceBase
from octollm.rpc.tls import external_context_factory
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import actor_from_call, record_audit
from octollm.services.orchestrator.hooks import HooksApi
from octollm.services.orchestrator.stored_secrets import SecretStore, reseal_rows
from octollm.services.orchestrator.submission import TaskSubmitter
from octollm.services.orchestrator.webhook_attempts import WebhookSender
from octollm.services.orchestrator.webhook_dispatch import WebhookDispatcher
from octollm.services.orchestrator.webhook_feed import (
    WebhookFeed,
    WebhookMonitor,
    delivery_row,
    disable_webhook,
    select_events,
    webhook_subject,
)
from octollm.services.orchestrator.webhook_signatures import check_secret, generate_secret
from octollm.storage import Database, DatabaseConnection, Transaction, row_to_dict
from octollm.storage.tables import webhook_deliveries, webhooks
from octollm.telemetry import Logger

MAX_WEBHOOKS = 100
"""Webhooks of one tenant."""
MAX_PENDING = 100_000
"""Deliveries that may wait for one receiver. A webhook with more is disabled, and can be replayed from the log."""
MAX_REPLAYED = 10_000
DELIVERED_SECONDS = 7 * 24 * 3600.0
"""How long deliveries are listed."""
DEAD_SECONDS = 30 * 24 * 3600.0
"""How long dead letters are kept."""
MAINTENANCE_SECONDS = 60.0
TEST_EVENT = "webhook.test"

_d, _w = webhook_deliveries.c, webhooks.c


class WebhooksApi:
    """The operations on webhooks, and their maintenance."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        accounts: Accounts,
        secret_store: SecretStore,
        policy: EgressPolicy,
        sender: WebhookSender,
        wake: Callable[[], None],
        clock: Clock,
        ids: IdGenerator,
        logger: Logger,
    ) -> None:
        """``wake`` is called when deliveries may be due."""
        self._db = db
        self._log = log
        self._accounts = accounts
        self._secrets = secret_store
        self._policy = policy
        self._sender = sender
        self._wake = wake
        self._clock = clock
        self._ids = ids
        self.maintenance_loop = BackgroundLoop(
            "webhook maintenance", self.maintain, interval=MAINTENANCE_SECONDS, restart=True, log=logger
        )

    async def list(self, call: IncomingCall, _body: object) -> WebhookList:
        """Return the tenant's webhooks."""
        query = select(webhooks).where(_w.tenant == call.tenant).order_by(_w.created_at, _w.id).limit(MAX_WEBHOOKS)
        async with self._db.read() as conn:
            views = [await self._view(conn, row_to_dict(row)) for row in await conn.all(query)]
        return WebhookList(tuple(views))

    async def create(self, call: IncomingCall, body: WebhookRequest) -> NewWebhook:
        """Create a webhook for events from now on. The response holds its secret."""
        await self._check(call, body)
        principal, now = call.authority.principal, self._clock.now()
        webhook_id, secret = f"wh-{self._ids.hex()}", generate_secret("standard")
        async with self._db.transaction() as tx:
            owned = select(func.count()).select_from(webhooks).where(_w.tenant == principal.tenant)
            if await tx.scalar(owned) >= MAX_WEBHOOKS:
                raise OctoError(f"A tenant may have {MAX_WEBHOOKS} webhooks.", code="state_conflict")
            row = {
                "id": webhook_id,
                "tenant": principal.tenant,
                "url": body.url,
                "config": msgspec.to_builtins(body) | {"format": body.format},
                "secrets": self._secrets.seal(webhook_id, secret),
                "sub": principal.sub,
                "cred": principal.cred,
                "state": "active" if body.enabled else "disabled",
                "start_seq": (await self._log.read_bounds(tx))[1],
                "paused_until": 0.0,
                "lease_until": 0.0,
                "created_at": now,
                "updated_at": now,
            }
            await tx.execute(tx.insert(webhooks).values(**row))
            detail = {"url": self._policy.parse(body.url).origin, "patterns": list(body.patterns)}
            await record_audit(tx, actor_from_call(call), "webhook.created", webhook_id, now, detail)
        return NewWebhook(await self._read(call, webhook_id), secret)

    async def read(self, call: IncomingCall, _body: object) -> WebhookView:
        """Return one webhook."""
        return await self._read(call, call.path["webhook_id"])

    async def update(self, call: IncomingCall, body: WebhookRequest) -> WebhookView:
        """Change a webhook. One that is enabled again gets the events from then on; replay delivers older ones."""
        await self._check(call, body)
        actor, now = actor_from_call(call), self._clock.now()
        async with self._db.transaction() as tx:
            row = await _lock(tx, call)
            values: dict[str, Any] = {
                "url": body.url,
                "config": msgspec.to_builtins(body) | {"format": body.format},
                "updated_at": now,
                # Whoever changes it answers for it from now on.
                "sub": actor.principal.sub,
                "cred": actor.principal.cred,
                # A new address gets a new chance.
                "failures": 0,
                "failing_since": None,
                "paused_until": 0.0,
            }
            if body.enabled and row["state"] == "disabled":
                values |= {"state": "active", "reason": "", "start_seq": (await self._log.read_bounds(tx))[1]}
            await tx.execute(update(webhooks).where(_w.id == row["id"]).values(**values))
            detail = {"url": self._policy.parse(body.url).origin, "enabled": body.enabled}
            await record_audit(tx, actor, "webhook.changed", row["id"], now, detail)
            if not body.enabled:
                await disable_webhook(tx, self._log, row["id"], "It was disabled.", self._clock, actor=actor)
        self._wake()
        return await self._read(call, row["id"])

    async def delete(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Delete a webhook with its deliveries."""
        async with self._db.transaction() as tx:
            row = await _lock(tx, call)
            await tx.execute(delete(webhooks).where(_w.id == row["id"]))
            await record_audit(tx, actor_from_call(call), "webhook.deleted", row["id"], self._clock.now())
        return Acknowledgement()

    async def rotate(self, call: IncomingCall, body: SecretRotation) -> NewWebhook:
        """Give a webhook a new secret. During the overlap a delivery has the signatures of both."""
        if body.secret is not None:
            check_secret("standard", body.secret)
        secret = body.secret or generate_secret("standard")
        async with self._db.transaction() as tx:
            row = await _lock(tx, call)
            column = self._secrets.rotate(row["id"], row["secrets"], secret, body.overlap_seconds)
            await tx.execute(update(webhooks).where(_w.id == row["id"]).values(secrets=column))
            detail = {"overlap_seconds": body.overlap_seconds}
            await record_audit(tx, actor_from_call(call), "webhook.rotated", row["id"], self._clock.now(), detail)
        return NewWebhook(await self._read(call, row["id"]), secret)

    async def test(self, call: IncomingCall, _body: object) -> WebhookTestResult:
        """Send a test event, once, whether or not the webhook is enabled."""
        async with self._db.read() as conn:
            row = await conn.first(select(webhooks).where(*_is_webhook(call)))
        if row is None:
            raise _webhook_not_found()
        event = Event(
            event_type=TEST_EVENT,
            timestamp=format_rfc3339(self._clock.now()),
            source="orchestrator",
            data={"webhook_id": row["id"]},
            id=self._ids.hex(),
            tenant=row["tenant"],
            subject=webhook_subject(row["id"]),
        )
        began = self._clock.monotonic()
        secrets = self._secrets.open(row["id"], row["secrets"])
        outcome = await self._sender.send(row["url"], secrets, event, row["config"]["format"])
        duration = int((self._clock.monotonic() - began) * 1000)
        return WebhookTestResult(outcome.delivered, outcome.status, outcome.error, duration)

    async def deliveries(self, call: IncomingCall, _body: object) -> WebhookDeliveryList:
        """Return a page of deliveries, the newest first."""
        page: WebhookDeliveryQuery = call.query
        async with self._db.read() as conn:
            webhook_id = await conn.scalar(select(_w.id).where(*_is_webhook(call)))
            if webhook_id is None:
                raise _webhook_not_found()
            query = select(webhook_deliveries).where(_d.webhook_id == webhook_id)
            if page.state is not UNSET:
                query = query.where(_d.state == page.state)
            if page.cursor:
                query = query.where(_d.position < decode_cursor(page.cursor)[0])
            rows = await conn.all(query.order_by(_d.position.desc()).limit(page.limit + 1))
        more = len(rows) > page.limit
        cursor = encode_cursor(rows[page.limit - 1]["position"], "") if more else None
        return WebhookDeliveryList(tuple(_delivery(row_to_dict(row)) for row in rows[: page.limit]), cursor)

    async def replay(self, call: IncomingCall, body: WebhookReplay) -> WebhookReplayResult:
        """Queue deliveries again."""
        now = self._clock.now()
        fresh = {"state": "pending", "attempts": 0, "due_at": now, "first_attempt_at": None, "finished_at": None}
        position = 0
        async with self._db.transaction() as tx:
            row = await _lock(tx, call)
            if row["state"] != "active":
                raise OctoError("The webhook is disabled: enable it before a replay.", code="state_conflict")
            own = _d.webhook_id == row["id"]
            if body.after is not None:
                position = body.after
                queued = 0
                while queued < MAX_REPLAYED:
                    found = await self._log.read(position, 1000, tenant=row["tenant"], connection=tx)
                    if not found:
                        break
                    position = found[-1].seq
                    rows = [delivery_row(row["id"], event, now) for event in select_events(row_to_dict(row), found)]
                    if rows:
                        again = tx.insert(webhook_deliveries).on_conflict_do_update(
                            index_elements=[_d.webhook_id, _d.event_id], set_=fresh
                        )
                        await tx.execute(again, rows)
                    queued += len(rows)
            else:
                chosen = and_(own, _d.event_id.in_(body.event_ids) if body.event_ids else _d.state == "dead")
                queued = (await tx.execute(update(webhook_deliveries).where(chosen).values(**fresh))).rowcount
            detail = {"queued": queued}
            await record_audit(tx, actor_from_call(call), "webhook.replayed", row["id"], now, detail)
        self._wake()
        return WebhookReplayResult(queued, position)

    async def maintain(self) -> None:
        """Drop old deliveries, disable webhooks whose queue is too long, and renew the encryption of secrets."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            old = or_(
                and_(_d.state == "delivered", _d.finished_at < now - DELIVERED_SECONDS),
                and_(_d.state == "dead", _d.finished_at < now - DEAD_SECONDS),
            )
            await tx.execute(delete(webhook_deliveries).where(old))
            counted = select(_d.webhook_id).where(_d.state == "pending").group_by(_d.webhook_id)
            for row in await tx.all(counted.having(func.count() > MAX_PENDING)):
                reason = f"More than {MAX_PENDING} deliveries waited."
                await disable_webhook(tx, self._log, row["webhook_id"], reason, self._clock)
        await reseal_rows(self._db, webhooks, self._secrets)

    async def _check(self, call: IncomingCall, body: WebhookRequest) -> None:
        self._policy.parse(body.url)
        event_selector(body)
        # Otherwise a key without that scope could have the events sent to itself.
        if not (await self._accounts.current_scopes(call.authority.principal.cred)).allows("events:read"):
            raise OctoError("A webhook sends events, so its creator needs events:read.", code="authority_missing")

    async def _read(self, call: IncomingCall, webhook_id: str) -> WebhookView:
        async with self._db.read() as conn:
            row = await conn.first(select(webhooks).where(_w.id == webhook_id, _w.tenant == call.tenant))
            if row is None:
                raise _webhook_not_found()
            return await self._view(conn, row_to_dict(row))

    async def _view(self, conn: DatabaseConnection, row: Mapping[str, Any]) -> WebhookView:
        config = msgspec.convert(row["config"], WebhookRequest)
        counts = select(_d.state, func.count().label("count")).where(
            _d.webhook_id == row["id"], _d.state.in_(("pending", "dead"))
        )
        found = {each["state"]: each["count"] for each in await conn.all(counts.group_by(_d.state))}
        return WebhookView(
            id=row["id"],
            url=row["url"],
            patterns=config.patterns,
            subjects=config.subjects,
            data=config.data,
            format=config.format,
            description=config.description,
            state=row["state"],
            reason=row["reason"],
            created_by=row["sub"],
            created_at=format_rfc3339(row["created_at"]),
            secrets=self._secrets.count(row["secrets"]),
            pending=found.get("pending", 0),
            dead=found.get("dead", 0),
            failing_since=_time(row["failing_since"]),
            last_delivered_at=_time(row["last_delivered_at"]),
        )

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [
            implement(contract.LIST_WEBHOOKS, self.list),
            implement(contract.CREATE_WEBHOOK, self.create),
            implement(contract.READ_WEBHOOK, self.read),
            implement(contract.UPDATE_WEBHOOK, self.update),
            implement(contract.DELETE_WEBHOOK, self.delete),
            implement(contract.ROTATE_WEBHOOK, self.rotate),
            implement(contract.TEST_WEBHOOK, self.test),
            implement(contract.LIST_WEBHOOK_DELIVERIES, self.deliveries),
            implement(contract.REPLAY_WEBHOOK, self.replay),
        ]


async def _lock(tx: Transaction, call: IncomingCall) -> Any:
    row = await tx.first(select(webhooks).where(*_is_webhook(call)).with_for_update())
    if row is None:
        raise _webhook_not_found()
    return row


def _is_webhook(call: IncomingCall) -> tuple[Any, ...]:
    return _w.id == call.path["webhook_id"], _w.tenant == call.tenant


def _webhook_not_found() -> OctoError:
    return OctoError("There is no such webhook.", code="not_found")


def _time(at: float | None) -> str | None:
    return None if at is None else format_rfc3339(at)


def _delivery(row: Mapping[str, Any]) -> WebhookDelivery:
    return WebhookDelivery(
        event_id=row["event_id"],
        event_type=row["event_type"],
        subject=row["subject"],
        state=row["state"],
        attempts=row["attempts"],
        created_at=format_rfc3339(row["created_at"]),
        last_status=row["last_status"],
        last_error=row["last_error"],
        next_at=format_rfc3339(row["due_at"]) if row["state"] == "pending" else None,
        finished_at=_time(row["finished_at"]),
    )


@dataclass(frozen=True, slots=True)
class Webhooks:
    """Webhooks in both directions: what the service serves, runs and reports."""

    operations: Sequence[Operation]
    loops: Sequence[AbstractAsyncContextManager[object]]
    readiness_checks: Mapping[str, ReadinessCheck]


@contextlib.asynccontextmanager
async def open_webhooks(
    base: ServiceBase,
    settings: Settings,
    db: Database,
    log: EventLog,
    accounts: Accounts,
    submitter: TaskSubmitter,
    secret_store: SecretStore,
) -> AsyncGenerator[Webhooks]:
    """Open the client for receivers, and yield webhooks in both directions."""
    clock, ids = base.clock, base.ids
    hooks_api = HooksApi(db, accounts, submitter, secret_store, clock, base.log)
    policy = EgressPolicy.of(settings.egress_origins, settings.egress_ports)
    async with EgressClient(policy, tls=external_context_factory(settings.tls_ca)) as http:
        sender = WebhookSender(http, clock)

        def count_attempt(outcome: str) -> None:
            base.metrics.webhook_attempts.labels(outcome).inc()

        dispatcher = WebhookDispatcher(db, log, accounts, secret_store, sender, clock, ids, base.log, count_attempt)
        monitor = WebhookMonitor(db, log, base.metrics, base.log)
        feed = WebhookFeed(db, log, clock, base.log, dispatcher.wake)
        webhooks_api = WebhooksApi(
            db, log, accounts, secret_store, policy, sender, dispatcher.wake, clock, ids, base.log
        )
        yield Webhooks(
            [*hooks_api.operations(), *webhooks_api.operations()],
            (hooks_api.maintenance_loop, webhooks_api.maintenance_loop, monitor.loop, dispatcher, feed),
            {
                "hooks": hooks_api.maintenance_loop.check_health,
                "webhook_feed": feed.check_health,
                "webhooks": dispatcher.check_health,
                "webhook_queues": monitor.check_health,
            },
        )
