"""Administration over HTTP: API keys, revocations, the audit log, and explicit refusals for features that are not configured."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.clock import Clock
from octollm.contracts.api import Acknowledgement, AuditQuery, KeyList, KeyRequest, NewKey
from octollm.contracts.auth import RevocationRequest
from octollm.contracts.observability import AuditPage
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.services.orchestrator.accounts import LOCAL_TENANT, Accounts
from octollm.services.orchestrator.audit import SYSTEM_TENANT, actor_from_call, read_audit_page, record_audit
from octollm.services.orchestrator.revocation import RevocationStore, TaskCanceller
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
                docs=OperationDocs(error_codes=("not_found",)),
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


@dataclass(frozen=True, slots=True)
class AuditApi:
    """What the operation on the audit log works with."""

    db: Database

    async def read(self, call: IncomingCall, _body: object) -> AuditPage:
        """Return a page of the log, with where its chain stands."""
        asked: AuditQuery = call.query
        tenant = call.tenant
        if asked.of == "system":
            if tenant != LOCAL_TENANT:
                raise OctoError("The system's audit log is not this tenant's to read.", code="scope_missing")
            tenant = SYSTEM_TENANT
        return await read_audit_page(self.db, tenant, asked.after, asked.limit)

    def operations(self) -> list[Operation]:
        """Return the operation."""
        return [
            Operation(
                "audit.read",
                "GET",
                "/audit",
                self.read,
                scope="audit:read",
                query=AuditQuery,
                response=AuditPage,
                summary="The audit log behind a row.",
                docs=OperationDocs(error_codes=("scope_missing",)),
            )
        ]
