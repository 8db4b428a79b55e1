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
from typing import Any, cast

import msgspec

from octollm.arm import Arm, build_arm
from octollm.arm.service import answer_type
from octollm.capability import BUILT_IN_CALLS, Principal, Scope, ScopeSet, SigningKey, TaskRef, attenuate, preset_scopes
from octollm.config import read_settings
from octollm.contracts.problems import Problem
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.stream import NDJSON, StreamEvent
from octollm.contracts.task import FileRef
from octollm.errors import OctoError
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


@contextlib.asynccontextmanager
async def enter_all(contexts: Sequence[AbstractAsyncContextManager[None]]) -> AsyncGenerator[None]:
    """Open contexts one after the other, and close them side by side: a server takes a moment to end."""
    stacks = [contextlib.AsyncExitStack() for _ in contexts]
    try:
        for stack, opening in zip(stacks, contexts, strict=True):
            await stack.enter_async_context(opening)
        yield
    finally:
        await asyncio.gather(*(stack.aclose() for stack in stacks))


@contextlib.asynccontextmanager
async def arm_service(harness: Harness, arm: Arm) -> AsyncGenerator[Service]:
    """Yield ``arm`` as a service."""
    yield build_arm(arm, harness.base(arm.name))


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
    """Host a service in memory, or on a socket where the bench has them.

    ``lazily`` also opens a socket, served once somebody connects: a client of the arm's own knows nothing of ours.
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
    wanted = asyncio.Event()

    def connected() -> None:
        loop.remove_reader(bound)
        wanted.set()

    async def serve() -> None:
        await wanted.wait()
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


CALL_SECONDS = 60.0
_TASK = "task-" + "0" * 32


class ArmHarness:
    """What a test of an arm sees. Made by :func:`arm_test`; what was recorded stays readable after it is closed."""

    def __init__(self, arm: Arm, harness: Harness, model: FakeModel, script: ServiceScript) -> None:
        self.arm = arm
        self.model = model
        self._harness = harness
        self._script = script
        self._attempt = 0
        self.emitted: list[str] = []
        self.text = ""
        self.progress: list[tuple[float, str]] = []

    @property
    def calls(self) -> list[RecordedCall]:
        """Return the calls that the arm made to other services, models and files apart."""
        return self._script.calls

    @property
    def files(self) -> dict[str, bytes]:
        """Return the bytes of every file by digest: those given, and the artifacts."""
        return self._harness.records.files

    def put_file(self, name: str, content: bytes | str) -> FileRef:
        """Store a file as a client would have; return what a task names it by."""
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
        without: Sequence[str] = (),
    ) -> Any:
        """Call an operation as the orchestrator does; return its answer, typed as declared.

        ``execute`` answers an ``ExecuteResult``. ``files`` are stored and named in the task's context. The caller's
        authority covers what the arm declares, ``without`` these scopes. What the arm emits is in ``text``,
        ``emitted`` and ``progress``. Raises what a caller would be told as an ``OctoError``, and ``AssertionError``
        where the test itself does not fit: a call that it has no answer for, or an answer that no service gives.
        """
        self.emitted, self.text, self.progress = [], "", []
        wanted: object = msgspec.json.decode(encode(body))
        if files:
            refs = [msgspec.to_builtins(self.put_file(name, content)) for name, content in files.items()]
            wanted = _with_files(wanted, refs)
        try:
            encoded = await self._send(operation, encode(wanted), without)
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

    async def _send(self, operation: str, body: bytes, without: Sequence[str]) -> bytes:
        self._attempt += 1
        headers = {
            "Authorization": "Bearer " + self._token(operation, without),
            "Accept": NDJSON,
            "Content-Type": "application/json",
            "Idempotency-Key": f"{_TASK}:s1:{self._attempt}",
        }
        url = f"{self._harness.urls[self.arm.name]}/{operation}"
        async with self._harness.http.stream("POST", url, headers, body, seconds=CALL_SECONDS) as streamed:
            rest, lines = b"", list[bytes]()
            async for chunk in streamed.chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                if streamed.status >= 400:
                    rest = b"\n".join((*lines, rest))
                    continue
                for text in lines:
                    line = msgspec.json.decode(text, type=StreamEvent)
                    if line.type == "result":
                        return bytes(line.result)
                    self._record(line)
            raise parse_problem(self.arm.name, streamed.status, rest, None)

    def _record(self, line: StreamEvent) -> None:
        if line.type == "problem":
            raise remote_error(line.problem or Problem("", 500, "", "peer_protocol", False), self.arm.name)
        if line.type == "token":
            self.emitted.append(line.text)
            self.text = line.text if line.reset else self.text + line.text
        elif line.type == "progress":
            self.progress.append((line.progress, line.message))

    def _token(self, operation: str, without: Sequence[str]) -> str:
        """Return what the orchestrator would send: a token, and a grant of the closure of the arm's declarations."""
        house, arm = self._harness, self.arm
        scope = f"{arm.name}:{operation}"
        denied = ScopeSet(Scope(text) for text in without)
        asked = {call.scope: Scope(call.scope) for calls in house.declarations.values() for call in calls}
        lent = ScopeSet(wanted for wanted in asked.values() if not denied.allows(wanted))
        authority = preset_scopes("user", (*BUILT_IN_ARMS, arm.name)).intersection(ScopeSet((Scope(scope), *lent)))
        files = tuple(f"files:read:{digest}" for digest in house.records.files)
        may, missing = attenuate(scope, house.declarations, authority, bindings={"files:read": files})
        if missing:
            raise OctoError(f"The task lacks the authority for {', '.join(missing)}.", code="authority_missing")
        return house.minter.mint_access(
            Principal("user-1", "cred-1", "default"),
            arm.name,
            scope,
            CALL_SECONDS,
            task=TaskRef(_TASK, "s1", self._attempt, 1),
            delegation=may,
            holder_jkt=house.keys[arm.name].thumbprint,
        )


