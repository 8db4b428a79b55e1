"""Administration over HTTP: API keys, revocations and the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.clock import Clock
from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement, AuditQuery
from octollm.contracts.auth import KeyList, KeyRequest, NewKey, RevocationRequest
from octollm.contracts.observability import AuditPage
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.idempotency import IdempotencyKey
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.accounts import LOCAL_TENANT, Accounts
from octollm.services.orchestrator.audit import SYSTEM_TENANT, actor_from_call, read_audit_page, record_audit
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.schedules import SchedulesApi
from octollm.services.orchestrator.task_endings import TaskCanceller
from octollm.storage import Database


@dataclass(frozen=True, slots=True)
class AdminApi:
    """The operations of administration."""

    db: Database
    accounts: Accounts
    revocation_store: RevocationStore
    canceller: TaskCanceller
    schedules: SchedulesApi
    idempotency: SqlIdempotencyStore
    clock: Clock

    async def list_keys(self, call: IncomingCall, _body: object) -> KeyList:
        """Return the tenant's keys."""
        return await self.accounts.list(call.tenant)

    async def create_key(self, call: IncomingCall, body: KeyRequest) -> NewKey:
        """Create a key. The response holds its secret."""
        if not 0 < len(body.name) <= 100:
            raise OctoError("A key needs a name of 1 to 100 characters.", code="invalid_body")
        return await self.accounts.create(body.name, body.scope, actor_from_call(call), body.tenant)

    async def revoke_key(self, call: IncomingCall, _body: object) -> Acknowledgement:
        """Revoke a key and everything issued for it, and cancel the tasks submitted with it."""
        key_id, actor, key = call.path["key_id"], actor_from_call(call), IdempotencyKey.of(call)
        if not await self.idempotency.find_effect(key):
            async with self.db.transaction() as tx:
                # One transaction: a crash leaves no revoked key whose tokens are still valid.
                await self.accounts.revoke(key_id, actor, tx)
                await self.revocation_store.add(tx, "cred", key_id, call.tenant)
                await self.schedules.end_all(
                    tx, actor, "The API key that it was created with was revoked.", cred=key_id
                )
                await self.idempotency.record_effect(tx, key, "revoked")
        # After the commit: the revoked key submits no further task while its open ones are cancelled.
        await self.canceller.cancel_all(actor, "The API key that it was submitted with was revoked.", cred=key_id)
        return Acknowledgement()

    async def revoke(self, call: IncomingCall, body: RevocationRequest) -> Acknowledgement:
        """Revoke a token, or every grant of a principal (and cancel its tasks) or of a service, issued until now."""
        actor = actor_from_call(call)
        async with self.db.transaction() as tx:
            await self.revocation_store.add(tx, body.kind, body.value, call.tenant)
            await record_audit(tx, actor, "token.revoked", body.value, self.clock.now(), {"kind": body.kind})
            if body.kind == "sub":
                await self.schedules.end_all(tx, actor, "Its principal was revoked.", sub=body.value)
        if body.kind == "sub":
            await self.canceller.cancel_all(actor, "Its principal was revoked.", sub=body.value)
        return Acknowledgement()

    async def read_audit(self, call: IncomingCall, _body: object) -> AuditPage:
        """Return a page of the audit log and the head of its hash chain."""
        query: AuditQuery = call.query
        tenant = call.tenant
        if query.of == "system":
            if tenant != LOCAL_TENANT:
                raise OctoError("Only the local tenant may read the system's audit log.", code="scope_missing")
            tenant = SYSTEM_TENANT
        return await read_audit_page(self.db, tenant, query.after, query.limit)

    def operations(self) -> list[Operation]:
        """Return these operations."""
        return [
            implement(public_api.LIST_KEYS, self.list_keys),
            implement(public_api.CREATE_KEY, self.create_key),
            implement(public_api.REVOKE_KEY, self.revoke_key),
            implement(public_api.REVOKE_AUTHORITY, self.revoke),
            implement(public_api.READ_AUDIT_LOG, self.read_audit),
        ]
