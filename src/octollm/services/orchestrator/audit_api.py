"""The audit log over HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from octollm.contracts.audit import AuditPage
from octollm.contracts.listing import AuditQuery
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.services.orchestrator.accounts import LOCAL_TENANT
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.services.orchestrator.sealing import read_audit_page
from octollm.storage import Database


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
