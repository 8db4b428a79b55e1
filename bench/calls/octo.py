"""This project's side: a service and a caller as an installation has them, and both without the policies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from octollm.capability import (
    BUILT_IN_CALLS,
    CallTokens,
    DirectoryEntry,
    Principal,
    RootMinter,
    SigningKey,
    TaskRef,
    attenuate,
    preset_scopes,
)
from octollm.clock import SystemClock, Uuid7Generator
from octollm.context import RequestContext, set_context, start_trace
from octollm.events.log import EventLog
from octollm.installation.service_host import tune_garbage_collector
from octollm.resilience import Deadline
from octollm.rpc.auth import ServiceAuthenticator
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.client import CallTarget, OutgoingCall
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.exporter import BatchExporter
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import HttpClient
from octollm.rpc.idempotency import IdempotencyStore
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import ServiceBase, build_base, build_service
from octollm.rpc.transport import listen, serve_app
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.services_api import ServicesApi
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.tasks.ledger import BudgetLedger
from octollm.telemetry import Span, configure_logging
from octollm.telemetry.otlp import encode_spans

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
SAMPLED = 0.01
TOKEN_SECONDS = 10.0
"""How long one access token is used, where it is not made for each call; it lives for a minute."""


Serve = Callable[[ASGIApp, int], Awaitable[None]]


class Body(msgspec.Struct):
    code: str


@dataclass(frozen=True)
class Keys:
    """Made before the processes part, so that both know them."""

    root: SigningKey
    coder: SigningKey
    judge: SigningKey

    @classmethod
    def make(cls) -> Keys:
        return cls(*(SigningKey.generate(name) for name in ("orchestrator", "coder", "judge")))

    def identity(self, name: str) -> ServiceIdentity:
        key = self.coder if name == "coder" else self.judge
        return ServiceIdentity(name, key, {self.root.thumbprint: self.root.public}, CLOCK, IDS)

    def granted(self) -> str:
        """Return what the orchestrator sends coder with a step: the grant under which it may ask the judge."""
        may, _ = attenuate("coder:execute", BUILT_IN_CALLS, preset_scopes("user"))
        return RootMinter(self.root, CLOCK, IDS).mint_access(
            Principal("user-1", "cred-1", "default"),
            "coder",
            "coder:execute",
            300,
            task=TaskRef("task-" + "0" * 32, "s1", 1, 1),
            delegation=may,
            holder_jkt=self.coder.thumbprint,
        )


async def echo(_call: IncomingCall, body: Body) -> Body:
    return body


async def serve(
    port: int, keys: Keys, store: str | None, *, keeper_port: int | None = None, server: Serve | None = None
) -> None:
    """Serve the judge until cancelled; ``store`` is the URL of a database for keys.

    With ``keeper_port`` the keys are with the orchestrator there.
    """
    kind = "idempotent" if store else "read_only"
    operation = Operation(
        "validate", "POST", "/validate", echo, scope="judge:validate", body=Body, response=Body, kind=kind
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_logs(stack))
        http = await stack.enter_async_context(Http1Client())
        urls = {"judge": ("http://judge",), "orchestrator": (f"http://127.0.0.1:{keeper_port}",)}
        base = build_base(keys.identity("judge"), http, StaticDiscovery(urls), follow_revocations=False)
        keeper: IdempotencyStore | None = None
        if keeper_port is not None:
            keeper = base.remote_idempotency_store()
        elif store is not None:
            db = await stack.enter_async_context(open_database(store, clock=CLOCK))
            await migrate(db, "orchestrator")
            keeper = SqlIdempotencyStore(db, "bench")
        service = build_service(base, [operation], idempotency=keeper)
        await stack.enter_async_context(_exporting(base))
        tune_garbage_collector()
        await (server or _serve_app)(service.app, port)


async def _serve_app(app: ASGIApp, port: int) -> None:
    async with serve_app(app, listen("127.0.0.1", port, "judge")):
        await asyncio.Event().wait()


async def keep(port: int, keys: Keys, store: str) -> None:
    """Keep the judge's keys as the orchestrator does, until cancelled."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_logs(stack))
        http = await stack.enter_async_context(Http1Client())
        identity = ServiceIdentity("orchestrator", keys.root, {keys.root.thumbprint: keys.root.public}, CLOCK, IDS)
        base = build_base(
            identity, http, StaticDiscovery({"orchestrator": (f"http://127.0.0.1:{port}",)}), follow_revocations=False
        )
        db = await stack.enter_async_context(open_database(store, clock=CLOCK))
        await migrate(db, "orchestrator")
        revoking = RevocationStore(db, EventLog(db, CLOCK, IDS), CLOCK)
        claims = SqlIdempotencyStore(db, "bench")
        api = ServicesApi(db, BudgetLedger(db, CLOCK, IDS), claims, revoking, identity.roots, CLOCK)
        entries = {"judge": DirectoryEntry((keys.judge.thumbprint,))}
        opener = ServiceAuthenticator("orchestrator", lambda: entries, CLOCK)
        service = build_service(base, api.operations(), authenticators={"service": opener})
        await stack.enter_async_context(_exporting(base))
        await stack.enter_async_context(serve_app(service.app, listen("127.0.0.1", port, "orchestrator")))
        tune_garbage_collector()
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def calling(
    port: int,
    keys: Keys,
    size: int,
    *,
    sampled: float = SAMPLED,
    keyed: bool = False,
    minted: bool = False,
    client: Callable[[], HttpClient] = Http1Client,
) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    """A caller with everything on. With ``minted`` it calls as an arm's ``Context`` does, else a token serves for 10 s.

    Each minted call is the only one that its served call makes, so that no access token is used twice.
    """
    body = msgspec.json.encode(Body("x" * size))
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_logs(stack))
        http = await stack.enter_async_context(client())
        identity = keys.identity("coder")
        base = build_base(
            identity, http, StaticDiscovery({"judge": (f"http://127.0.0.1:{port}",)}), follow_revocations=False
        )
        await stack.enter_async_context(_exporting(base))
        verified, delegator = identity.verifier().verify(keys.granted()), identity.delegator()
        target = CallTarget("judge", "judge.validate", "POST", "/validate", "idempotent" if keyed else "read_only")
        numbers = itertools.count()

        def mint() -> str:
            return delegator.delegate(verified, "judge", "judge:validate", keys.judge.thumbprint)

        token, made = mint(), CLOCK.monotonic()
        run = IDS.hex()

        async def call() -> object:
            nonlocal token, made
            number = next(numbers)
            if minted:
                served = hashlib.sha256(f"req-{IDS.hex()}".encode()).hexdigest()
                bearer = CallTokens(delegator, verified, served).bearer(
                    "judge", "judge:validate", keys.judge.thumbprint
                )
            else:
                if CLOCK.monotonic() - made > TOKEN_SECONDS:
                    token, made = mint(), CLOCK.monotonic()
                bearer = token
            trace = start_trace(sampled=number % 100 < sampled * 100)
            set_context(RequestContext("coder", trace=trace, task_id="task-" + "0" * 32, tenant="default"))
            key = f"{run}-{number}" if keyed else None
            return await base.client.call(OutgoingCall(target, bearer, Deadline.after(CLOCK, 30), body, key), Body)

        tune_garbage_collector()
        yield call


