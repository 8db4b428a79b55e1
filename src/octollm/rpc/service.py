"""The composition root of a service: identity, clients, telemetry, and its operations as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from octollm import __version__
from octollm.capability import PublicKey
from octollm.capability.keyring import TrustedRoots
from octollm.clock import Clock, IdGenerator
from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter
from octollm.resilience import EjectionPolicy, RetryPolicy
from octollm.rpc.asgi_extension import EXTENSION, SendOnlyExtension, take_extension
from octollm.rpc.auth import CapabilityAuthenticator, PublicAuthenticator
from octollm.rpc.call import Operation
from octollm.rpc.client import ServiceClient
from octollm.rpc.codec import id_or_new
from octollm.rpc.discovery import Discovery, RegistryDiscovery
from octollm.rpc.event_sender import EventSender, create_orchestrator_delivery
from octollm.rpc.exporter import BatchExporter, create_monitor_sender
from octollm.rpc.health import DependencyWatch, ReadinessCheck, health_operations
from octollm.rpc.http_client import HttpClient
from octollm.rpc.idempotency import IdempotencyStore, IdempotentHandler, ResponseCipher
from octollm.rpc.idempotency_remote import RemoteIdempotencyStore
from octollm.rpc.identity import ServiceDirectory, ServiceIdentity
from octollm.rpc.problems import problem_response
from octollm.rpc.revocations import RevocationSubscriber
from octollm.rpc.server import DEFAULT_CONCURRENCY, MAX_CONCURRENT, Authenticator, OperationEndpoint, ServerContext
from octollm.rpc.transport import PLAINTEXT, TransportConfig, serve_app
from octollm.telemetry import ExportBuffer, Logger, Metrics, Span, Tracer, get_logger
from octollm.telemetry.spans import DEFAULT_SAMPLE_RATIO


@dataclass(frozen=True, slots=True)
class ServiceBase:
    """What every service is built on. One per service; services of one process may share ``http`` and ``discovery``."""

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
    """Ended spans that wait for export."""
    transport: TransportConfig
    revocations: RevocationSubscriber | None
    """The revocations that the orchestrator publishes; ``None`` for a service that does not follow them."""
    events: EventSender
    """The service's own events."""
    advertised_url: str | None = None

    @property
    def url(self) -> str:
        """Return the base URL at which others reach this process."""
        return self.advertised_url or self.discovery.instances(self.name)[0]

    @property
    def name(self) -> str:
        """Return the service's name."""
        return self.identity.name

    def remote_idempotency_store(self) -> RemoteIdempotencyStore:
        """Return the idempotency store that the orchestrator keeps for this service."""
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
    """Return the base of the service ``identity``; others reach this process at ``advertised_url``.

    ``transport`` is how it is served, and ``http`` has to be a client of it. ``trace_sample_ratio`` applies to calls
    outside tasks. Without ``follow_revocations`` no revocation is known and no event is sent: for the orchestrator,
    which has both in its database, and for tests without an orchestrator.
    """
    roots = identity.roots if isinstance(identity.roots, TrustedRoots) else TrustedRoots(identity.roots)
    identity = replace(identity, roots=roots)
    log = get_logger(identity.name)
    metrics = Metrics(identity.name)
    spans = ExportBuffer[Span]()
    tracer = Tracer(identity.name, identity.clock, spans, sample_ratio=trace_sample_ratio)

    events = EventSender(identity.name, identity.clock, identity.ids, log=log, metrics=metrics)

    def create_client(
        instances: Discovery, ejection: EjectionPolicy | None = None, retry: RetryPolicy | None = None
    ) -> ServiceClient:
        return ServiceClient(
            identity.name,
            http,
            instances,
            clock=identity.clock,
            ids=identity.ids,
            metrics=metrics,
            tracer=tracer,
            log=log,
            retry=retry,
            ejection=ejection,
            on_breaker=events.record_breaker,
        )

    # The directory comes from the orchestrator, whose address is a setting; it has the addresses of registered arms.
    directory = ServiceDirectory(create_client(discovery), identity.signer(), roots, identity.clock)
    discovery = RegistryDiscovery(discovery, directory.addresses)
    # A poll that fails again and again must not eject an instance for other calls, nor wait for an ejection to end.
    never_eject = EjectionPolicy(consecutive_failures=sys.maxsize)
    polling = create_client(discovery, never_eject)
    if follow_revocations:
        # Not retried by the client: a service that stops must not wait for further attempts.
        posting = create_client(discovery, never_eject, RetryPolicy(max_attempts=1))
        events.deliver = create_orchestrator_delivery(posting, identity.signer(), identity.clock)
    return ServiceBase(
        identity=identity,
        http=http,
        discovery=discovery,
        clock=identity.clock,
        ids=identity.ids,
        log=log,
        metrics=metrics,
        client=create_client(discovery),
        directory=directory,
        tracer=tracer,
        spans=spans,
        transport=transport,
        revocations=RevocationSubscriber(polling, identity.signer(), identity.clock, log)
        if follow_revocations
        else None,
        events=events,
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
    watch: DependencyWatch
    lifespan: Lifespan | None = None
    """Entered while the service is served, before :meth:`serve` yields: an arm is registered meanwhile."""
    operations: tuple[Operation, ...] = ()
    """Its own operations, without those that every service has."""

    @contextlib.asynccontextmanager
    async def serve(self, bound: socket.socket, *, shutdown_grace: float = 2.0) -> AsyncGenerator[None]:
        """Serve on a bound socket; leaving drains: new calls are refused while calls in flight end.

        They get ``shutdown_grace`` seconds, and are cancelled then.
        """
        subscriber = self.base.revocations
        async with (
            # Entered first, so left last: the spans of calls that end during the drain are exported too.
            self.exporter.run(),
            # Before the server: no call is served by a process that does not follow the revocations.
            contextlib.nullcontext() if subscriber is None else subscriber.run(),
            contextlib.nullcontext() if subscriber is None else self.base.directory.refresh_loop(),
            self.base.events.run(),
            self._announce_drained(),
            self.watch.loop,
            serve_app(self.app, bound, shutdown_grace=shutdown_grace, transport=self.base.transport),
        ):
            self.base.log.info("service.started", address="{}:{}".format(*bound.getsockname()[:2]))
            try:
                # It ends before the drain begins: an arm leaves the registry first, so callers turn to other instances.
                async with self.lifespan() if self.lifespan is not None else contextlib.nullcontext():
                    self.base.events.emit_lifecycle("system.started", release=__version__)
                    yield
            finally:
                self.context.draining.set()
                self.base.log.info("service.draining")

    @contextlib.asynccontextmanager
    async def _announce_drained(self) -> AsyncGenerator[None]:
        yield
        # Not after an error: then calls in flight were cut off.
        self.base.events.emit_lifecycle("system.drained")


def build_service(
    base: ServiceBase,
    operations: Sequence[Operation],
    *,
    authenticators: Mapping[str, Authenticator] | None = None,
    idempotency: IdempotencyStore | None = None,
    response_cipher: ResponseCipher | None = None,
    readiness_checks: Mapping[str, ReadinessCheck] | None = None,
    extra_routes: Sequence[BaseRoute] = (),
    max_concurrent: int = MAX_CONCURRENT,
    lifespan: Lifespan | None = None,
    draining: asyncio.Event | None = None,
    reports_export: bool = True,
    public_keys: Callable[[], Mapping[str, PublicKey]] | None = None,
) -> Service:
    """Return the service of ``operations`` and of those that every service has.

    ``draining`` is set when it shuts down; pass it in to end long-lived connections then. Without ``reports_export``
    the export of spans is left out of ``/ready``: for a service whose readiness strangers may read. ``public_keys``
    are published in place of the keys that the service trusts.
    """
    context = ServerContext(
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
        response_cipher=response_cipher,
        concurrency=replace(DEFAULT_CONCURRENCY, max_concurrent=max_concurrent),
        draining=draining or asyncio.Event(),
    )
    exporter = BatchExporter(
        base.spans,
        create_monitor_sender(base.client, base.identity.signer(), base.clock),
        name="monitor",
        log=base.log,
        metrics=base.metrics,
    )
    checks = {**(readiness_checks or {}), **({"traces": exporter.check_readiness} if reports_export else {})}
    if base.revocations is not None:
        checks["revocations"] = base.revocations.check_readiness
    published = public_keys or base.identity.trusted_keys

    def report_degraded(dependency: str, reason: str) -> None:
        base.events.emit_lifecycle("system.degraded", dependency=dependency, reason=reason)

    watch = DependencyWatch(checks, base.clock, report_degraded, base.log)
    own = health_operations(base.name, base.metrics, operations, published, watch)
    app = build_app(context, [*own, *operations], extra_routes)
    return Service(base, context, app, exporter, watch, lifespan, tuple(operations))


def build_app(
    context: ServerContext, operations: Sequence[Operation], extra_routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """Return the ASGI application of a service: its operations, and ``extra_routes`` (pages, WebSockets).

    Raises ``ValueError`` for two operations with one name or with one method and path.
    """
    limiter = ConcurrencyLimiter("The service", context.concurrency, on_queued=context.metrics.queue_observer("calls"))
    idempotent = None if context.idempotency is None else IdempotentHandler(context.idempotency)
    routes: list[BaseRoute] = []
    by_path: dict[str, dict[str, OperationEndpoint]] = {}
    names: set[str] = set()
    for operation in operations:
        if operation.secret_response and idempotent is not None and context.response_cipher is None:
            raise ValueError(f"{operation.name} responds with a secret, and nothing would encrypt it in the store.")
        methods = by_path.setdefault(operation.path, {})
        if operation.method in methods or operation.name in names:
            raise ValueError(f"{operation.name} ({operation.method} {operation.path}) is declared twice.")
        names.add(operation.name)
        methods[operation.method] = OperationEndpoint(context, operation, limiter, idempotent)
    for path, methods in by_path.items():
        routes.append(Route(path, _MethodDispatcher(methods), methods=list(methods)))

    serves_openai = any(operation.openai_errors for operation in operations)

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = "method_not_allowed" if status == 405 else "not_found"
        response = problem_response(
            OctoError(f"{request.method} {request.url.path} is not served here.", code=code),
            id_or_new(dict(request.scope["headers"]).get(b"x-request-id"), context.ids, "req-"),
            # An OpenAI client that calls what is not served, such as /v1/responses, reads the same member.
            openai=serves_openai and request.url.path.startswith("/v1/"),
        )
        # RFC 9110 section 15.5.6: a 405 lists the methods in `Allow`.
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    handlers: Any = {HTTPException: refuse}
    direct = {
        (operation.method, operation.path): by_path[operation.path][operation.method]
        for operation in operations
        if "{" not in operation.path
    }
    return _Application(direct, routes=[*extra_routes, *routes], exception_handlers=handlers)


class _Application(Starlette):
    """Finds an operation with a fixed path in one look-up; everything else goes through the routes in turn."""

    def __init__(self, direct: Mapping[tuple[str, str], OperationEndpoint], **options: Any) -> None:
        super().__init__(**options)
        # A path has one form. A redirect would send a client elsewhere with its token.
        self.router.redirect_slashes = False
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            endpoint = None if self.user_middleware else self._direct.get((scope["method"], scope["path"]))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
            if self.user_middleware and (extension := take_extension(scope)) is not None:
                scope["extensions"][EXTENSION] = SendOnlyExtension(extension)
        await super().__call__(scope, receive, send)


class _MethodDispatcher:
    """Several methods on one path."""

    def __init__(self, methods: Mapping[str, OperationEndpoint]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" and "HEAD" not in self._methods else scope["method"]
        await self._methods[method](scope, receive, send)
