"""The test harness for one arm.

The arm, the models service and the orchestrator's records are real; every other service is scripted. Production code
checks bodies, answers, tokens, declared calls, budget and errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, cast

import msgspec

from octollm.arm import Arm, open_arm
from octollm.arm.references import CallTo
from octollm.arm.service import answer_type
from octollm.capability import BUILT_IN_CALLS, Principal, Scope, ScopeSet, SigningKey, TaskRef, attenuate, preset_scopes
from octollm.config import read_settings
from octollm.contracts.problems import Problem
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.stream import NDJSON, StreamEvent
from octollm.contracts.task import FileRef
from octollm.errors import OctoError
from octollm.framing import iter_ndjson
from octollm.llm.selection import ModelChoice
from octollm.llm.types import ChatModel
from octollm.rpc.codec import decode, encode
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.problems import parse_problem, remote_error
from octollm.rpc.service import Service
from octollm.rpc.transport import listen, serve_app
from octollm.services.models.service import models_service
from octollm.testing.fake_model import FakeAnswers, FakeModel
from octollm.testing.harness import LOCAL, Harness, fake_orchestrator
from octollm.testing.in_memory import InMemoryHttp
from octollm.testing.scripted_service import (
    RecordedCall,
    ScriptedAnswer,
    ServiceScript,
    scripted_scopes,
    scripted_service,
)

_MAX_LINE = 8 * 1024 * 1024
CALL_SECONDS = 60.0
_TASK = "task-" + "0" * 32


class ArmTestClient:
    """Calls an arm as the orchestrator does, with scripted services: ``async with ArmTestClient(arm) as client:``.

    ``model`` is what the model answers, in order, or a function of the request. ``answers`` is what other services
    answer, by scope or reference: ``{"retriever:search": {"passages": []}}``; an ``OctoError`` is raised there, a
    function is called with the decoded body. ``max_tokens`` is the task's budget, a word being a token. ``sockets``
    serves everything on real sockets of this machine, slower and otherwise alike.

    The arm's ``lifespan`` is open inside the ``with``; what was recorded stays readable after it.
    """

    def __init__(
        self,
        arm: Arm[Any],
        *,
        model: FakeModel | FakeAnswers = (),
        answers: Mapping[Any, ScriptedAnswer] | None = None,
        max_tokens: int = 100_000,
        sockets: bool = False,
    ) -> None:
        self.arm = arm
        self.model = model if isinstance(model, FakeModel) else FakeModel(model)
        self.emitted: list[str] = []
        self.text = ""
        self.progress: list[tuple[float, str]] = []
        self._script = ServiceScript({str(scope): answer for scope, answer in (answers or {}).items()})
        self._max_tokens = max_tokens
        self._sockets = sockets
        self._attempt = 0
        self._stack: contextlib.AsyncExitStack | None = None
        self._opened: Harness | None = None

    async def __aenter__(self) -> ArmTestClient:
        """Open the arm and the scripted services. Raises ``arm_start_failed`` if the arm's lifespan fails."""
        if self._stack is not None:
            raise RuntimeError("An ArmTestClient is opened once; make another one.")
        async with contextlib.AsyncExitStack() as stack:
            self._opened = await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the arm and the scripted services."""
        assert self._stack is not None
        await self._stack.__aexit__(kind, error, traceback)

    async def _open(self, stack: contextlib.AsyncExitStack) -> Harness:
        arm = self.arm
        scopes = scripted_scopes(arm.calls, self._script.answers)
        http = await stack.enter_async_context(Http1Client() if self._sockets else InMemoryHttp())
        harness = Harness(http)
        harness.records.tokens = self._max_tokens
        harness.declarations = {**BUILT_IN_CALLS, **arm.declarations()}
        callees = sorted({scope.partition(":")[0] for scope in scopes} - {arm.name})
        for name in (arm.name, *callees):
            harness.keys.setdefault(name, SigningKey.generate(name))
        await stack.enter_async_context(host_service(harness, fake_orchestrator(harness)))
        neighbours = [scripted_service(harness.base(name), self._script, scopes) for name in callees]
        contexts = [
            host_service(harness, fake_models_service(harness, self.model), lazy=True),
            *(host_service(harness, neighbour) for neighbour in neighbours),
            host_service(harness, open_arm(arm, harness.base(arm.name))),
        ]
        await stack.enter_async_context(enter_all(contexts))
        return harness

    @property
    def _harness(self) -> Harness:
        if self._opened is None:
            raise RuntimeError("The ArmTestClient is not open: async with ArmTestClient(arm) as client: …")
        return self._opened

    @property
    def calls(self) -> list[RecordedCall]:
        """Return the calls that the arm made to other services, except those to models and for files."""
        return self._script.calls

    @property
    def files(self) -> dict[str, bytes]:
        """Return the bytes of every file by digest: those given, and the artifacts."""
        return self._harness.records.files

    def put_file(self, name: str, content: bytes | str) -> FileRef:
        """Store a file as a client does, and return the reference that a task has to it."""
        body = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(body).hexdigest()
        self._harness.records.files[digest] = body
        return FileRef(name, digest)

    async def call(
        self,
        operation: str,
        body: object,
        *,
        files: Mapping[str, bytes | str] | None = None,
        without: Sequence[CallTo] = (),
    ) -> Any:
        """Call an operation as the orchestrator does; return its answer, typed as declared.

        ``execute`` returns an ``ExecuteResult``. ``files`` are stored and named in the task's context. The caller's
        authority covers what the operation declares, ``without`` these scopes. What the arm emits is in ``text``,
        ``emitted`` and ``progress``. Raises the failure as a caller receives it, an ``OctoError``, and
        ``AssertionError`` for a mistake of the test: a call without an answer, or an answer of the wrong type.
        """
        self.emitted, self.text, self.progress = [], "", []
        request: object = msgspec.json.decode(encode(body))
        if files:
            refs = [msgspec.to_builtins(self.put_file(name, content)) for name, content in files.items()]
            request = _with_files(request, refs)
        try:
            encoded = await self._send(operation, encode(request), without)
        finally:
            if self._script.faults:
                raise AssertionError(self._script.faults.pop())
        declared = next((op for op in self.arm.operations if op.name == operation), None)
        return decode(encoded, Any if declared is None else answer_type(declared))

    async def card(self) -> dict[str, Any]:
        """Return the arm's card."""
        return msgspec.json.decode(
            (await self._harness.send(self.arm.name, "GET", "/.well-known/agent-card.json")).body
        )

    async def openapi(self) -> dict[str, Any]:
        """Return the arm's OpenAPI description."""
        return msgspec.json.decode((await self._harness.send(self.arm.name, "GET", "/openapi.json")).body)

    async def _send(self, operation: str, body: bytes, without: Sequence[CallTo]) -> bytes:
        self._attempt += 1
        headers = {
            "Authorization": "Bearer " + self._token(operation, without),
            "Accept": NDJSON,
            "Content-Type": "application/json",
            "Idempotency-Key": f"{_TASK}:s1:{self._attempt}",
        }
        url = f"{self._harness.urls[self.arm.name]}/{operation}"
        async with self._harness.http.stream("POST", url, headers, body, seconds=CALL_SECONDS) as streamed:
            if streamed.status >= 400:
                body = b"".join([chunk async for chunk in streamed.chunks])
                raise parse_problem(self.arm.name, streamed.status, body, None)
            async for event in iter_ndjson(streamed.chunks, StreamEvent, _MAX_LINE):
                if event.type == "result":
                    return bytes(event.result)
                self._record(event)
            raise parse_problem(self.arm.name, streamed.status, b"", None)

    def _record(self, line: StreamEvent) -> None:
        if line.type == "problem":
            raise remote_error(line.problem or Problem("", 500, "", "peer_protocol", False), self.arm.name)
        if line.type == "token":
            self.emitted.append(line.text)
            self.text = line.text if line.reset else self.text + line.text
        elif line.type == "progress":
            self.progress.append((line.progress, line.message))

    def _token(self, operation: str, without: Sequence[CallTo]) -> str:
        """Return a bearer string as the orchestrator makes it: a token, and a grant for what the operation declares."""
        harness, arm = self._harness, self.arm
        scope = f"{arm.name}:{operation}"
        denied = ScopeSet(Scope(str(call)) for call in without)
        declared = {call.scope: Scope(call.scope) for calls in harness.declarations.values() for call in calls}
        delegated = ScopeSet(call for call in declared.values() if not denied.allows(call))
        arms = {*BUILT_IN_ARMS, arm.name, *(call.family for call in declared.values())}
        authority = preset_scopes("user", sorted(arms)).intersection(ScopeSet((Scope(scope), *delegated)))
        files = tuple(f"files:read:{digest}" for digest in harness.records.files)
        delegation, missing = attenuate(scope, harness.declarations, authority, bindings={"files:read": files})
        if missing:
            raise OctoError(f"The task lacks the authority for {', '.join(missing)}.", code="authority_missing")
        return harness.minter.mint_access(
            Principal("user-1", "cred-1", "default"),
            arm.name,
            scope,
            CALL_SECONDS,
            task=TaskRef(_TASK, "s1", self._attempt, 1),
            delegation=delegation,
            holder_jkt=harness.keys[arm.name].thumbprint,
        )


