"""Putting a service together: its identity, its callers, its application, and serving it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from octollm.capability import PublicKey
from octollm.capability.keyring import TrustedRoots
from octollm.clock import Clock, IdGenerator
from octollm.resilience import EjectionPolicy
from octollm.rpc.application import build_app
from octollm.rpc.call import Operation
from octollm.rpc.caller import ServiceClient
from octollm.rpc.discovery import Discovery
from octollm.rpc.discovery_registry import RegistryDiscovery
from octollm.rpc.exporting import BatchExporter, create_monitor_sender
from octollm.rpc.health import ReadinessCheck, health_operations
from octollm.rpc.hosting import serve_app
from octollm.rpc.http import HttpClient
from octollm.rpc.idempotency import IdempotencyStore
from octollm.rpc.idempotency_remote import RemoteIdempotencyStore
from octollm.rpc.identity import ServiceDirectory, ServiceIdentity
from octollm.rpc.openers import CapabilityAuthenticator, PublicAuthenticator
from octollm.rpc.revoked import RevocationSubscriber
from octollm.rpc.server import Authenticator, ServerContext
from octollm.rpc.wire import PLAINTEXT, TransportConfig
from octollm.telemetry import ExportBuffer, Logger, Metrics, Span, Tracer, get_logger
from octollm.telemetry.spans import DEFAULT_SAMPLE_RATIO


@dataclass(frozen=True, slots=True)
class ServiceBase:
    """What any service is built on. One per service; ``http`` and ``discovery`` may be shared in a process."""

    identity: ServiceIdentity
    http: HttpClient
    discovery: Discovery
    clock: Clock
    ids: IdGenerator
    log: Logger
    metrics: Metrics
    client: ServiceClient
    directory: ServiceDirectory
    tracer: Tracer
    spans: ExportBuffer[Span]
    """Ended spans that are yet to be exported."""
    transport: TransportConfig
    revocations: RevocationSubscriber | None
    """What is revoked, as the orchestrator tells it; ``None`` for a service that is not told."""
    advertised_url: str | None = None

    @property
    def url(self) -> str:
        """Return where others reach this process."""
        return self.advertised_url or self.discovery.instances(self.name)[0]

    @property
    def name(self) -> str:
        """Return the service's name."""
        return self.identity.name

    def remote_idempotency_store(self) -> RemoteIdempotencyStore:
        """Return the store of keys that the orchestrator keeps for this service."""
        return RemoteIdempotencyStore(self.client, self.identity.signer(), self.clock)


def build_base(
    identity: ServiceIdentity,
    http: HttpClient,
    discovery: Discovery,
    *,
    advertised_url: str | None = None,
    trace_sample_ratio: float = DEFAULT_SAMPLE_RATIO,
    transport: TransportConfig = PLAINTEXT,
    follow_revocations: bool = True,
) -> ServiceBase:
    """Return what the service ``identity`` is built on; ``url`` is where others reach this process of it.

    ``wire`` is how it is served; ``http`` has to be a client of it. ``trace_share`` is that of the calls outside tasks
    that leave a trace. Without ``follow_revocations`` nothing that is revoked is known: for the orchestrator, which
    knows by itself, and for tests of what has no orchestrator.
    """
    roots = identity.roots if isinstance(identity.roots, TrustedRoots) else TrustedRoots(identity.roots)
    identity = replace(identity, roots=roots)
    log = get_logger(identity.name)
    metrics = Metrics(identity.name)
    spans = ExportBuffer[Span]()
    tracer = Tracer(identity.name, identity.clock, spans, sample_ratio=trace_sample_ratio)

    def calling(found: Discovery, ejection: EjectionPolicy | None = None) -> ServiceClient:
        return ServiceClient(
            identity.name,
            http,
            found,
            clock=identity.clock,
            ids=identity.ids,
            metrics=metrics,
            tracer=tracer,
            log=log,
            ejection=ejection,
        )

    # The directory is asked of the orchestrator, whose address is set; it knows those of arms of one's own.
    directory = ServiceDirectory(calling(discovery), identity.signer(), roots, identity.clock)
    discovery = RegistryDiscovery(discovery, directory.addresses)
    # What is asked for again and again must not keep others from asking, nor wait for an ejection to end.
    following = calling(discovery, EjectionPolicy(consecutive_failures=sys.maxsize))
    return ServiceBase(
        identity=identity,
        http=http,
        discovery=discovery,
        clock=identity.clock,
        ids=identity.ids,
        log=log,
        metrics=metrics,
        client=calling(discovery),
        directory=directory,
        tracer=tracer,
        spans=spans,
        transport=transport,
        revocations=RevocationSubscriber(following, identity.signer(), identity.clock, log)
        if follow_revocations
        else None,
        advertised_url=advertised_url,
    )


