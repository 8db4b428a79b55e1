"""The orchestrator's composition root, and the maintenance loops that run while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import lru_cache, partial

from octollm import __version__
from octollm.capability import PublicKey, RootMinter, ScopeSet, SigningKey, Verifier, run_value
from octollm.capability.enrolment import EnrolmentTokenIssuer
from octollm.capability.keyring import KeyRing, PublicKeyRing, TrustedRoots
from octollm.config import Settings
from octollm.contracts.approvals import ApprovalPolicy
from octollm.contracts.task import ArmInfo
from octollm.errors import OctoError
from octollm.events import EventBus, EventLog, LogTail, OutboxPublisher
from octollm.rpc.auth import CapabilityAuthenticator, ServiceAuthenticator
from octollm.rpc.call import Operation
from octollm.rpc.client import ServiceClient
from octollm.rpc.discovery import RegistryDiscovery
from octollm.rpc.egress import EgressClient, EgressPolicy
from octollm.rpc.external import ExternalClient
from octollm.rpc.health import DependencyStatus, ReadinessCheck
from octollm.rpc.idempotency import ResponseCipher
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.rpc.tls import external_context_factory
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.admin_api import AdminApi
from octollm.services.orchestrator.arms_api import ArmsApi
from octollm.services.orchestrator.audit import AuditSealer, record_startup
from octollm.services.orchestrator.enrolment import EnrolmentAuthority, EnrolmentTokens
from octollm.services.orchestrator.events_api import DashboardApi, EventsApi
from octollm.services.orchestrator.files import FileStore, file_operations
from octollm.services.orchestrator.instances import InstanceRegistry
from octollm.services.orchestrator.oidc import MAX_ISSUER_BYTES, OidcClient, load_client_secret, load_issuers
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.retention import MemoryEraser, open_retention
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.schedules import SchedulesApi
from octollm.services.orchestrator.services_api import ServicesApi
from octollm.services.orchestrator.sessions import SessionStore
from octollm.services.orchestrator.steering_api import SteeringApi
from octollm.services.orchestrator.stored_secrets import SecretStore
from octollm.services.orchestrator.submission import QueueBound, TaskDefaults, TaskSubmitter
from octollm.services.orchestrator.subscriptions_api import open_subscriptions
from octollm.services.orchestrator.subtasks import SubTaskAuthenticator, SubTaskGuardrail, SubTasks
from octollm.services.orchestrator.task_endings import ApprovalDecisions, TaskCanceller, TaskExpiry
from octollm.services.orchestrator.tasks_api import TasksApi, TraceClient
from octollm.services.orchestrator.tokens_api import TokensApi
from octollm.services.orchestrator.webhooks_api import open_webhooks
from octollm.storage import Database, RedisClient, RedisKeys, TextStream, Transaction, open_database
from octollm.storage.migrations import database_url, open_service_database
from octollm.tasks.approvals import ApprovalStore
from octollm.tasks.attempts import AttemptReader
from octollm.tasks.calls import TaskTokenMinter
from octollm.tasks.clock_guard import ClockGuard
from octollm.tasks.dashboard import ChangeReader
from octollm.tasks.documents import LoadFile
from octollm.tasks.family import TaskFamily
from octollm.tasks.leases import ExpiredLease, LeaseRenewer, TaskLeases
from octollm.tasks.ledger import BudgetLedger, UsageReader
from octollm.tasks.recording import RecordingReader
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerDependencies
from octollm.tasks.scheduling import SharePolicy
from octollm.tasks.steering import SteeringStore
from octollm.tasks.step import ArmSlots
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker, hint_listener

MAX_OUTBOX_LAG_SECONDS = 5.0
"""``/ready`` says so when events have waited for longer to be published."""


@contextlib.asynccontextmanager
async def orchestrator_service(
    base: ServiceBase,
    settings: Settings,
    *,
    redis: RedisClient,
    root_key: SigningKey | KeyRing,
    service_keys: Mapping[str, PublicKey | PublicKeyRing],
    local_key: str | None,
    redis_keys: RedisKeys | None = None,
) -> AsyncGenerator[Service]:
    """Open the database, the outbox publisher and the worker, and yield the service.

    ``service_keys`` are the public keys of the installation's own services. ``local_key`` is the credential of the
    local user; ``None`` if no loopback peer is trusted.
    """
    keys = redis_keys or RedisKeys()
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(open_service_database(settings, "orchestrator", clock=base.clock))
        log = EventLog(db, base.clock, base.ids)
        outbox, tail = await _enter_outbox(stack, base, db, log, (redis, keys))
        draining = asyncio.Event()
        subscriptions = await stack.enter_async_context(
            open_subscriptions(base, settings, db, log, tail, draining, (redis, keys))
        )
        revocation_store = RevocationStore(db, log, base.clock, base.log)
        # Before the first token is verified: what was revoked stays revoked over a restart.
        await revocation_store.load()
        sealer = AuditSealer(db, log, root_key, base.clock, base.log)
        registry = ServiceRegistry(db, base.clock, service_keys, base.log)
        oidc = await stack.enter_async_context(_open_oidc_client(base, settings))
        accounts = Accounts(db, base.clock, base.ids, registry.admitted_arms, oidc)
        if local_key is not None:
            await accounts.set_local_key(local_key)
        files = FileStore(db, base.clock)
        store = TaskStore(db, log, base.clock)
        approvals = ApprovalStore(db, store, base.clock, default_seconds=settings.approval_seconds)
        ledger = BudgetLedger(db, base.clock, base.ids)
        ring = KeyRing.of(root_key)
        roots = TrustedRoots(ring.trusted_keys(base.clock.now()))
        minter = RootMinter(ring, base.clock, base.ids)

        deps = RunnerDependencies(
            store=store,
            approvals=approvals,
            ledger=ledger,
            stream=TextStream(redis, keys),
            # Enrolled arms are found in the registry itself rather than by a call to this service.
            client=ServiceClient(
                base.name,
                base.http,
                RegistryDiscovery(base.discovery, registry.addresses),
                clock=base.clock,
                ids=base.ids,
                metrics=base.metrics,
                tracer=base.tracer,
            ),
            token_minter=TaskTokenMinter(minter, registry.declarations, registry.thumbprint),
            clock=base.clock,
            log=base.log,
            metrics=base.metrics,
            tracer=base.tracer,
            load_allowed_scopes=_allowed_scopes_loader(accounts),
            list_arms=_arms_lister(registry),
            load_file=_file_loader(files),
            load_texts=files.small_texts,
            store_texts=files.put_texts,
            attempts=AttemptReader(db),
            arm_slots=ArmSlots(settings.max_running_per_arm),
        )
        holder = base.ids.hex()

        async def revoke_epoch(tx: Transaction, task: ExpiredLease) -> None:
            # The former holder may still be running: its tokens must not outlive the take-over.
            await revocation_store.add(tx, "run", run_value(task.task_id, task.epoch), task.tenant)

        worker = Worker(
            deps,
            TaskLeases(
                db,
                holder,
                revoke_epoch,
                shares=SharePolicy(
                    dict(settings.tenant_weights), settings.max_running_per_tenant, settings.max_running_per_key
                ),
            ),
            partial(
                LeaseRenewer,
                partial(open_database, database_url(settings, "orchestrator"), clock=base.clock),
                holder,
                base.clock,
            ),
            service=base.name,
            max_tasks=settings.max_running_tasks,
            announce=lambda: redis.publish([(keys.queue, b"task")]),
            clock_guard=ClockGuard(db),
        )
        hints = hint_listener(redis, keys, worker, base.log)
        idempotency = SqlIdempotencyStore(db, base.ids.hex())

        async def announce_cancel(task_id: str) -> None:
            # Only a hint to the other replicas: without it their lease renewals find the cancellation.
            with contextlib.suppress(OctoError):
                await redis.publish([(keys.cancel, task_id.encode())])

        canceller = TaskCanceller(
            store, revocation_store, worker, base.clock, base.metrics, announce_cancel, TaskFamily(db, store)
        )
        decisions = ApprovalDecisions(approvals, canceller, worker, base.clock, base.metrics)
        submitter = TaskSubmitter(
            store=store,
            files=files,
            registry=registry,
            worker=worker,
            defaults=TaskDefaults(
                settings.max_tokens,
                settings.max_time_seconds,
                ApprovalPolicy(
                    steps=settings.approval_steps,
                    cost_above_usd=settings.approval_cost_usd,
                    expires_seconds=settings.approval_seconds,
                ),
            ),
            clock=base.clock,
            ids=base.ids,
            subtasks=SubTasks(canceller.family, ledger, registry, SubTaskGuardrail(settings.input_guardrail)),
            queue=QueueBound(db, base.clock, settings.max_waiting_tasks, settings.max_waiting_per_tenant),
        )
        tasks_api = TasksApi(
            store=store,
            submitter=submitter,
            idempotency=idempotency,
            files=files,
            accounts=accounts,
            canceller=canceller,
            decisions=decisions,
            clock=base.clock,
            traces=TraceClient(base.client, minter, base.clock),
            attempts=deps.attempts,
            usage=UsageReader(db, base.clock),
            recordings=RecordingReader(db, store, deps.attempts, base.clock, version=__version__, model=settings.model),
        )
        tokens_api = TokensApi(
            db=db,
            accounts=accounts,
            sessions=SessionStore(db, revocation_store, base.clock, base.ids),
            registry=registry,
            revocation_store=revocation_store,
            minter=minter,
            store=store,
            max_tokens=settings.max_tokens,
            clock=base.clock,
            ids=base.ids,
            draining=draining,
            ring=ring,
            roots=roots,
        )
        instances = InstanceRegistry(db, log, registry, base.log)
        task_expiry = TaskExpiry(store, ledger, decisions, base.clock, base.metrics, ClockGuard(db)).expiry_loop(
            base.log
        )
        deliveries = await stack.enter_async_context(
            open_webhooks(base, settings, db, log, accounts, submitter, SecretStore(ring, base.clock))
        )
        schedules_api = SchedulesApi(db, log, accounts, submitter, idempotency, base.clock, base.ids, base.log)
        token_issuer = EnrolmentTokenIssuer(ring)
        arms_api = ArmsApi(
            registry,
            instances,
            EnrolmentTokens(db, token_issuer, base.clock, base.ids),
            EnrolmentAuthority(db, log, token_issuer, roots, registry, revocation_store, base.clock, base.ids),
            idempotency,
        )
        service = build_service(
            base,
            [
                *tasks_api.operations(),
                *SteeringApi(store, SteeringStore(store, base.clock), canceller, idempotency, base.clock).operations(),
                *file_operations(files),
                *_event_operations(base, db, log, EventBus(redis, keys, base.clock, base.ids), tail, draining),
                *DashboardApi(ChangeReader(db, log)).operations(),
                *subscriptions.operations(),
                *tokens_api.operations(),
                *ServicesApi(db, ledger, idempotency, revocation_store, roots, base.clock).operations(),
                *arms_api.operations(),
                *deliveries.operations,
                *schedules_api.operations(),
                *AdminApi(
                    db, accounts, revocation_store, canceller, schedules_api, idempotency, base.clock
                ).operations(),
            ],
            authenticators={
                "capability": SubTaskAuthenticator(
                    CapabilityAuthenticator(
                        Verifier(base.name, roots, base.clock, revocations=revocation_store.revocations)
                    ),
                    submitter.subtasks,
                ),
                "service": ServiceAuthenticator(base.name, registry.directory, base.clock, registry.refresh_on_miss),
            },
            idempotency=idempotency,
            response_cipher=ResponseCipher(lambda: ring.derive_keys("octollm stored responses v1", base.clock.now())),
            readiness_checks={
                **_build_health_checks(db, redis, outbox, worker, registry),
                "revocations": revocation_store.poll_loop.check_health,
                "audit": sealer.check_health,
                "retention": await _enter_retention(stack, base, settings, db, log, minter),
                "arms": instances.sweep_loop.check_health,
                "task_expiry": task_expiry.check_health,
                **deliveries.readiness_checks,
                "schedules": schedules_api.loop.check_health,
                "task_hints": hints.check_health,
                **subscriptions.readiness_checks(),
            },
            draining=draining,
            public_keys=lambda: {**ring.trusted_keys(base.clock.now()), **base.identity.trusted_keys()},
            max_concurrent=128,
            # The worker stops before calls in flight are awaited: it gives its tasks back to other replicas first.
            lifespan=worker.run,
        )

        await record_startup(db, settings, registry.directory(), list(roots), base.clock)
        await registry.refresh()
        await stack.enter_async_context(sealer.run())
        for loop in (
            revocation_store.poll_loop,
            registry.refresh_loop,
            instances.sweep_loop,
            task_expiry,
            *deliveries.loops,
            schedules_api.loop,
            hints,
            submitter.queue.watch(base.metrics, base.log),  # only a metric: /ready need not know of its failures
        ):
            await stack.enter_async_context(loop)
        yield service


@contextlib.asynccontextmanager
async def _open_oidc_client(base: ServiceBase, settings: Settings) -> AsyncGenerator[OidcClient | None]:
    """Open the client for external issuers; yield ``None`` if none is configured."""
    if settings.oidc is None:
        yield None
        return
    issuers = await asyncio.to_thread(load_issuers, settings.oidc)
    loaded = [(issuer.url, await asyncio.to_thread(load_client_secret, issuer)) for issuer in issuers]
    secrets = {url: secret for url, secret in loaded if secret is not None}
    external_clients = {
        issuer.url: ExternalClient(
            base.name,
            issuer.url,
            clock=base.clock,
            metrics=base.metrics,
            log=base.log,
            on_breaker=base.events.record_breaker,
        )
        for issuer in issuers
    }
    # The operator named the issuers, which may be inside; any other endpoint that an issuer names must be public.
    policy = EgressPolicy.of((*settings.egress_origins, *(issuer.url for issuer in issuers)), settings.egress_ports)
    tls = external_context_factory(settings.tls_ca)
    async with EgressClient(policy, tls=tls, max_response=MAX_ISSUER_BYTES) as http:
        yield OidcClient(issuers, http, external_clients, base.clock, secrets)


async def _enter_retention(
    stack: contextlib.AsyncExitStack,
    base: ServiceBase,
    settings: Settings,
    db: Database,
    log: EventLog,
    minter: RootMinter,
) -> ReadinessCheck:
    """Start to delete old rows as the settings say, and return the check of that."""

    def count(kind: str, number: int) -> None:
        base.metrics.retention_deleted.labels(kind).inc(number)

    erase_task = MemoryEraser(base.client, minter, base.clock).erase_task
    retention = open_retention(
        settings, db, log, base.clock, base.ids, erase_task=erase_task, count=count, loop_log=base.log
    )
    await stack.enter_async_context(retention.loop)
    return retention.loop.check_health


async def _enter_outbox(
    stack: contextlib.AsyncExitStack,
    base: ServiceBase,
    db: Database,
    log: EventLog,
    channels: tuple[RedisClient, RedisKeys],
) -> tuple[OutboxPublisher, LogTail]:
    """Start to publish the log, and to follow what this replica or another one publishes."""
    redis, keys = channels
    outbox = OutboxPublisher(db, log, redis, base.clock, base.ids, keys=keys)

    def read_lag() -> tuple[float, float, bool]:
        health = outbox.health
        return health.lag, health.lag_seconds, health.is_leader

    base.metrics.report_outbox(read_lag)
    await stack.enter_async_context(outbox)
    return outbox, await stack.enter_async_context(LogTail(redis, keys, log))


def _event_operations(
    base: ServiceBase, db: Database, log: EventLog, bus: EventBus, tail: LogTail, draining: asyncio.Event
) -> list[Operation]:
    """Return the operations on events; the orchestrator's own events are stored in the same way as those posted."""
    api = EventsApi(db, log, bus, tail, base.clock, draining)
    base.events.deliver = api.record
    return api.operations()