def _with_files(body: object, files: list[Any]) -> object:
    task = cast("dict[str, Any]", body)
    context: dict[str, Any] = dict(task.get("context") or {})
    return {**task, "context": {**context, "files": [*context.get("files", ()), *files]}}


@contextlib.asynccontextmanager
async def arm_test(
    arm: Arm,
    *,
    model: FakeModel | FakeAnswers = (),
    answers: Mapping[str, ScriptedAnswer] | None = None,
    max_tokens: int = 100_000,
    sockets: bool = False,
) -> AsyncGenerator[ArmHarness]:
    """Open a bench for ``arm``.

    ``model`` is what the model answers, in order, or a function of the request. ``answers`` is what other services
    answer, by scope: ``{"retriever:search": {"passages": []}}``; an ``OctoError`` is raised there, a function is
    given the decoded body. ``max_tokens`` is the task's budget, a word being a token. ``sockets`` serves everything
    on real sockets of this machine, slower and otherwise alike.
    """
    fake = model if isinstance(model, FakeModel) else FakeModel(model)
    script = ServiceScript(dict(answers or {}))
    scopes = scripted_scopes(arm.calls, script.answers)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client() if sockets else InMemoryHttp())
        house = Harness(http)
        house.records.tokens = max_tokens
        house.declarations = {**BUILT_IN_CALLS, **arm.declarations()}
        callees = sorted({scope.partition(":")[0] for scope in scopes} - {arm.name})
        for name in (arm.name, *callees):
            house.keys.setdefault(name, SigningKey.generate(name))
        await stack.enter_async_context(host_service(house, fake_orchestrator(house)))
        others = [scripted_service(house.base(name), script, scopes) for name in callees]
        callables = [
            host_service(house, fake_models_service(house, fake), lazy=True),
            *(host_service(house, other) for other in others),
        ]
        await stack.enter_async_context(enter_all([*callables, host_service(house, arm_service(house, arm))]))
        yield ArmHarness(arm, house, fake, script)


def run_arm(
    arm: Arm,
    operation: str,
    body: object,
    *,
    model: FakeModel | FakeAnswers = (),
    answers: Mapping[str, ScriptedAnswer] | None = None,
    files: Mapping[str, bytes | str] | None = None,
    without: Sequence[str] = (),
    max_tokens: int = 100_000,
) -> tuple[Any, ArmHarness]:
    """Call one operation on a bench of its own, without an event loop; return its answer and the bench."""

    async def run() -> tuple[Any, ArmHarness]:
        async with arm_test(arm, model=model, answers=answers, max_tokens=max_tokens) as lab:
            return await lab.call(operation, body, files=files, without=without), lab

    return asyncio.run(run())
