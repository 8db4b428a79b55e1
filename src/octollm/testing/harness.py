"""The test harness for services, with no database.

The service under test runs beside a fake orchestrator, on real sockets with real tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from urllib.parse import unquote

import msgspec
from starlette.responses import Response

from octollm.capability import (
    BUILT_IN_CALLS,
    Declarations,
    DirectoryEntry,
    Principal,
    RootMinter,
    ScopeSet,
    SigningKey,
    TaskRef,
    attenuate,
    preset_scopes,
)
from octollm.capability.verification import Verifier
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts import internal_operations as internal
from octollm.contracts.auth import DirectoryResponse
from octollm.contracts.enrolment import ArmRegistration
from octollm.contracts.internal import (
    AuditEntry,
    ClaimBatch,
    ClaimRequest,
    ClaimResponse,
    ClaimResponseBatch,
    ClaimUpdateBatch,
    ReserveRequest,
    ReserveResponse,
    SettleRequest,
)
from octollm.contracts.operations import StoredFile
from octollm.contracts.problems import to_problem
from octollm.contracts.services import SERVICES, service_of
from octollm.contracts.task import MAX_FILE_BYTES, Usage
from octollm.errors import OctoError
from octollm.rpc.auth import ServiceAuthenticator
from octollm.rpc.call import IncomingCall, Operation, OperationResponse, implement
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import HttpClient, HttpResponse
from octollm.rpc.identity import ServiceIdentity
from octollm.rpc.service import Service, ServiceBase, build_base, build_service
from octollm.rpc.transport import listen

LOCAL = "127.0.0.1"


@dataclass(slots=True)
class OrchestratorRecords:
    """What the orchestrator of a test was asked for. ``tokens`` is the budget; ``reserve_error`` makes reserving fail.

    A reservation is made at once but answered only when ``reserve_event`` is set, if there is one.
    """

    tokens: int = 100_000
    reserve_error: OctoError | None = None
    reserve_event: asyncio.Event | None = None
    reserved: list[ReserveRequest] = field(default_factory=list[ReserveRequest])
    settled: list[SettleRequest] = field(default_factory=list[SettleRequest])
    journal: dict[str, bytes] = field(default_factory=dict[str, bytes])
    audit_error: OctoError | None = None
    audited: list[AuditEntry] = field(default_factory=list[AuditEntry])
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    arms: dict[str, ArmRegistration] = field(default_factory=dict[str, ArmRegistration])
    claims: dict[tuple[str, str, str], tuple[str, ClaimResponse]] = field(
        default_factory=dict[tuple[str, str, str], tuple[str, ClaimResponse]]
    )

    @property
    def used(self) -> Usage:
        """Return the usage that was settled so far."""
        total = Usage()
        for settled in self.settled:
            total = total + settled.usage
        return total


class _StaticDiscovery:
    """Discovery of what the test serves."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = urls

    def instances(self, service: str) -> tuple[str, ...]:
        """Return the service's URL; raise ``unavailable`` when the test serves none."""
        if service not in self._urls:
            raise OctoError(f"The test serves no {service}.", code="unavailable")
        return (self._urls[service],)


