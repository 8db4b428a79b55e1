"""The orchestrator's composition root, and the maintenance loops that run while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial

from octollm.capability import PublicKey, RootMinter, ScopeSet, SigningKey, Verifier, run_value
from octollm.capability.enrolment import EnrolmentTokenIssuer
from octollm.capability.keyring import KeyRing, PublicKeyRing, TrustedRoots
from octollm.concurrency import run_in_background
from octollm.config import Settings
from octollm.contracts.media_types import file_kind
from octollm.contracts.operations import DocumentIn
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
from octollm.services.orchestrator.admin_api import AdminApi, AuditApi
from octollm.services.orchestrator.arms_api import ArmsApi
from octollm.services.orchestrator.audit import AuditSealer, record_startup
from octollm.services.orchestrator.enrolment import EnrolmentAuthority, EnrolmentTokens
from octollm.services.orchestrator.events_api import EventsApi
from octollm.services.orchestrator.files import FileStore, file_operations
from octollm.services.orchestrator.instances import InstanceRegistry
from octollm.services.orchestrator.oidc import ISSUER_TIMEOUT, OidcClient, load_client_secret, load_issuers
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore, TaskCanceller
from octollm.services.orchestrator.services_api import ServicesApi
from octollm.services.orchestrator.sessions import SessionStore
from octollm.services.orchestrator.submission import BudgetDefaults
from octollm.services.orchestrator.tasks_api import TasksApi, TraceClient
from octollm.services.orchestrator.tokens_api import TokensApi
from octollm.storage import Database, RedisClient, RedisKeys, TextStream, Transaction, open_database
from octollm.storage.migrations import database_url, open_service_database
from octollm.tasks.calls import TaskTokenMinter
from octollm.tasks.leases import ExpiredLease, LeaseRenewer, TaskLeases
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerDependencies
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker, listen_for_cancellations
from octollm.telemetry import Logger


@dataclass(frozen=True, slots=True)
class MaintenanceLoops:
    """What is kept up to date."""

    registry: ServiceRegistry
    instances: InstanceRegistry
    revocation_store: RevocationStore
    sealer: AuditSealer


@contextlib.asynccontextmanager
async def run_maintenance(
    loops: MaintenanceLoops, cancellation_listener: Coroutine[object, object, None], log: Logger
) -> AsyncGenerator[None]:
    """Keep everything up to date for as long as the context is open. What crashes is logged, and told in ``/ready``."""

    def crashed(name: str) -> Callable[[BaseException], None]:
        return lambda error: log.error(f"{name}.crashed", error=error)

    def arms_crashed(error: BaseException) -> None:
        loops.registry.failure = f"What keeps the registry of arms stopped: {type(error).__name__}."
        log.error("registry.crashed", error=error)

    async with (
        loops.sealer.run(crashed("audit")),
        loops.revocation_store.run(crashed("revocations")),
        loops.registry.run(arms_crashed),
        loops.instances.run(arms_crashed),
        run_in_background("cancel hints", cancellation_listener, crashed("cancel_hints")),
    ):
        yield


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
    """Open the database, the relay and the worker, and yield the service.

    ``service_keys`` are the public keys of the services that belong to this installation; ``local_key`` is the
    credential of the local user, ``None`` where no local peer is trusted.
    """
    keys = redis_keys or RedisKeys()
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(open_service_database(settings, "orchestrator", clock=base.clock))
        log = EventLog(db, base.clock, base.ids)
        relay = await stack.enter_async_context(OutboxPublisher(db, log, redis, base.clock, base.ids, keys=keys))
        revoking = RevocationStore(db, base.clock)
        await revoking.load()
        sealing = AuditSealer(db, root_key, base.clock)
        registry = ServiceRegistry(db, base.clock, service_keys)
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
        tools = RunnerDependencies(
            store=store,
            ledger=ledger,
            stream=TextStream(redis, keys),
            # Nobody has to be asked where arms of one's own are: the registry is here.
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
            list_arms=registry.list_arms,
            load_documents=_documents_loader(files),
        )
        holder = base.ids.hex()
        connect = partial(open_database, database_url(settings, "orchestrator"), clock=base.clock)

        async def taken_over(tx: Transaction, task: ExpiredLease) -> None:
            await revoking.add(tx, "run", run_value(task.task_id, task.epoch), task.tenant)

        leases = partial(LeaseRenewer, connect, holder, base.clock)
        worker = Worker(tools, TaskLeases(db, holder, taken_over), leases, service=base.name)
        idempotency = SqlIdempotencyStore(db, base.ids.hex())
        verifier = Verifier(base.name, roots, base.clock, revocations=revoking.revocations)

        async def announce_cancel(task_id: str) -> None:
            # A hint for other holders; the database has it already.
            with contextlib.suppress(OctoError):
                await redis.publish([(keys.cancel, task_id.encode())])

        draining = asyncio.Event()
        cancelling = TaskCanceller(store, revoking, worker, base.clock, announce_cancel)
        tasks_api = TasksApi(
            store=store,
            idempotency=idempotency,
            files=files,
            accounts=accounts,
            registry=registry,
            canceller=cancelling,
            worker=worker,
            defaults=BudgetDefaults(settings.max_tokens, settings.max_time_seconds),
            clock=base.clock,
            ids=base.ids,
            traces=TraceClient(base.client, minter, base.clock),
        )
        tokens_api = TokensApi(
            db=db,
            accounts=accounts,
            sessions=SessionStore(db, revoking, base.clock, base.ids),
            registry=registry,
            revocation_store=revoking,
            minter=minter,
            store=store,
            max_tokens=settings.max_tokens,
            clock=base.clock,
            ids=base.ids,
            draining=draining,
            ring=ring,
            roots=roots,
        )
        services_api = ServicesApi(ledger, store, idempotency, revoking, roots, base.clock)
        presence = InstanceRegistry(db, log, registry)
        join_root = EnrolmentTokenIssuer(ring)
        arms_api = ArmsApi(
            registry,
            presence,
            EnrolmentTokens(db, join_root, base.clock, base.ids),
            EnrolmentAuthority(db, log, join_root, roots, registry, revoking, base.clock, base.ids),
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
                *AuditApi(db).operations(),
                *AdminApi(db, accounts, revoking, cancelling, base.clock).operations(),
            ],
            authenticators={
                "capability": CapabilityAuthenticator(verifier),
                "service": ServiceAuthenticator(base.name, registry.directory, base.clock, registry.refresh_on_miss),
            },
            idempotency=idempotency,
            response_cipher=ResponseCipher(lambda: ring.derive_keys("octollm stored responses v1", base.clock.now())),
            readiness_checks={
                **_build_health_checks(db, redis, relay, worker, registry),
                "revocations": revoking.check_health,
                "audit": sealing.check_health,
            },
            draining=draining,
            public_keys=lambda: {**ring.trusted_keys(base.clock.now()), **base.identity.trusted_keys()},
            max_concurrent=128,
            # While it is served, and no longer: what is in hand is given back before calls in flight are waited for.
            lifespan=lambda: worker.run(lambda error: base.log.error("worker.crashed", error=error)),
        )

        await record_startup(db, settings, registry.directory(), list(roots), base.clock)
        watched = MaintenanceLoops(registry, presence, revoking, sealing)
        await stack.enter_async_context(
            run_maintenance(watched, listen_for_cancellations(redis, keys.cancel, worker.stop), base.log)
        )
        yield service


@contextlib.asynccontextmanager
async def _open_oidc_client(base: ServiceBase, settings: Settings) -> AsyncGenerator[OidcClient | None]:
    """Open what believes the logins of other issuers; ``None`` where none is configured."""
    if settings.oidc is None:
        yield None
        return
    issuers = await asyncio.to_thread(load_issuers, settings.oidc)
    found = [(issuer.url, await asyncio.to_thread(load_client_secret, issuer)) for issuer in issuers]
    secrets = {url: secret for url, secret in found if secret is not None}
    outside = {
        issuer.url: ExternalClient(base.name, issuer.url, clock=base.clock, metrics=base.metrics, log=base.log)
        for issuer in issuers
    }
    async with create_external_http_client(read_timeout=ISSUER_TIMEOUT) as http:
        yield OidcClient(issuers, http, outside, base.clock, secrets)


def _allowed_scopes_loader(accounts: Accounts):
    async def allowed(task: TaskRecord) -> ScopeSet:
        """Return what the task was given and its principal still has."""
        return ScopeSet.parse(task.authority).intersection(await accounts.current_scopes(task.cred))

    return allowed


def _documents_loader(files: FileStore):
    async def documents(task: TaskRecord) -> list[DocumentIn]:
        """Return the texts among the task's files."""
        found: list[DocumentIn] = []
        for file in task.contract.context.files:
            if file.digest is None:
                continue
            _stored, body = await files.get(task.tenant, file.digest)
            if file_kind(file.name, body[:8192]) == "text":
                found.append(DocumentIn(file.name, body.decode("utf-8", errors="replace"), file.digest))
        return found

    return documents


def _build_health_checks(
    db: Database, redis: RedisClient, relay: OutboxPublisher, worker: Worker, registry: ServiceRegistry
) -> dict[str, ReadinessCheck]:
    async def database() -> DependencyStatus:
        try:
            await db.check()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail)
        return DependencyStatus(ok=True)

    async def redis_up() -> DependencyStatus:
        try:
            await redis.ping()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail, required=False)
        return DependencyStatus(ok=True, required=False)

    async def relaying() -> DependencyStatus:
        degraded = relay.health.degraded
        return DependencyStatus(ok=degraded is None, detail=degraded or "", required=False)

    async def working() -> DependencyStatus:
        return DependencyStatus(ok=not worker.failure, detail=worker.failure)

    async def knowing() -> DependencyStatus:
        return DependencyStatus(ok=not registry.failure, detail=registry.failure, required=False)

    return {"database": database, "redis": redis_up, "relay": relaying, "worker": working, "registry": knowing}