def _allowed_scopes_loader(accounts: Accounts) -> Callable[[TaskRecord], Awaitable[ScopeSet]]:
    async def load_allowed_scopes(task: TaskRecord) -> ScopeSet:
        """Return the scopes that the task was submitted with and its principal still has."""
        return _allowed_scopes(task.authority, await accounts.current_scopes(task.cred))

    return load_allowed_scopes


@lru_cache(maxsize=1024)
def _allowed_scopes(authority: str, current: ScopeSet) -> ScopeSet:
    return ScopeSet.parse(authority).intersection(current)


def _arms_lister(registry: ServiceRegistry) -> Callable[[str], Awaitable[tuple[ArmInfo, ...]]]:
    async def list_arms(tenant: str) -> tuple[ArmInfo, ...]:
        """Return the arms that the planner may use."""
        return registry.list_arms(tenant)

    return list_arms


def _file_loader(files: FileStore) -> LoadFile:
    async def load_file(tenant: str, digest: str) -> bytes:
        """Return the bytes of a file."""
        return (await files.get(tenant, digest))[1]

    return load_file


def _build_health_checks(
    db: Database, redis: RedisClient, outbox: OutboxPublisher, worker: Worker, registry: ServiceRegistry
) -> dict[str, ReadinessCheck]:
    async def check_database() -> DependencyStatus:
        try:
            await db.check()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail)
        return DependencyStatus(ok=True)

    async def check_redis() -> DependencyStatus:
        try:
            # Not required: without Redis, events are polled and texts come from SQL.
            await redis.ping()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail, required=False)
        return DependencyStatus(ok=True, required=False)

    async def check_outbox() -> DependencyStatus:
        health = outbox.health
        detail = health.degraded or ""
        if not detail and health.lag_seconds > MAX_OUTBOX_LAG_SECONDS:
            detail = f"For {health.lag_seconds:.0f} s there have been unpublished events, {health.lag} now."
        return DependencyStatus(ok=not detail, detail=detail, required=False)

    async def check_worker() -> DependencyStatus:
        return DependencyStatus(ok=not worker.failure, detail=worker.failure)

    return {
        "database": check_database,
        "redis": check_redis,
        "relay": check_outbox,
        "worker": check_worker,
        "registry": registry.refresh_loop.check_health,
    }