class Harness:
    """One test's services. Made by :func:`start_harness`."""

    def __init__(self, http: HttpClient) -> None:
        self.http = http
        self.clock = SystemClock()
        self.ids = Uuid7Generator(self.clock)
        self.keys = {name: SigningKey.generate(name) for name in SERVICES}
        self.root = SigningKey.generate("orchestrator")
        self.roots = {self.root.thumbprint: self.root.public}
        self.minter = RootMinter(self.root, self.clock, self.ids)
        self.records = OrchestratorRecords()
        self.urls: dict[str, str] = {}
        self.discovery = _StaticDiscovery(self.urls)
        self.declarations: Declarations = BUILT_IN_CALLS

    def base(self, name: str) -> ServiceBase:
        """Return what the service ``name`` is built on."""
        identity = ServiceIdentity(name, self.keys[name], self.roots, self.clock, self.ids)
        return build_base(identity, self.http, self.discovery, follow_revocations=False)

    @contextlib.asynccontextmanager
    async def serve(self, service_context: AbstractAsyncContextManager[Service]) -> AsyncGenerator[Service]:
        """Open a service and serve it on a free port of this machine."""
        async with service_context as service:
            bound = listen(LOCAL, 0, service.base.name)
            self.urls[service.base.name] = f"http://{LOCAL}:{bound.getsockname()[1]}"
            async with service.serve(bound):
                yield service

    def token(
        self,
        scope: str,
        *,
        aud: str | None = None,
        tenant: str = "default",
        sub: str = "user-1",
        task: str | None = "task-" + "0" * 32,
        authority: ScopeSet | None = None,
        lifetime: float = 300.0,
        call: str | None = None,
    ) -> str:
        """Return a bearer string for ``scope`` with a grant of all that its operation declares.

        ``authority`` cuts the grant; by default it is the preset ``user``.
        """
        audience = aud or service_of(scope.partition(":")[0])
        first = scope.split(" ", 1)[0]
        may, _missing = attenuate(first, self.declarations, authority or preset_scopes("user"))
        return self.minter.mint_access(
            Principal(sub, "cred-1", tenant),
            audience,
            scope,
            lifetime,
            task=None if task is None else TaskRef(task, "s1", 1, 1),
            delegation=may,
            holder_jkt=self.keys[audience].thumbprint,
            call=call,
        )

    async def send(
        self,
        service: str,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 60.0,
    ) -> HttpResponse:
        """Make a plain HTTP call, as any client would."""
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        encoded = body if isinstance(body, bytes) or body is None else msgspec.json.encode(body)
        if encoded is not None:
            sent.setdefault("Content-Type", "application/json")
        return await self.http.send(method, self.urls[service] + path, sent, encoded, seconds=seconds)


@contextlib.asynccontextmanager
async def start_harness(*arms: str) -> AsyncGenerator[Harness]:
    """Yield a harness with its orchestrator served; ``arms`` are known to it besides the built-in services."""
    async with Http1Client() as http:
        harness = Harness(http)
        harness.keys |= {name: SigningKey.generate(name) for name in arms}
        async with harness.serve(fake_orchestrator(harness)):
            yield harness


@contextlib.asynccontextmanager
async def fake_orchestrator(harness: Harness) -> AsyncGenerator[Service]:
    """Yield the test's orchestrator: it knows the services whose keys ``harness`` has at this moment."""
    directory = {name: DirectoryEntry((key.thumbprint,)) for name, key in harness.keys.items()}
    orchestrator = _FakeOrchestrator(harness, harness.minter.sign_directory(directory))
    base = harness.base("orchestrator")
    service = ServiceAuthenticator("orchestrator", lambda: directory, harness.clock)
    yield build_service(base, orchestrator.operations(), authenticators={"service": service})


