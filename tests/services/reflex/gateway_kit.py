"""The gateway over real sockets, with an orchestrator that is scripted over HTTP behind it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from websockets.asyncio.client import ClientConnection, connect

from octollm.capability import DirectoryEntry, SigningKey, verify_service_token
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings, read_settings
from octollm.contracts.api import EventList, StepText, StepTexts, TaskView
from octollm.contracts.approvals import ApprovalView
from octollm.contracts.auth import TokenExchangeRequest, TokenResponse
from octollm.contracts.events import Event
from octollm.errors import OctoError
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.problems import problem_response
from octollm.rpc.service import Service, build_base
from octollm.rpc.transport import listen, serve_app
from octollm.services.reflex import reflex_service
from octollm.storage import RedisClient, RedisKeys, TextStream, open_redis

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
TASK = "task-" + "0" * 31 + "1"
OTHER = "task-" + "0" * 31 + "2"
LOCAL_KEY = "octo_local_user_key"
KEY = "octo_somebody_elses_key"
READER = "octo_reads_only_key"


@dataclass
class ReceivedRequest:
    """A request as the orchestrator got it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Script:
    """What the orchestrator says."""

    service_key: SigningKey
    keys: dict[str, str] = field(default_factory=lambda: {LOCAL_KEY: "user", KEY: "user", READER: "reader"})
    exchanges: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    expires_in: int = 300
    seen: list[ReceivedRequest] = field(default_factory=list)
    answers: dict[tuple[str, str], Callable[[Request], Response]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    texts: list[StepText] = field(default_factory=list)
    approvals: tuple[ApprovalView, ...] = ()
    decisions: list[dict[str, object]] = field(default_factory=list)
    status: str = "accepted"
    progress: float = 0.0
    redis: RedisClient | None = None
    failing: OctoError | None = None
    refusing: OctoError | None = None
    """What the exchange answers, if not a token."""

    @property
    def stream(self) -> TextStream:
        assert self.redis is not None
        return TextStream(self.redis, RedisKeys())

    async def emit(self, event_type: str, **data: object) -> None:
        """Write an event of the task and hint at it."""
        assert self.redis is not None
        version = len(self.events) + 1
        event = Event(
            event_type, "2025-11-10T10:30:00.000Z", "orchestrator", data, f"id-{version}", "t", TASK, version=version
        )
        self.events.append(event)
        if event_type in ("task.completed", "task.failed", "task.cancelled"):
            self.status = event_type.partition(".")[2]
        await self.redis.publish([(RedisKeys().watch(TASK), msgspec.json.encode(event))])

    def view(self) -> TaskView:
        view = TaskView(TASK, self.status, "a goal", self.progress, len(self.events), "then", "now")  # type: ignore[arg-type]
        return msgspec.structs.replace(view, approvals=self.approvals)

    async def token(self, request: Request) -> Response:
        self._check_service_token(request)
        secret = msgspec.json.decode(await request.body(), type=TokenExchangeRequest).subject_token
        self.exchanges.append(secret)
        if self.refusing is not None:
            return problem_response(self.refusing, "req-x")
        if secret not in self.keys:
            return problem_response(OctoError("The API key is not valid.", code="api_key_invalid"), "req-x")
        token = f"access-{len(self.exchanges)}"
        self.tokens[token] = secret
        answer = TokenResponse(token, self.expires_in, self.keys[secret])
        return Response(msgspec.json.encode(answer), media_type="application/json")

    def _check_service_token(self, request: Request) -> None:
        bearer = request.headers["authorization"].removeprefix("Bearer ")
        directory = {"reflex": DirectoryEntry((self.service_key.thumbprint,))}
        assert verify_service_token(bearer, "orchestrator", directory, CLOCK) == "reflex"

    async def anything(self, request: Request) -> Response:
        self.seen.append(
            ReceivedRequest(
                request.method,
                request.scope["raw_path"].decode(),
                request.url.query,
                dict(request.headers),
                await request.body(),
            )
        )
        try:
            return await self._answer(request)
        except OctoError as error:
            return problem_response(error, request.headers.get("x-request-id", ""))

    async def _answer(self, request: Request) -> Response:
        secret = self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if request.url.path.startswith("/sessions"):
            self._check_service_token(request)
            secret = ""
        if secret is None:
            raise OctoError("The token was revoked.", code="token_revoked")
        if self.failing is not None:
            raise self.failing
        path = request.url.path
        scripted = self.answers.get((request.method, path))
        if scripted is not None:
            return scripted(request)
        if not path.startswith(f"/tasks/{TASK}"):
            raise OctoError("There is no such task.", code="task_not_found")
        value: object
        if path.endswith("/history"):
            after, limit = int(request.query_params["after"]), int(request.query_params["limit"])
            value = EventList(tuple(self.events[after : after + limit]), after)
        elif path.endswith("/texts"):
            value = StepTexts(tuple(self.texts))
        elif path.endswith("/cancel"):
            if self.keys[secret] == "reader":
                raise OctoError("The token does not allow tasks:cancel.", code="scope_missing")
            if self.status != "accepted":
                raise OctoError("The task is over.", code="state_conflict")
            await self.emit("task.cancelled", status="cancelled", progress=self.progress)
            value = self.view()
        elif path.endswith("/approval"):
            if self.keys[secret] == "reader":
                raise OctoError("The token does not allow tasks:approve.", code="scope_missing")
            self.decisions.append(await request.json())
            self.approvals = ()
            await self.emit("task.approved", status="running", progress=self.progress, approvals=["s1"])
            value = self.view()
        else:
            value = self.view()
        return Response(msgspec.json.encode(value), media_type="application/json")


@dataclass
class GatewayHarness:
    """A running gateway."""

    port: int
    script: Script
    client: httpx.AsyncClient
    service: Service
    orchestrator_url: str

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @contextlib.asynccontextmanager
    async def ws(
        self, path: str = f"/ws/tasks/{TASK}", *, key: str | None = None, **options: object
    ) -> AsyncIterator[ClientConnection]:
        headers = dict(options.pop("headers", {}))  # type: ignore[call-overload]
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        async with connect(
            f"ws://127.0.0.1:{self.port}{path}",
            additional_headers=headers,
            compression=None,
            proxy=None,
            **options,  # type: ignore[arg-type]
        ) as socket:
            yield socket


def settings_of(home: Path, **changes: object) -> Settings:
    return dataclasses.replace(read_settings({"OCTOLLM_HOME": str(home)}, ()), **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _start_orchestrator(script: Script) -> AsyncGenerator[str]:
    """Serve the script, with Redis, and yield its URL."""
    app = Starlette(
        routes=[
            Route("/token", script.token, methods=["POST"]),
            Route("/{path:path}", script.anything, methods=["GET", "POST", "DELETE", "PUT"]),
        ]
    )
    behind = listen("127.0.0.1", 0, "orchestrator")
    async with open_redis("memory://gateway") as redis, serve_app(app, behind):
        script.redis = redis
        yield f"http://127.0.0.1:{behind.getsockname()[1]}"


@contextlib.asynccontextmanager
async def start_gateway(
    home: Path,
    *,
    loopback_only: bool = True,
    patience: float = 10.0,
    beside: GatewayHarness | None = None,
    **changes: object,
) -> AsyncGenerator[GatewayHarness]:
    """Start a gateway with its orchestrator, or one more with that of another. ``changes`` are settings."""
    script = Script(SigningKey.generate("reflex")) if beside is None else beside.script
    bound = listen("127.0.0.1", 0, "reflex")
    port = bound.getsockname()[1]
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client())
        url = (
            await stack.enter_async_context(_start_orchestrator(script)) if beside is None else beside.orchestrator_url
        )
        assert script.redis is not None
        # One scripted server answers for both: their paths differ.
        urls = dict.fromkeys(("orchestrator", "memory"), (url,))
        identity = ServiceIdentity("reflex", script.service_key, {}, CLOCK, IDS)
        base = build_base(identity, http, StaticDiscovery(urls), follow_revocations=False)
        async with (
            reflex_service(
                base,
                settings_of(home, **changes),
                redis=script.redis,
                local_key=LOCAL_KEY,
                loopback_only=loopback_only,
                send_timeout=patience,
            ) as service,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
            service.serve(bound),
        ):
            yield GatewayHarness(port, script, client, service, url)


def json_answer(value: object, status: int = 200, **headers: str) -> Callable[[Request], Response]:
    def answer(_request: Request) -> Response:
        return Response(msgspec.json.encode(value), status_code=status, headers=headers, media_type="application/json")

    return answer


def stream_answer(*chunks: bytes) -> Callable[[Request], Response]:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    def answer(_request: Request) -> Response:
        return StreamingResponse(body(), media_type="text/event-stream")

    return answer
