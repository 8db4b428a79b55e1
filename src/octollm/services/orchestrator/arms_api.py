"""Arms over HTTP: enrolment tokens, enrolment, registration and heartbeats, and the list of arms."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.contracts import internal_operations as internal
from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement
from octollm.contracts.enrolment import (
    ArmList,
    ArmRegistration,
    EnrolmentNonce,
    EnrolmentRequest,
    EnrolmentResponse,
    EnrolmentTokenList,
    EnrolmentTokenRequest,
    InstanceRef,
    KeyRotation,
    NewEnrolmentToken,
)
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.idempotency import IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.audit import actor_from_call
from octollm.services.orchestrator.enrolment import EnrolmentAuthority, EnrolmentTokens, Requester
from octollm.services.orchestrator.instances import InstanceRegistry
from octollm.services.orchestrator.registry import ServiceRegistry

ENROLMENT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ArmsApi:
    """The operations on arms."""

    registry: ServiceRegistry
    instances: InstanceRegistry
    enrolment_tokens: EnrolmentTokens
    enrolment: EnrolmentAuthority
    idempotency: SqlIdempotencyStore

    async def list_arms(self, call: IncomingCall, _body: object) -> ArmList:
        """Return the arms that the tenant's users may call."""
        return await self.registry.list_arm_views(call.tenant)

    async def remove(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Remove an enrolled arm."""
        key = IdempotencyKey.of(call)
        if not await self.idempotency.find_effect(key):
            await self.enrolment.remove(
                call.path["name"],
                actor_from_call(call),
                hook=lambda tx: self.idempotency.record_effect(tx, key, "removed"),
            )
        return Acknowledgement()

    async def create_enrolment_token(self, call: IncomingCall, body: EnrolmentTokenRequest) -> NewEnrolmentToken:
        """Create an enrolment token. The response holds it."""
        return await self.enrolment_tokens.create(body, actor_from_call(call))

    async def list_enrolment_tokens(self, call: IncomingCall, _body: object) -> EnrolmentTokenList:
        """Return the enrolment tokens, without their secrets."""
        return await self.enrolment_tokens.list(call.tenant)

    async def revoke_enrolment_token(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Revoke an enrolment token."""
        key = IdempotencyKey.of(call)
        if not await self.idempotency.find_effect(key):
            await self.enrolment_tokens.revoke(
                call.path["join_id"],
                actor_from_call(call),
                hook=lambda tx: self.idempotency.record_effect(tx, key, "revoked"),
            )
        return Acknowledgement()

    async def issue_nonce(self, _call: IncomingCall, _body: object) -> EnrolmentNonce:
        """Return a nonce for an enrolment."""
        return self.enrolment.issue_nonce()

    async def enrol(self, call: IncomingCall, body: EnrolmentRequest) -> EnrolmentResponse:
        """Admit an arm by its proof."""
        return await self.enrolment.enrol(body, _requester_from_call(call))

    async def rotate_key(self, call: IncomingCall, body: KeyRotation) -> Acknowledgement:
        """Add a key of the calling arm."""
        await self.enrolment.rotate_key(call.peer, body, _requester_from_call(call))
        return Acknowledgement()

    async def register(self, call: IncomingCall, body: ArmRegistration) -> Acknowledgement:
        """Register an instance of the calling arm."""
        await self.instances.register(call.peer, body)
        return Acknowledgement()

    async def heartbeat(self, call: IncomingCall, body: InstanceRef) -> Acknowledgement:
        """Record a heartbeat of an instance."""
        await self.instances.heartbeat(call.peer, body.instance)
        return Acknowledgement()

    async def deregister(self, call: IncomingCall, body: InstanceRef) -> Acknowledgement:
        """Remove an instance that shuts down."""
        await self.instances.deregister(call.peer, body.instance)
        return Acknowledgement()

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(public_api.LIST_ARMS, self.list_arms),
            implement(public_api.REMOVE_ARM, self.remove),
            implement(public_api.LIST_ENROLMENT_TOKENS, self.list_enrolment_tokens),
            implement(public_api.CREATE_ENROLMENT_TOKEN, self.create_enrolment_token),
            implement(public_api.REVOKE_ENROLMENT_TOKEN, self.revoke_enrolment_token),
            implement(internal.ISSUE_NONCE, self.issue_nonce, strict=False),
            implement(internal.ENROL_ARM, self.enrol, strict=False, timeout=ENROLMENT_SECONDS),
            implement(internal.ROTATE_ARM_KEY, self.rotate_key),
            implement(internal.REGISTER_INSTANCE, self.register),
            implement(internal.RECORD_HEARTBEAT, self.heartbeat),
            implement(internal.DEREGISTER_INSTANCE, self.deregister),
        ]


def _requester_from_call(call: IncomingCall) -> Requester:
    client = call.request.client
    return Requester(client.host if client is not None else "", call.request_id, call.correlation_id)
