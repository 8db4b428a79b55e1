"""The orchestrator's composition root, and the maintenance loops that run while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial

from octollm.capability import PublicKey, RootMinter, ScopeSet, SigningKey, Verifier, run_value
from octollm.capability.enrolment import EnrolmentTokenIssuer
from octollm.capability.keyring import KeyRing, PublicKeyRing, TrustedRoots
from octollm.config import Settings
from octollm.contracts.task import ArmInfo
from octollm.errors import OctoError
from octollm.events import EventLog, OutboxPublisher
from octollm.rpc.auth import CapabilityAuthenticator, ServiceAuthenticator
from octollm.rpc.client import ServiceClient
from octollm.rpc.discovery import RegistryDiscovery
from octollm.rpc.external import ExternalClient, create_external_http_client
from octollm.rpc.health import DependencyStatus, ReadinessCheck
from octollm.rpc.idempotency import ResponseCipher
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.admin_api import AdminApi
from octollm.services.orchestrator.arms_api import ArmsApi
from octollm.services.orchestrator.audit import AuditSealer, record_startup
from octollm.services.orchestrator.enrolment import EnrolmentAuthority, EnrolmentTokens
from octollm.services.orchestrator.events_api import EventsApi
from octollm.services.orchestrator.files import FileStore, file_operations
from octollm.services.orchestrator.instances import InstanceRegistry
from octollm.services.orchestrator.oidc import ISSUER_TIMEOUT, OidcClient, load_client_secret, load_issuers
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.services_api import ServicesApi
from octollm.services.orchestrator.sessions import SessionStore
from octollm.services.orchestrator.submission import BudgetDefaults
from octollm.services.orchestrator.task_endings import AdhocTaskExpiry, TaskCanceller
from octollm.services.orchestrator.tasks_api import TasksApi, TraceClient
from octollm.services.orchestrator.tokens_api import TokensApi
from octollm.storage import Database, RedisClient, RedisKeys, TextStream, Transaction, open_database
from octollm.storage.migrations import database_url, open_service_database
from octollm.tasks.calls import TaskTokenMinter
from octollm.tasks.documents import LoadFile
from octollm.tasks.leases import ExpiredLease, LeaseRenewer, TaskLeases
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerDependencies
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker, cancellation_listener


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
        outbox = await stack.enter_async_context(OutboxPublisher(db, log, redis, base.clock, base.ids, keys=keys))
        revocation_store = RevocationStore(db, base.clock, base.log)
        # Before the first token is verified: what was revoked stays revoked over a restart.
        await revocation_store.load()
        sealer = AuditSealer(db, root_key, base.clock, base.log)
        registry = ServiceRegistry(db, base.clock, service_keys, base.log)
        oidc = await stack.enter_async_context(_open_oidc_client(base, settings))
        accounts = Accounts(db, base.clock, base.ids, registry.admitted_arms, oidc)
        if local_key is not None:
            await accounts.set_local_key(local_key)
        files = FileStore(db, base.clock)
        store = TaskStore(db, log, base.clock)
        ledger = BudgetLedger(db, base.clock, base.ids)
        ring = KeyRing.of(root_key)
        roots = TrustedRoots(ring.trusted_keys(base.clock.now()))
        minter = RootMinter(ring, base.clock, base.ids)

        async def list_arms(tenant: str) -> tuple[ArmInfo, ...]:
            return registry.list_arms(tenant)

        deps = RunnerDependencies(
            store=store,
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
            list_arms=list_arms,
            load_file=_file_loader(files),
            load_texts=files.small_texts,
            store_texts=files.put_texts,
        )
        holder = base.ids.hex()
        connect = partial(open_database, database_url(settings, "orchestrator"), clock=base.clock)

        async def revoke_epoch(tx: Transaction, task: ExpiredLease) -> None:
            # The former holder may still be running: its tokens must not outlive the take-over.
            await revocation_store.add(tx, "run", run_value(task.task_id, task.epoch), task.tenant)

        leases = partial(LeaseRenewer, connect, holder, base.clock)
        worker = Worker(deps, TaskLeases(db, holder, revoke_epoch), leases, service=base.name)
        cancellations = cancellation_listener(redis, keys.cancel, worker.stop, base.log)
        idempotency = SqlIdempotencyStore(db, base.ids.hex())
        verifier = Verifier(base.name, roots, base.clock, revocations=revocation_store.revocations)

        async def announce_cancel(task_id: str) -> None:
            # Only a hint to the other replicas: without it their lease renewals find the cancellation.
            with contextlib.suppress(OctoError):
                await redis.publish([(keys.cancel, task_id.encode())])

        draining = asyncio.Event()
        canceller = TaskCanceller(store, revocation_store, worker, base.clock, base.metrics, announce_cancel)
        tasks_api = TasksApi(
            store=store,
            idempotency=idempotency,
            files=files,
            accounts=accounts,
            registry=registry,
            canceller=canceller,
            worker=worker,
            defaults=BudgetDefaults(settings.max_tokens, settings.max_time_seconds),
            clock=base.clock,
            ids=base.ids,
            traces=TraceClient(base.client, minter, base.clock),
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
        services_api = ServicesApi(ledger, idempotency, revocation_store, roots, base.clock)
        instances = InstanceRegistry(db, log, registry, base.log)
        adhoc_expiry = AdhocTaskExpiry(store, ledger, base.clock, base.metrics).expiry_loop(base.log)
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
                *file_operations(files),
                *EventsApi(db, log, draining).operations(),
                *tokens_api.operations(),
                *services_api.operations(),
                *arms_api.operations(),
                *AdminApi(db, accounts, revocation_store, canceller, idempotency, base.clock).operations(),
            ],
            authenticators={
                "capability": CapabilityAuthenticator(verifier),
                "service": ServiceAuthenticator(base.name, registry.directory, base.clock, registry.refresh_on_miss),
            },
            idempotency=idempotency,
            response_cipher=ResponseCipher(lambda: ring.derive_keys("octollm stored responses v1", base.clock.now())),
            readiness_checks={
                **_build_health_checks(db, redis, outbox, worker, registry),
                "revocations": revocation_store.poll_loop.check_health,
                "audit": sealer.check_health,
                "arms": instances.sweep_loop.check_health,
                "adhoc_tasks": adhoc_expiry.check_health,
                "cancellations": cancellations.check_health,
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
            adhoc_expiry,
            cancellations,
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
        issuer.url: ExternalClient(base.name, issuer.url, clock=base.clock, metrics=base.metrics, log=base.log)
        for issuer in issuers
    }
    async with create_external_http_client(read_timeout=ISSUER_TIMEOUT) as http:
        yield OidcClient(issuers, http, external_clients, base.clock, secrets)


def _allowed_scopes_loader(accounts: Accounts) -> Callable[[TaskRecord], Awaitable[ScopeSet]]:
    async def load_allowed_scopes(task: TaskRecord) -> ScopeSet:
        """Return the scopes that the task was submitted with and its principal still has."""
        return ScopeSet.parse(task.authority).intersection(await accounts.current_scopes(task.cred))

    return load_allowed_scopes


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
        degraded = outbox.health.degraded
        return DependencyStatus(ok=degraded is None, detail=degraded or "", required=False)

    async def check_worker() -> DependencyStatus:
        return DependencyStatus(ok=not worker.failure, detail=worker.failure)

    return {
        "database": check_database,
        "redis": check_redis,
        "relay": check_outbox,
        "worker": check_worker,
        "registry": registry.refresh_loop.check_health,
    }
