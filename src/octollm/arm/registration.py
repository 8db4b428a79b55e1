"""Registration of an arm with the orchestrator while it serves: register, heartbeat, deregister."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from octollm.arm.arm import Arm
from octollm.concurrency import BackgroundLoop, retry
from octollm.contracts.declarations import BodyT, DeclaredOperation
from octollm.contracts.enrolment import ArmRegistration, InstanceRef
from octollm.contracts.internal_operations import DEREGISTER_INSTANCE, RECORD_HEARTBEAT, REGISTER_INSTANCE
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline, retry_until
from octollm.rpc.client import CallTarget, OutgoingCall
from octollm.rpc.health import DependencyStatus
from octollm.rpc.http_client import TransportError
from octollm.rpc.service import ServiceBase

HEARTBEAT_SECONDS = 5.0
"""Interval of heartbeats. The orchestrator drops an instance after 20 s without one, so a few lost ones do no harm."""
REGISTER_SECONDS = 60.0
"""Time limit for the first registration, so that services can be started in any order."""
DEREGISTER_SECONDS = 0.5
"""Time limit for the deregistration during a drain. If it fails, the missing heartbeat has the same effect later."""
_CALL_SECONDS = 4.0
_RETRY_SECONDS = 0.5


class ArmRegistrar:
    """Registers one process of an arm. ``checkup`` is degraded while it is not registered."""

    def __init__(self, arm: Arm[Any], base: ServiceBase) -> None:
        self._arm = arm
        self._base = base
        self._instance = base.ids.hex()
        self._heartbeats = BackgroundLoop(
            f"heartbeat of {arm.name}",
            self._heartbeat,
            interval=HEARTBEAT_SECONDS,
            initial_delay=HEARTBEAT_SECONDS,
            log=base.log,
        )
        self._heartbeats.failure = "not registered yet"

    @contextlib.asynccontextmanager
    async def keep_registered(self) -> AsyncGenerator[None]:
        """Register, send heartbeats while the context is open, and deregister at its end.

        Raises the orchestrator's refusal, or the transport's error if it stays unavailable for 60 s.
        """
        deadline = Deadline.after(self._base.clock, REGISTER_SECONDS)
        await retry(self._register, retry_until(deadline, _RETRY_SECONDS, self._is_worth_waiting))
        self._heartbeats.report_success()
        try:
            async with self._heartbeats:
                yield
        finally:
            await self._deregister()

    async def checkup(self) -> DependencyStatus:
        """Return whether this process is registered."""
        return await self._heartbeats.check_health()

    def _is_worth_waiting(self, error: OctoError) -> bool:
        if not _is_transient(error):
            return False
        self._base.log.info("arm.waits", error=error)
        return True

    async def _heartbeat(self) -> None:
        try:
            await self._send(RECORD_HEARTBEAT, InstanceRef(self._instance), _CALL_SECONDS)
        except RemoteError as error:
            if error.code != "not_found":
                raise
            # The registration expired, or the orchestrator lost it.
            await self._register()

    async def _register(self) -> None:
        arm = self._arm
        registration = ArmRegistration(
            description=arm.description,
            operations=tuple(declared.name for declared in arm.operations),
            calls=arm.declared_calls,
            accepts=tuple(arm.accepts),
            url=self._base.url,
            instance=self._instance,
            # Either none or all: an operation that is missing here gets all calls of the arm.
            operation_calls={declared.name: declared.declared_calls for declared in arm.operations}
            if any(declared.has_own_calls for declared in arm.operations)
            else {},
            approval=arm.approval,
            about={declared.name: declared.summary for declared in arm.operations if declared.summary},
        )
        await self._send(REGISTER_INSTANCE, registration, _CALL_SECONDS)

    async def _deregister(self) -> None:
        with contextlib.suppress(OctoError):  # otherwise the registration expires
            await self._send(DEREGISTER_INSTANCE, InstanceRef(self._instance), DEREGISTER_SECONDS)

    async def _send(self, declared: DeclaredOperation[BodyT, Any], body: BodyT, seconds: float) -> None:
        call = OutgoingCall(
            CallTarget.of(declared),
            self._base.identity.signer().sign_token("orchestrator"),
            Deadline.after(self._base.clock, seconds),
            msgspec.json.encode(body),
        )
        await self._base.client.send(call)


def _is_transient(error: OctoError) -> bool:
    """Return whether waiting may help: the orchestrator is not up yet, or overloaded."""
    if isinstance(error, RemoteError):
        return error.retryable
    return isinstance(error, TransportError) or error.code in ("unavailable", "deadline_exceeded")
