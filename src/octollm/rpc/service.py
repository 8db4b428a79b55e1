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
from octollm.capability.keyring import Roots
from octollm.clock import Clock, Ids
from octollm.resilience import EjectionPolicy
from octollm.rpc.application import build_app
from octollm.rpc.call import Operation
from octollm.rpc.caller import Caller
from octollm.rpc.discovery import Discovery
from octollm.rpc.discovery_registry import RegistryDiscovery
from octollm.rpc.exporting import Exporter, to_monitor
from octollm.rpc.health import CheckUp, health_operations
from octollm.rpc.hosting import serving
from octollm.rpc.http import Http
from octollm.rpc.idempotency import IdempotencyStore
from octollm.rpc.idempotency_remote import RemoteIdempotency
from octollm.rpc.identity import Directory, Identity
from octollm.rpc.openers import CapabilityOpener, PublicOpener
from octollm.rpc.revoked import Revoked
from octollm.rpc.server import Kit, Opener
from octollm.rpc.wire import PLAIN, Wire
from octollm.telemetry import Buffer, Log, Metrics, Span, Tracer, log_for
from octollm.telemetry.spans import SHARE


@dataclass(frozen=True, slots=True)
class Base:
    """What any service is built on. One per service; ``http`` and ``discovery`` may be shared in a process."""

    identity: Identity
    http: Http
    discovery: Discovery
    clock: Clock
    ids: Ids
    log: Log
    metrics: Metrics
    caller: Caller
    directory: Directory
    tracer: Tracer
    spans: Buffer[Span]
    """Ended spans that are yet to be exported."""
    wire: Wire
    revoked: Revoked | None
    """What is revoked, as the orchestrator tells it; ``None`` for a service that is not told."""
    advertised: str | None = None

    @property
    def url(self) -> str:
        """Return where others reach this process."""
        return self.advertised or self.discovery.instances(self.name)[0]

    @property
    def name(self) -> str:
        """Return the service's name."""
        return self.identity.name

    def remote_idempotency(self) -> RemoteIdempotency:
        """Return the store of keys that the orchestrator keeps for this service."""
        return RemoteIdempotency(self.caller, self.identity.signer(), self.clock)


def build_base(
    identity: Identity,
    http: Http,
    discovery: Discovery,
    *,
    url: str | None = None,
    trace_share: float = SHARE,
    wire: Wire = PLAIN,
    follow_revocations: bool = True,
) -> Base:
    """Return what the service ``identity`` is built on; ``url`` is where others reach this process of it.

    ``wire`` is how it is served; ``http`` has to be a client of it. ``trace_share`` is that of the calls outside tasks
    that leave a trace. Without ``follow_revocations`` nothing that is revoked is known: for the orchestrator, which
    knows by itself, and for tests of what has no orchestrator.
    """
    roots = identity.roots if isinstance(identity.roots, Roots) else Roots(identity.roots)
    identity = replace(identity, roots=roots)
    log = log_for(identity.name)
    metrics = Metrics(identity.name)
    spans = Buffer[Span]()
    tracer = Tracer(identity.name, identity.clock, spans, share=trace_share)

    def calling(found: Discovery, ejection: EjectionPolicy | None = None) -> Caller:
        return Caller(
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
    directory = Directory(calling(discovery), identity.signer(), roots, identity.clock)
    discovery = RegistryDiscovery(discovery, directory.addresses)
    # What is asked for again and again must not keep others from asking, nor wait for an ejection to end.
    following = calling(discovery, EjectionPolicy(failures=sys.maxsize))
    return Base(
        identity=identity,
        http=http,
        discovery=discovery,
        clock=identity.clock,
        ids=identity.ids,
        log=log,
        metrics=metrics,
        caller=calling(discovery),
        directory=directory,
        tracer=tracer,
        spans=spans,
        wire=wire,
        revoked=Revoked(following, identity.signer(), identity.clock, log) if follow_revocations else None,
        advertised=url,
    )


Presence = Callable[[], contextlib.AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """A service ready to be served."""

    base: Base
    kit: Kit
    app: Starlette
    exporter: Exporter[Span]
    presence: Presence | None = None
    """Open while the service is served, from before :meth:`serve` yields: an arm is registered for so long."""

    @contextlib.asynccontextmanager
    async def serve(self, bound: socket.socket, *, drain: float = 2.0) -> AsyncGenerator[None]:
        """Serve on a bound socket; leaving drains: new calls are refused while those in flight end.

        Those get ``drain`` seconds, and are cancelled then.
        """
        revoked = self.base.revoked
        following = contextlib.nullcontext() if revoked is None else revoked.following(self.base.directory.keep_fresh)
        async with self.exporter.running(), following, serving(self.app, bound, drain=drain, wire=self.base.wire):
            self.base.log.info("service.started", address="{}:{}".format(*bound.getsockname()[:2]))
            try:
                async with self.presence() if self.presence is not None else contextlib.nullcontext():
                    yield
            finally:
                self.kit.draining.set()
                self.base.log.info("service.draining")


def build_service(
    base: Base,
    operations: Sequence[Operation],
    *,
    openers: Mapping[str, Opener] | None = None,
    idempotency: IdempotencyStore | None = None,
    checkups: Mapping[str, CheckUp] | None = None,
    extra: Sequence[BaseRoute] = (),
    max_concurrent: int = 64,
    presence: Presence | None = None,
    draining: asyncio.Event | None = None,
    tells_export: bool = True,
    public_keys: Callable[[], Mapping[str, PublicKey]] | None = None,
) -> Service:
    """Return the service of ``operations`` with what every service has besides.

    ``draining`` is set when it shuts down; it is passed in by who has long-lived connections to end then. Without
    ``tells_export`` the export of spans is left out of ``/ready``: for a service whose readiness strangers may ask.
    ``public_keys`` are those that it publishes, where these are not the service's own.
    """
    kit = Kit(
        service=base.name,
        clock=base.clock,
        ids=base.ids,
        log=base.log,
        metrics=base.metrics,
        tracer=base.tracer,
        openers={
            "public": PublicOpener(),
            "capability": CapabilityOpener(
                base.identity.verifier(None if base.revoked is None else base.revoked.known), base.revoked
            ),
            **(openers or {}),
        },
        idempotency=idempotency,
        max_concurrent=max_concurrent,
        draining=draining or asyncio.Event(),
    )
    exporter = Exporter(
        base.spans,
        to_monitor(base.caller, base.identity.signer(), base.clock),
        name="monitor",
        log=base.log,
        metrics=base.metrics,
    )
    watched = {**(checkups or {}), **({"traces": exporter.checkup} if tells_export else {})}
    if base.revoked is not None:
        watched["revocations"] = base.revoked.checkup
    published = public_keys or base.identity.public_keys
    own = health_operations(base.name, base.metrics, operations, published, watched, base.clock)
    return Service(base, kit, build_app(kit, [*own, *operations], extra), exporter, presence)
