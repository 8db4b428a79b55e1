"""Services of a test's own operations over real sockets, opened by capabilities, and callers of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec
from wires import CURRENT

from octollm.capability import Principal, RootMinter, SigningKey
from octollm.clock import SystemClock, Uuid7Generator
from octollm.resilience import Deadline, EjectionPolicy, RetryPolicy
from octollm.rpc.call import Operation
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.http_client import HttpClient
from octollm.rpc.idempotency import IdempotencyStore
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import ServiceBase, build_base, build_service
from octollm.rpc.transport import listen

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)


class NoContent(msgspec.Struct):
    """A body, or an answer, without a word."""


def executing(handler: object) -> Operation:
    """Return the operation that ``handler`` does, from nothing to nothing."""
    return Operation(
        "execute",
        "POST",
        "/execute",
        handler,  # type: ignore[arg-type]
        scope="coder:execute",
        body=NoContent,
        response=NoContent,
    )


@dataclass(frozen=True)
class Realm:
    """The keys of the root and of one service, all of whose replicas share them."""

    root: SigningKey
    service: SigningKey

    @classmethod
    def make(cls) -> Realm:
        return cls(SigningKey.generate("orchestrator"), SigningKey.generate("coder"))

    def base(self, http: HttpClient, urls: dict[str, tuple[str, ...]] | None = None) -> ServiceBase:
        identity = ServiceIdentity("coder", self.service, {self.root.thumbprint: self.root.public}, CLOCK, IDS)
        return build_base(
            identity,
            http,
            StaticDiscovery(urls or {"coder": ("http://coder",)}),
            transport=CURRENT.wire,
            follow_revocations=False,
        )

    def token(self, *, sub: str = "user-1", tenant: str = "default") -> str:
        return RootMinter(self.root, CLOCK, IDS).mint_access(
            Principal(sub, "cred-1", tenant), "coder", "coder:execute", 300
        )

    @contextlib.asynccontextmanager
    async def replica(
        self,
        operations: Sequence[Operation],
        *,
        store: IdempotencyStore | None = None,
        max_concurrent: int = 64,
        urls: dict[str, tuple[str, ...]] | None = None,
    ) -> AsyncGenerator[str]:
        """Serve a replica; yield its URL."""
        bound = listen("127.0.0.1", 0, "coder")
        async with CURRENT.client() as http:
            service = build_service(self.base(http, urls), operations, idempotency=store, max_concurrent=max_concurrent)
            async with service.serve(bound, shutdown_grace=0):
                yield CURRENT.url(bound.getsockname()[1])

    @contextlib.asynccontextmanager
    async def caller(
        self, *urls: str, retry: RetryPolicy | None = None, ejection: EjectionPolicy | None = None
    ) -> AsyncGenerator[ServiceClient]:
        async with CURRENT.client() as http:
            base = self.base(http)
            yield ServiceClient(
                "tester",
                http,
                StaticDiscovery({"coder": urls}),
                clock=CLOCK,
                ids=IDS,
                metrics=base.metrics,
                retry=retry,
                ejection=ejection,
            )


def outgoing(
    operation: Operation, token: str, *, seconds: float = 10, key: str | None = None, body: bytes = b"{}"
) -> OutgoingCall:
    """Return a call of an operation of ``coder``."""
    target = CallTarget("coder", operation.name, operation.method, operation.path, operation.kind)
    return OutgoingCall(target, token, Deadline.after(CLOCK, seconds), body, key)