def _with_files(body: object, files: list[Any]) -> object:
    task = cast("dict[str, Any]", body)
    context: dict[str, Any] = dict(task.get("context") or {})
    return {**task, "context": {**context, "files": [*context.get("files", ()), *files]}}


def run_arm(
    arm: Arm[Any],
    operation: str,
    body: object,
    *,
    model: FakeModel | FakeAnswers = (),
    answers: Mapping[Any, ScriptedAnswer] | None = None,
    files: Mapping[str, bytes | str] | None = None,
    without: Sequence[CallTo] = (),
    max_tokens: int = 100_000,
) -> tuple[Any, ArmTestClient]:
    """Call one operation from a test without an event loop; return its answer and the closed ``ArmTestClient``."""

    async def run() -> tuple[Any, ArmTestClient]:
        async with ArmTestClient(arm, model=model, answers=answers, max_tokens=max_tokens) as client:
            return await client.call(operation, body, files=files, without=without), client

    return asyncio.run(run())


@contextlib.asynccontextmanager
async def enter_all(contexts: Sequence[AbstractAsyncContextManager[None]]) -> AsyncGenerator[None]:
    """Open contexts one after the other, and close them concurrently: each server takes a moment to stop."""
    stacks = [contextlib.AsyncExitStack() for _ in contexts]
    try:
        for stack, context in zip(stacks, contexts, strict=True):
            await stack.enter_async_context(context)
        yield
    finally:
        await asyncio.gather(*(stack.aclose() for stack in stacks))