class _FakeOrchestrator:
    """The operations of the test's orchestrator."""

    def __init__(self, harness: Harness, directory: str) -> None:
        self._harness = harness
        self._directory = directory
        self._verifiers: dict[str, Verifier] = {}

    def operations(self) -> list[Operation]:
        return [
            implement(internal.READ_DIRECTORY, self.directory),
            implement(internal.RESERVE_BUDGET, self.reserve),
            implement(internal.SETTLE_BUDGET, self.settle),
            implement(internal.REGISTER_INSTANCE, self.register),
            implement(internal.RECORD_HEARTBEAT, self.nothing),
            implement(internal.DEREGISTER_INSTANCE, self.nothing),
            implement(internal.RECORD_AUDIT, self.audit),
            implement(internal.CLAIM_KEYS, self.claim),
            implement(internal.RENEW_CLAIMS, self.nothing),
            implement(internal.COMPLETE_CLAIMS, self.complete),
            implement(internal.RELEASE_CLAIMS, self.release),
            Operation(
                "files.write", "POST", "/files", self.write, scope="files:write", body=bytes, max_body=MAX_FILE_BYTES
            ),
            Operation("files.read", "GET", "/files/{digest}", self.read, scope="files:read:{digest}"),
        ]

    async def directory(self, _call: IncomingCall, _body: object) -> DirectoryResponse:
        return DirectoryResponse(self._directory)

    async def reserve(self, call: IncomingCall, request: ReserveRequest) -> ReserveResponse:
        records = self._harness.records
        verified = self._verifier(call.peer).verify(request.bearer)
        records.reserved.append(request)
        if records.reserve_error is not None:
            raise records.reserve_error
        task = verified.task.task if verified.task is not None else ""
        if request.key in records.journal:
            return ReserveResponse("", 0, task, msgspec.Raw(records.journal[request.key]))
        left = records.tokens - records.used.total_tokens - request.prompt_tokens
        if left < 1:
            raise OctoError("The task's tokens are used up.", code="budget_exhausted")
        granted = left if request.max_completion_tokens is None else min(left, request.max_completion_tokens)
        number = len(records.reserved)
        if records.reserve_event is not None:
            await records.reserve_event.wait()
        return ReserveResponse(f"{number}:{request.key}", granted, task)

    async def settle(self, _call: IncomingCall, settled: SettleRequest) -> dict[str, object]:
        records = self._harness.records
        records.settled.append(settled)
        if bytes(settled.answer) != b"null":
            records.journal[settled.reservation.partition(":")[2]] = bytes(settled.answer)
        return {}

    async def register(self, call: IncomingCall, arm: ArmRegistration) -> dict[str, object]:
        self._harness.records.arms[call.peer] = arm
        return {}

    async def audit(self, call: IncomingCall, entry: AuditEntry) -> dict[str, object]:
        self._verifier(call.peer).verify(entry.bearer)
        if self._harness.records.audit_error is not None:
            raise self._harness.records.audit_error
        self._harness.records.audited.append(entry)
        return {}

    async def claim(self, call: IncomingCall, batch: ClaimBatch) -> ClaimResponseBatch:
        return ClaimResponseBatch(tuple(self._claimed(call.peer, claim) for claim in batch.claims))

    def _claimed(self, peer: str, request: ClaimRequest) -> ClaimResponse:
        try:
            self._verifier(peer).verify(request.bearer)
        except OctoError as error:
            return ClaimResponse("refused", problem=to_problem(error))
        place = (peer, request.operation, request.key)
        claims = self._harness.records.claims
        if place not in claims:
            claims[place] = (request.body_digest, ClaimResponse("in_flight"))
            return ClaimResponse("claimed", run=1)
        digest, answer = claims[place]
        return answer if digest == request.body_digest else ClaimResponse("conflict")

    async def complete(self, call: IncomingCall, body: ClaimUpdateBatch) -> dict[str, object]:
        for update in body.updates:
            place = (call.peer, update.operation, update.key)
            digest, _ = self._harness.records.claims[place]
            stored = ClaimResponse("stored", update.run, update.status, update.answer, update.headers)
            self._harness.records.claims[place] = (digest, stored)
        return {}

    async def release(self, call: IncomingCall, body: ClaimUpdateBatch) -> dict[str, object]:
        for update in body.updates:
            self._harness.records.claims.pop((call.peer, update.operation, update.key), None)
        return {}

    async def nothing(self, _call: IncomingCall, _body: object) -> dict[str, object]:
        return {}

    async def write(self, call: IncomingCall, body: bytes) -> OperationResponse:
        digest = hashlib.sha256(body).hexdigest()
        self._harness.records.files[digest] = body
        name = unquote(call.request.headers.get("x-file-name", "file"))
        kind = call.request.headers.get("content-type", "application/octet-stream")
        return OperationResponse(StoredFile(name, digest, len(body), kind), 201, {"Location": f"/files/{digest}"})

    async def read(self, call: IncomingCall, _body: object) -> Response:
        body = self._harness.records.files.get(call.path["digest"])
        if body is None:
            raise OctoError("There is no file of that digest.", code="file_not_found")
        return Response(body, media_type="application/octet-stream")

    def _verifier(self, audience: str) -> Verifier:
        verifier = self._verifiers.get(audience)
        if verifier is None:
            verifier = self._verifiers[audience] = Verifier(audience, self._harness.roots, self._harness.clock)
        return verifier
