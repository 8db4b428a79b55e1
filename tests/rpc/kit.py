"""One service of a test's own operations, opened by nothing, over real sockets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from wires import CURRENT

from octollm.capability import SigningKey
from octollm.clock import SystemClock, Uuid7Generator
from octollm.resilience import Deadline, RetryPolicy
from octollm.rpc.call import Operation
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.http_client import HttpClient
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import ServiceBase, build_base, build_service
from octollm.rpc.transport import listen

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)


@dataclass
class RunningService:
    url: str
    port: int
    base: ServiceBase
    caller: ServiceClient
    stop: Callable[[], None]

    def out(
        self, operation: Operation, body: bytes | None = b"{}", *, seconds: float = 10, key: str | None = None
    ) -> OutgoingCall:
        target = CallTarget("svc", operation.name, operation.method, operation.path, operation.kind)
        return OutgoingCall(target, "none", Deadline.after(CLOCK, seconds), body, key)


def base_for(http: HttpClient, urls: dict[str, tuple[str, ...]]) -> ServiceBase:
    key = SigningKey.generate("svc")
    return build_base(
        ServiceIdentity("svc", key, {}, CLOCK, IDS),
        http,
        StaticDiscovery(urls),
        transport=CURRENT.wire,
        follow_revocations=False,
    )


@contextlib.asynccontextmanager
async def served(
    operations: Sequence[Operation], *, max_concurrent: int = 64, retry: RetryPolicy | None = None
) -> AsyncGenerator[RunningService]:
    bound = listen("127.0.0.1", 0, "svc")
    port = bound.getsockname()[1]
    url = CURRENT.url(port)
    async with CURRENT.client() as http:
        base = base_for(http, {"svc": (url,)})
        service = build_service(base, operations, max_concurrent=max_concurrent)
        caller = ServiceClient(
            "tester",
            http,
            base.discovery,
            clock=CLOCK,
            ids=IDS,
            metrics=base.metrics,
            retry=retry or RetryPolicy(max_attempts=1),
        )
        async with service.serve(bound):
            yield RunningService(url, port, base, caller, service.context.draining.set)