@contextlib.asynccontextmanager
async def fake_models_service(harness: Harness, model: FakeModel) -> AsyncGenerator[Service]:
    """Yield the real models service over a fake model."""

    async def ready() -> ChatModel:
        return model

    with TemporaryDirectory() as home:
        settings = read_settings({"OCTOLLM_HOME": home, "OCTOLLM_MODEL": "openai:fake"}, ())
        choice = ModelChoice(model.name, None, ready)
        async with models_service(harness.base("models"), settings, choose=lambda: choice) as service:
            yield service


@contextlib.asynccontextmanager
async def host_service(
    harness: Harness, service_context: AbstractAsyncContextManager[Service], *, lazy: bool = False
) -> AsyncGenerator[None]:
    """Host a service in memory, or on a socket where the harness has them.

    ``lazy`` also opens a socket, served once a client connects: one that the arm's author brings needs an address.
    """
    if not isinstance(harness.http, InMemoryHttp):
        async with harness.serve(service_context):
            yield
        return
    async with service_context as service, contextlib.AsyncExitStack() as stack:
        url = f"http://{service.base.name}"
        if lazy:
            bound = listen(LOCAL, 0, service.base.name)
            url = f"http://{LOCAL}:{bound.getsockname()[1]}"
            await stack.enter_async_context(_serve_on_first_connection(service, bound))
        harness.http.apps[url] = service.app
        harness.urls[service.base.name] = url
        yield


@contextlib.asynccontextmanager
async def _serve_on_first_connection(service: Service, bound: socket.socket) -> AsyncGenerator[None]:
    loop = asyncio.get_running_loop()
    first_connection = asyncio.Event()

    def connected() -> None:
        loop.remove_reader(bound)
        first_connection.set()

    async def serve() -> None:
        await first_connection.wait()
        async with serve_app(service.app, bound):
            await asyncio.Event().wait()

    loop.add_reader(bound, connected)
    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        loop.remove_reader(bound)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        bound.close()