def _logs(stack: contextlib.AsyncExitStack) -> contextlib.AbstractContextManager[None]:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return configure_logging(Path(folder) / "log", level="info", clock=CLOCK)


def _exporting(base: ServiceBase) -> contextlib.AbstractAsyncContextManager[None]:
    async def encoded(spans: list[Span]) -> None:
        encode_spans(spans, "bench")

    return BatchExporter(base.spans, encoded, name="monitor", log=base.log, metrics=base.metrics).run()


async def serve_bare(port: int) -> None:
    """Serve the same answer with the parts underneath alone."""

    async def answer(request: Request) -> Response:
        body = msgspec.json.decode(await request.body(), type=Body)
        return Response(msgspec.json.encode(body), media_type="application/json")

    config = uvicorn.Config(
        Starlette(routes=[Route("/validate", answer, methods=["POST"])]),
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
    )
    await uvicorn.Server(config).serve()


@contextlib.asynccontextmanager
async def calling_bare(port: int, size: int) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    body = msgspec.json.encode(Body("x" * size))
    url = f"http://127.0.0.1:{port}/validate"
    headers = {"content-type": "application/json"}
    async with Http1Client() as http:

        async def call() -> object:
            answer = await http.send("POST", url, headers, body, seconds=30)
            return msgspec.json.decode(answer.body, type=Body)

        yield call
