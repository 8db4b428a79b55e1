"""API keys over HTTP, and the honest answers of what is not configured."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.clock import Clock
from octollm.contracts.api import Acknowledgement, KeyList, KeyRequest, NewKey
from octollm.contracts.revocations import RevocationRequest
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.audit import actor_from_call, record_audit
from octollm.services.orchestrator.cancelling import TaskCanceller
from octollm.services.orchestrator.revoking import RevocationStore
from octollm.storage import Database

NOT_CONFIGURED = (
    ("GET", "/webhooks", "webhooks:read", "Webhooks"),
    ("POST", "/webhooks", "webhooks:write", "Webhooks"),
    ("GET", "/dead-letters", "events:read", "Durable subscriptions and their dead letters"),
    ("POST", "/tasks/{task_id}/approval", "tasks:approve", "Approval by a person"),
)


@dataclass(frozen=True, slots=True)
class AdminApi:
    """What these operations work with."""

    db: Database
    accounts: Accounts
    revocation_store: RevocationStore
    canceller: TaskCanceller
    clock: Clock

    async def list_keys(self, call: IncomingCall, _body: object) -> KeyList:
        """Return the tenant's keys."""
        return await self.accounts.list(call.tenant)

    async def create_key(self, call: IncomingCall, body: KeyRequest) -> NewKey:
        """Make a key."""
        if not 0 < len(body.name) <= 100:
            raise OctoError("A key needs a name of 1 to 100 characters.", code="invalid_body")
        return await self.accounts.create(body.name, body.scope, actor_from_call(call), body.tenant)

    async def revoke_key(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Revoke a key and what was issued for it, and cancel the tasks that were submitted with it."""
        key_id, actor = call.path["key_id"], actor_from_call(call)
        async with self.db.transaction() as tx:
            await self.accounts.revoke(key_id, actor, tx)
            await self.revocation_store.add(tx, "cred", key_id, call.tenant)
        await self.canceller.cancel_all(actor, "The API key that it was submitted with was revoked.", cred=key_id)
        return Acknowledgement()

    async def revoke(self, call: IncomingCall, body: RevocationRequest) -> Acknowledgement:
        """Revoke a token, or what a principal (whose tasks end) or a service was lent; each may be lent anew."""
        actor = actor_from_call(call)
        async with self.db.transaction() as tx:
            await self.revocation_store.add(tx, body.kind, body.value, call.tenant)
            await record_audit(tx, actor, "token.revoked", body.value, self.clock.now(), {"kind": body.kind})
        if body.kind == "sub":
            await self.canceller.cancel_all(actor, "Its principal was revoked.", sub=body.value)
        return Acknowledgement()

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [
            Operation(
                "keys.list", "GET", "/keys", self.list_keys, scope="keys:read", response=KeyList, summary="API keys."
            ),
            Operation(
                "keys.create",
                "POST",
                "/keys",
                self.create_key,
                scope="keys:write",
                body=KeyRequest,
                response=NewKey,
                status=201,
                strict=True,
                summary="Make an API key; its secret is shown once.",
                docs=OperationDocs(error_codes=("invalid_parameter", "authority_missing")),
            ),
            Operation(
                "keys.revoke",
                "DELETE",
                "/keys/{key_id}",
                self.revoke_key,
                scope="keys:write",
                response=Acknowledgement,
                summary="Revoke an API key.",
                docs=OperationDocs(error_codes=("not_found_result",)),
            ),
            Operation(
                "revocations.create",
                "POST",
                "/revocations",
                self.revoke,
                scope="keys:write",
                body=RevocationRequest,
                response=Acknowledgement,
                strict=True,
                summary="Revoke a token, or what a principal or a service was lent.",
            ),
            *(_unconfigured_operation(*row) for row in NOT_CONFIGURED),
        ]


def _unconfigured_operation(method: str, path: str, scope: str, what: str) -> Operation:
    async def refuse(_call: IncomingCall, _body: object) -> object:
        raise OctoError(f"{what}: not configured here.", code="not_configured")

    name = path.strip("/").replace("/", ".").replace("{", "").replace("}", "")
    about = OperationDocs(error_codes=("not_configured",))
    summary = f"{what} (not configured)."
    return Operation(f"{name}.{method.lower()}", method, path, refuse, scope=scope, summary=summary, docs=about)
