"""The composition root of the orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from functools import partial

from octollm.capability import PublicKey, RootMinter, ScopeSet, SigningKey, Verifier, run_value
from octollm.capability.joining import JoinRoot
from octollm.capability.keyring import KeyRing, PublicRing, Roots
from octollm.config import Settings
from octollm.contracts.kinds import file_kind
from octollm.contracts.operations import DocumentIn
from octollm.errors import OctoError
from octollm.events import EventLog, Relay
from octollm.rpc.caller import Caller
from octollm.rpc.discovery_registry import RegistryDiscovery
from octollm.rpc.health import CheckUp, Dependency
from octollm.rpc.idempotency_sql import SqlIdempotency
from octollm.rpc.openers import CapabilityOpener, ServiceOpener
from octollm.rpc.outside import Outside, outside_http
from octollm.rpc.service import Base, Service, build_service
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.admin_api import AdminApi
from octollm.services.orchestrator.arms_api import ArmsApi
from octollm.services.orchestrator.audit_api import AuditApi
from octollm.services.orchestrator.cancelling import Cancelling
from octollm.services.orchestrator.events_api import EventsApi
from octollm.services.orchestrator.files import FileStore, file_operations
from octollm.services.orchestrator.intake import Defaults
from octollm.services.orchestrator.issuers import read_issuers, read_secret
from octollm.services.orchestrator.joining import Joining
from octollm.services.orchestrator.joins import Joins
from octollm.services.orchestrator.oidc import ASK_SECONDS, Oidc
from octollm.services.orchestrator.presence import Presence
from octollm.services.orchestrator.registry import Registry
from octollm.services.orchestrator.revoking import Revoking
from octollm.services.orchestrator.sealing import Sealing
from octollm.services.orchestrator.services_api import ServicesApi
from octollm.services.orchestrator.sessions import Sessions
from octollm.services.orchestrator.started import record_start
from octollm.services.orchestrator.tasks_api import TasksApi
from octollm.services.orchestrator.tokens_api import TokensApi
from octollm.services.orchestrator.traces import Traces
from octollm.services.orchestrator.upkeep import Watched, upkeep
from octollm.storage import Database, Keys, RedisClient, TextStream, Transaction, open_database
from octollm.storage.migrations import database_url, service_database
from octollm.tasks.authority import TaskAuthority
from octollm.tasks.cancelling import hear_cancels
from octollm.tasks.claims import Claims, TakenOver
from octollm.tasks.leases import Leases
from octollm.tasks.ledger import Ledger
from octollm.tasks.records import TaskRecord
from octollm.tasks.runner import RunnerTools
from octollm.tasks.store import TaskStore
from octollm.tasks.worker import Worker


@contextlib.asynccontextmanager
async def orchestrator_service(
    base: Base,
    settings: Settings,
    *,
    redis: RedisClient,
    root_key: SigningKey | KeyRing,
    service_keys: Mapping[str, PublicKey | PublicRing],
    local_key: str | None,
    redis_keys: Keys | None = None,
) -> AsyncGenerator[Service]:
    """Open the database, the relay and the worker, and yield the service.

    ``service_keys`` are the public keys of the services that belong to this installation; ``local_key`` is the
    credential of the local user, ``None`` where no local peer is trusted.
    """
    keys = redis_keys or Keys()
    async with contextlib.AsyncExitStack() as stack:
        db = await stack.enter_async_context(service_database(settings, "orchestrator", clock=base.clock))
        log = EventLog(db, base.clock, base.ids)
        relay = await stack.enter_async_context(Relay(db, log, redis, base.clock, base.ids, keys=keys))
        revoking = Revoking(db, base.clock)
        await revoking.load()
        sealing = Sealing(db, root_key, base.clock)
        registry = Registry(db, base.clock, service_keys)
        oidc = await stack.enter_async_context(_oidc(base, settings))
        accounts = Accounts(db, base.clock, base.ids, registry.admitted, oidc)
        if local_key is not None:
            await accounts.set_local(local_key)
        files = FileStore(db, base.clock)
        store = TaskStore(db, log, base.clock)
        ledger = Ledger(db, base.clock, base.ids)
        ring = KeyRing.of(root_key)
        roots = Roots(ring.believed(base.clock.now()))
        minter = RootMinter(ring, base.clock, base.ids)
        tools = RunnerTools(
            store=store,
            ledger=ledger,
            stream=TextStream(redis, keys),
            # Nobody has to be asked where arms of one's own are: the registry is here.
            caller=Caller(
                base.name,
                base.http,
                RegistryDiscovery(base.discovery, registry.addresses),
                clock=base.clock,
                ids=base.ids,
                metrics=base.metrics,
                tracer=base.tracer,
            ),
            authority=TaskAuthority(minter, registry.declarations, registry.thumbprint),
            clock=base.clock,
            log=base.log,
            metrics=base.metrics,
            tracer=base.tracer,
            allowed=_allowed(accounts),
            arms=registry.arms,
            documents=_documents(files),
        )
        holder = base.ids.hex()
        connect = partial(open_database, database_url(settings, "orchestrator"), clock=base.clock)

        async def taken_over(tx: Transaction, task: TakenOver) -> None:
            await revoking.add(tx, "run", run_value(task.task_id, task.run), task.tenant)

        leases = partial(Leases, connect, holder, base.clock)
        worker = Worker(tools, Claims(db, holder, taken_over), leases, service=base.name)
        idempotency = SqlIdempotency(db, base.ids.hex())
        verifier = Verifier(base.name, roots, base.clock, revocations=revoking.known)

        async def announce_cancel(task_id: str) -> None:
            # A hint for other holders; the database has it already.
            with contextlib.suppress(OctoError):
                await redis.publish([(keys.cancel, task_id.encode())])

        draining = asyncio.Event()
        cancelling = Cancelling(store, revoking, worker, base.clock, announce_cancel)
        tasks_api = TasksApi(
            store=store,
            idempotency=idempotency,
            files=files,
            accounts=accounts,
            registry=registry,
            cancelling=cancelling,
            worker=worker,
            defaults=Defaults(settings.max_tokens, settings.max_time_seconds),
            clock=base.clock,
            ids=base.ids,
            traces=Traces(base.caller, minter, base.clock),
        )
        tokens_api = TokensApi(
            db=db,
            accounts=accounts,
            sessions=Sessions(db, revoking, base.clock, base.ids),
            registry=registry,
            revoking=revoking,
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
        presence = Presence(db, log, registry)
        join_root = JoinRoot(ring)
        arms_api = ArmsApi(
            registry,
            presence,
            Joins(db, join_root, base.clock, base.ids),
            Joining(db, log, join_root, roots, registry, revoking, base.clock, base.ids),
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
            openers={
                "capability": CapabilityOpener(verifier),
                "service": ServiceOpener(base.name, registry.directory, base.clock, registry.hurry),
            },
            idempotency=idempotency,
            checkups={
                **_checkups(db, redis, relay, worker, registry),
                "revocations": revoking.checkup,
                "audit": sealing.checkup,
            },
            draining=draining,
            public_keys=lambda: {**ring.believed(base.clock.now()), **base.identity.public_keys()},
            max_concurrent=128,
            # While it is served, and no longer: what is in hand is given back before calls in flight are waited for.
            presence=lambda: worker.running(lambda error: base.log.error("worker.crashed", error=error)),
        )

        await record_start(db, settings, registry.directory(), list(roots), base.clock)
        watched = Watched(registry, presence, revoking, sealing)
        await stack.enter_async_context(upkeep(watched, hear_cancels(redis, keys.cancel, worker.stop), base.log))
        yield service


@contextlib.asynccontextmanager
async def _oidc(base: Base, settings: Settings) -> AsyncGenerator[Oidc | None]:
    """Open what believes the logins of other issuers; ``None`` where none is configured."""
    if settings.oidc is None:
        yield None
        return
    issuers = await asyncio.to_thread(read_issuers, settings.oidc)
    found = [(issuer.url, await asyncio.to_thread(read_secret, issuer)) for issuer in issuers]
    secrets = {url: secret for url, secret in found if secret is not None}
    outside = {
        issuer.url: Outside(base.name, issuer.url, clock=base.clock, metrics=base.metrics, log=base.log)
        for issuer in issuers
    }
    async with outside_http(idle=ASK_SECONDS) as http:
        yield Oidc(issuers, http, outside, base.clock, secrets)


def _allowed(accounts: Accounts):
    async def allowed(task: TaskRecord) -> ScopeSet:
        """Return what the task was given and its principal still has."""
        return ScopeSet.parse(task.authority).intersection(await accounts.scopes_now(task.cred))

    return allowed


def _documents(files: FileStore):
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


def _checkups(db: Database, redis: RedisClient, relay: Relay, worker: Worker, registry: Registry) -> dict[str, CheckUp]:
    async def database() -> Dependency:
        try:
            await db.check()
        except OctoError as error:
            return Dependency(ok=False, detail=error.detail)
        return Dependency(ok=True)

    async def redis_up() -> Dependency:
        try:
            await redis.ping()
        except OctoError as error:
            return Dependency(ok=False, detail=error.detail, required=False)
        return Dependency(ok=True, required=False)

    async def relaying() -> Dependency:
        degraded = relay.health.degraded
        return Dependency(ok=degraded is None, detail=degraded or "", required=False)

    async def working() -> Dependency:
        return Dependency(ok=not worker.failure, detail=worker.failure)

    async def knowing() -> Dependency:
        return Dependency(ok=not registry.failure, detail=registry.failure, required=False)

    return {"database": database, "redis": redis_up, "relay": relaying, "worker": working, "registry": knowing}
