"""The services that an arm calls, with scripted answers, held to the contracts of the real ones."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octollm.contracts.service_operations import SERVICE_OPERATIONS, route_of
from octollm.contracts.services import service_of
from octollm.contracts.task import ExecuteResult, Task
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.codec import convert, decode, encode
from octollm.rpc.service import Service, ServiceBase, build_service

ScriptedAnswer = object
"""What a call is answered: anything that JSON stands for, an ``OctoError``, or a function of the decoded body."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call that the arm made: its scope, e.g. ``retriever:search``, and its body as decoded JSON."""

    scope: str
    body: Any


@dataclass(slots=True)
class ServiceScript:
    """What the arm's calls are answered, and what it called. ``faults`` are the test's own."""

    answers: Mapping[str, ScriptedAnswer]
    calls: list[RecordedCall] = field(default_factory=list[RecordedCall])
    faults: list[str] = field(default_factory=list[str])

    def operation(self, scope: str) -> Operation:
        """Return the operation that answers ``scope``."""
        service, _, name = scope.partition(":")
        route = route_of(service, name)

        async def handle(call: IncomingCall, _body: object) -> object:
            return await self._answer(scope, call.body)

        return Operation(
            f"{service}.{name}", route.method, route.path, handle, scope=scope, kind=route.kind, body=bytes
        )

    async def _answer(self, scope: str, body: bytes) -> object:
        wanted, given = _operation_types(scope)
        decode(body, wanted)  # raises what the real service would answer
        value: Any = msgspec.json.decode(body)
        self.calls.append(RecordedCall(scope, value))
        if scope not in self.answers:
            raise self._fault(f"The arm called {scope}, and the test has no answer for it: answers={{{scope!r}: …}}.")
        answer = self.answers[scope]
        if callable(answer):
            answer = answer(value)
            if inspect.isawaitable(answer):
                answer = await answer
        if isinstance(answer, OctoError):
            raise answer
        try:
            convert(msgspec.json.decode(encode(answer)), given)
        except msgspec.ValidationError as error:
            raise self._fault(f"The test's answer for {scope} is none that the real {scope} gives: {error}") from error
        return answer

    def _fault(self, text: str) -> OctoError:
        self.faults.append(text)
        return OctoError(text, code="peer_protocol")


def _operation_types(scope: str) -> tuple[Any, Any]:
    if scope.endswith(":execute"):
        return Task, ExecuteResult
    declared = SERVICE_OPERATIONS.get(scope)
    if declared is None or declared.body is msgspec.Raw:
        return Any, Any
    return declared.body, declared.response


def scripted_scopes(declared: Iterable[str], answers: Mapping[str, ScriptedAnswer]) -> set[str]:
    """Return the operations to be served: those that the arm declares, and those that have an answer."""
    found = {":".join(scope.split(":", 2)[:2]) for scope in (*declared, *answers)}
    for scope in [scope for scope in found if scope.endswith(":*")]:
        found.discard(scope)
        found |= {declared.id for declared in SERVICE_OPERATIONS if declared.id.startswith(scope[:-1])}
    return {scope for scope in found if service_of(scope.partition(":")[0]) not in ("orchestrator", "models")}


@contextlib.asynccontextmanager
async def scripted_service(base: ServiceBase, script: ServiceScript, scopes: set[str]) -> AsyncGenerator[Service]:
    """Yield the service ``base.name`` with its operations among ``scopes``."""
    mine = sorted(scope for scope in scopes if scope.partition(":")[0] == base.name)
    yield build_service(base, [script.operation(scope) for scope in mine])