Lifespan = Callable[[], contextlib.AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """A service ready to be served."""

    base: ServiceBase
    context: ServerContext
    app: Starlette
    exporter: BatchExporter[Span]
    lifespan: Lifespan | None = None
    """Open while the service is served, from before :meth:`serve` yields: an arm is registered for so long."""

    @contextlib.asynccontextmanager
    async def serve(self, bound: socket.socket, *, shutdown_grace: float = 2.0) -> AsyncGenerator[None]:
        """Serve on a bound socket; leaving drains: new calls are refused while those in flight end.

        Those get ``drain`` seconds, and are cancelled then.
        """
        revoked = self.base.revocations
        following = (
            contextlib.nullcontext() if revoked is None else revoked.run(self.base.directory.refresh_periodically)
        )
        async with (
            self.exporter.run(),
            following,
            serve_app(self.app, bound, shutdown_grace=shutdown_grace, transport=self.base.transport),
        ):
            self.base.log.info("service.started", address="{}:{}".format(*bound.getsockname()[:2]))
            try:
                async with self.lifespan() if self.lifespan is not None else contextlib.nullcontext():
                    yield
            finally:
                self.context.draining.set()
                self.base.log.info("service.draining")


def build_service(
    base: ServiceBase,
    operations: Sequence[Operation],
    *,
    authenticators: Mapping[str, Authenticator] | None = None,
    idempotency: IdempotencyStore | None = None,
    readiness_checks: Mapping[str, ReadinessCheck] | None = None,
    extra_routes: Sequence[BaseRoute] = (),
    max_concurrent: int = 64,
    lifespan: Lifespan | None = None,
    draining: asyncio.Event | None = None,
    reports_export: bool = True,
    public_keys: Callable[[], Mapping[str, PublicKey]] | None = None,
) -> Service:
    """Return the service of ``operations`` with what every service has besides.

    ``draining`` is set when it shuts down; it is passed in by who has long-lived connections to end then. Without
    ``tells_export`` the export of spans is left out of ``/ready``: for a service whose readiness strangers may ask.
    ``public_keys`` are those that it publishes, where these are not the service's own.
    """
    kit = ServerContext(
        service=base.name,
        clock=base.clock,
        ids=base.ids,
        log=base.log,
        metrics=base.metrics,
        tracer=base.tracer,
        authenticators={
            "public": PublicAuthenticator(),
            "capability": CapabilityAuthenticator(
                base.identity.verifier(None if base.revocations is None else base.revocations.revocations),
                base.revocations,
            ),
            **(authenticators or {}),
        },
        idempotency=idempotency,
        max_concurrent=max_concurrent,
        draining=draining or asyncio.Event(),
    )
    exporter = BatchExporter(
        base.spans,
        create_monitor_sender(base.client, base.identity.signer(), base.clock),
        name="monitor",
        log=base.log,
        metrics=base.metrics,
    )
    watched = {**(readiness_checks or {}), **({"traces": exporter.check_readiness} if reports_export else {})}
    if base.revocations is not None:
        watched["revocations"] = base.revocations.check_readiness
    published = public_keys or base.identity.trusted_keys
    own = health_operations(base.name, base.metrics, operations, published, watched, base.clock)
    return Service(base, kit, build_app(kit, [*own, *operations], extra_routes), exporter, lifespan)
