"""What an operation of an arm works with: calls with narrowed authority, the model, files, and live output."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar, overload
from urllib.parse import quote

from octollm.arm.artifacts import Artifacts
from octollm.arm.model import ModelClient, ModelEndpoint
from octollm.capability import Delegator, Scope
from octollm.contracts.services import route_of, service_of
from octollm.contracts.task import TaskContract
from octollm.errors import OctoError
from octollm.resilience import Deadline, OutageRetry
from octollm.rpc.call import IncomingCall
from octollm.rpc.caller import CallTarget, OutgoingCall
from octollm.rpc.idempotency import NestedKeys
from octollm.rpc.lines import OnEvent
from octollm.rpc.service import ServiceBase
from octollm.rpc.shapes import encode
from octollm.telemetry import Logger

T = TypeVar("T")

CALL_SECONDS = 60.0
"""The life of a token made for one call; it is checked when the call begins."""
MIN_ENDPOINT_SECONDS = 1.0
OUTAGE_RETRY = OutageRetry(15.0)
"""An arm's calls wait so long for a service that is away: its work so far is worth more than the wait."""


class Context:
    """One call of an arm's operation.

    ``check_model`` asks the language model, ``artifacts`` reads and writes files, ``task`` is the task that the call was
    given (``None`` where its body is something else).
    """

    def __init__(
        self,
        base: ServiceBase,
        delegator: Delegator,
        call: IncomingCall,
        declared: tuple[Scope, ...],
        body: object = None,
    ) -> None:
        self._base = base
        self._delegator = delegator
        self._call = call
        self._declared = declared
        self._keys = NestedKeys(call.key or call.request_id)
        self.task = body if isinstance(body, TaskContract) else None
        self.artifacts = Artifacts(base.client, self.prepare_call)
        self.model = ModelClient(base.client, lambda body: self.prepare_call("models", "chat", body), self._endpoint)

    @property
    def deadline(self) -> Deadline:
        """Return the time that is left."""
        return self._call.deadline

    @property
    def task_id(self) -> str:
        """Return the task that the caller's token stands for; empty when it stands for none."""
        task = self._call.authority.task
        return (task.task or "") if task is not None else ""

    @property
    def log(self) -> Logger:
        """Return the arm's log; lines carry the ids of this call."""
        return self._base.log

    async def emit(self, text: str, *, reset: bool = False) -> None:
        """Stream text to whoever watches the step; ``reset`` voids what was streamed before."""
        await self._call.emit.token(text, reset=reset)

    async def progress(self, percent: float, message: str = "") -> None:
        """Tell how far the work is, from 0 to 100."""
        await self._call.emit.progress(percent, message)

    def allows(self, scope: str) -> bool:
        """Say whether the grant of this call lets the arm call ``scope``: asked before an optional call."""
        grant = self._call.authority.grant
        return grant is not None and grant.may.subtree(Scope(scope)) is not None

    @overload
    async def call(self, service: str, operation: str, body: object, *, on_event: OnEvent | None = None) -> Any: ...

    @overload
    async def call(
        self, service: str, operation: str, body: object, answer: type[T], *, on_event: OnEvent | None = None
    ) -> T: ...

    async def call(
        self, service: str, operation: str, body: object, answer: Any = Any, *, on_event: OnEvent | None = None
    ) -> Any:
        """Call another service's operation with narrowed authority, this call's deadline and trace.

        ``body`` is anything that JSON stands for. Without ``answer``, the type of what comes back, it is decoded
        JSON. ``on_event`` is given what the callee tells while it works. Raises ``authority_missing`` when the arm
        does not declare the call or the caller's authority does not cover it, and what the callee says.
        """
        outgoing = await self.prepare_call(service, operation, encode(body))
        return await self._base.client.call(outgoing, answer, on_event=on_event)

    async def prepare_call(self, service: str, operation: str, body: bytes | None, **path: str) -> OutgoingCall:
        """Return a call ready to be made: authority, key and route. ``path`` parameters become selectors.

        Raises ``authority_missing``.
        """
        route = route_of(service, operation)
        audience = service_of(service)
        bearer = await self._bearer(":".join((service, operation, *path.values())), CALL_SECONDS)
        key = None
        if route.kind != "read_only":
            key = self._keys.next(audience, operation, body or b"")
        filled = route.path.format(**{name: quote(value, safe="") for name, value in path.items()})
        return OutgoingCall(
            CallTarget(audience, f"{service}.{operation}", route.method, filled, route.kind),
            bearer,
            self.deadline,
            body,
            key,
            outage_retry=OUTAGE_RETRY,
        )

    async def _endpoint(self) -> ModelEndpoint:
        """Return where any OpenAI client finds the models, with a key that lives as long as this call may."""
        bearer = await self._bearer("models:chat", max(MIN_ENDPOINT_SECONDS, self.deadline.remaining()))
        headers = {
            "X-Correlation-ID": self._call.correlation_id,
            "traceparent": self._call.trace.traceparent,
            "X-Timeout-Ms": self.deadline.to_header(),
        }
        return ModelEndpoint(self._base.discovery.instances("models")[0] + "/v1", bearer, headers)

    async def _bearer(self, scope: str, lifetime: float) -> str:
        wanted = Scope(scope)
        if not any(declared.contains(wanted) for declared in self._declared):
            raise OctoError(
                f"{self._base.name} does not declare the call {wanted.operation}: write "
                f'calls=["{wanted.operation}"] in its Arm.',
                code="authority_missing",
            )
        audience = service_of(wanted.family)
        return self._delegator.delegate(
            self._call.authority,
            aud=audience,
            scope=scope,
            holder_jkt=await self._base.directory.thumbprint(audience),
            lifetime=lifetime,
            call=hashlib.sha256((self._call.key or self._call.request_id).encode()).hexdigest(),
        )
