"""Arms over HTTP: join secrets, joining, being there, and what users see of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from octollm.contracts.api import ArmList, ArmRegistration, Done
from octollm.contracts.joining import (
    InstanceRef,
    JoinAnswer,
    JoinList,
    JoinNonce,
    JoinRequest,
    KeyRotation,
    NewJoin,
    NewJoinRequest,
)
from octollm.rpc.call import About, Call, Operation
from octollm.services.orchestrator.audit import actor_of
from octollm.services.orchestrator.joining import Asker, Joining
from octollm.services.orchestrator.joins import Joins
from octollm.services.orchestrator.presence import Presence
from octollm.services.orchestrator.registry import Registry

MAX_JOIN_BODY = 16 * 1024
"""Bytes of what is sent by somebody who is not known yet."""
MAX_ARM_BODY = 128 * 1024


@dataclass(frozen=True, slots=True)
class ArmsApi:
    """What these operations work with."""

    registry: Registry
    presence: Presence
    joins: Joins
    joining: Joining

    async def arms(self, call: Call, _body: object) -> ArmList:
        """Return the arms."""
        return await self.registry.views(call.tenant)

    async def remove(self, call: Call, _body: object) -> Done:
        """Remove an arm of one's own."""
        await self.joining.remove(call.path["name"], actor_of(call))
        return Done()

    async def create_join(self, call: Call, body: NewJoinRequest) -> NewJoin:
        """Make a join secret."""
        return await self.joins.create(body, actor_of(call))

    async def list_joins(self, call: Call, _body: object) -> JoinList:
        """Return the join secrets, without what is secret of them."""
        return await self.joins.list(call.tenant)

    async def revoke_join(self, call: Call, _body: object) -> Done:
        """Revoke a join secret."""
        await self.joins.revoke(call.path["join_id"], actor_of(call))
        return Done()

    async def nonce(self, _call: Call, _body: object) -> JoinNonce:
        """Return what a join has to name."""
        return self.joining.nonce()

    async def join(self, call: Call, body: JoinRequest) -> JoinAnswer:
        """Admit an arm by its proof."""
        return await self.joining.join(body, _asker(call))

    async def rotate(self, call: Call, body: KeyRotation) -> Done:
        """Add a key of the arm that asks."""
        await self.joining.rotate(call.peer, body, _asker(call))
        return Done()

    async def register(self, call: Call, body: ArmRegistration) -> Done:
        """Note that a process of an arm is up."""
        await self.presence.register(call.peer, body)
        return Done()

    async def heartbeat(self, call: Call, body: InstanceRef) -> Done:
        """Note that a process of an arm is still there."""
        await self.presence.heartbeat(call.peer, body.instance)
        return Done()

    async def leave(self, call: Call, body: InstanceRef) -> Done:
        """Forget a process of an arm."""
        await self.presence.leave(call.peer, body.instance)
        return Done()

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [*self._for_users(), *self._for_arms()]

    def _for_users(self) -> list[Operation]:
        return [
            Operation(
                "arms.list",
                "GET",
                "/arms",
                self.arms,
                scope="arms:read",
                answer=ArmList,
                cacheable=True,
                summary="The arms.",
            ),
            Operation(
                "arms.remove",
                "DELETE",
                "/arms/{name}",
                self.remove,
                scope="arms:write",
                answer=Done,
                summary="Remove an arm of one's own, and free its name.",
                about=About(codes=("arm_unknown",)),
            ),
            Operation(
                "joins.list",
                "GET",
                "/joins",
                self.list_joins,
                scope="keys:read",
                answer=JoinList,
                summary="Join secrets.",
            ),
            Operation(
                "joins.create",
                "POST",
                "/joins",
                self.create_join,
                scope="keys:write",
                body=NewJoinRequest,
                answer=NewJoin,
                status=201,
                strict=True,
                summary="Make a join secret; it is shown once.",
                about=About(codes=("authority_missing", "invalid_parameter", "state_conflict")),
            ),
            Operation(
                "joins.revoke",
                "DELETE",
                "/joins/{join_id}",
                self.revoke_join,
                scope="keys:write",
                answer=Done,
                summary="Revoke a join secret.",
                about=About(codes=("not_found",)),
            ),
        ]

    def _for_arms(self) -> list[Operation]:
        refused = ("authority_missing", "state_conflict")

        def post(
            path: str, handler: Callable[[Call, Any], Awaitable[object]], body: object, summary: str, *codes: str
        ) -> Operation:
            # A repeat of any of these changes nothing more.
            name = path.removeprefix("/").replace("/", ".")
            return Operation(
                name,
                "POST",
                path,
                handler,
                auth="service",
                scope="*",
                body=body,
                answer=Done,
                max_body=MAX_ARM_BODY,
                summary=summary,
                about=About(codes=codes),
            )

        return [
            Operation(
                "arms.nonce",
                "POST",
                "/arms/nonce",
                self.nonce,
                auth="public",
                answer=JoinNonce,
                max_body=0,
                summary="A nonce to join with.",
            ),
            Operation(
                "arms.join",
                "POST",
                "/arms/join",
                self.join,
                auth="public",
                body=JoinRequest,
                answer=JoinAnswer,
                max_body=MAX_JOIN_BODY,
                timeout=20.0,
                summary="Join by the proof of a join secret.",
                about=About(codes=("join_refused", "rate_limited", "state_conflict")),
            ),
            post("/arms/keys", self.rotate, KeyRotation, "Bring a new key, in the name of an old one.", *refused),
            post("/arms/register", self.register, ArmRegistration, "Register a process of an arm.", *refused),
            post("/arms/heartbeat", self.heartbeat, InstanceRef, "Say that a process is still there.", "not_found"),
            post("/arms/leave", self.leave, InstanceRef, "Say that a process of an arm ends."),
        ]


def _asker(call: Call) -> Asker:
    client = call.request.client
    return Asker(client.host if client is not None else "", call.request_id, call.correlation_id)
