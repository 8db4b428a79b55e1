"""Tokens over HTTP: token exchange (RFC 8693), browser sessions, tokens for direct calls.

The signed directory of services and the stream of revocations are here as well: both are what a verifier of tokens
needs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.responses import StreamingResponse

from octollm.capability import Principal, RootMinter, ScopeSet, TaskRef, attenuate, parse_delegation_tree, union
from octollm.capability.inspection import read_chain
from octollm.capability.keyring import KeyRing, TrustedRoots
from octollm.clock import Clock, IdGenerator
from octollm.contracts import internal_operations as internal
from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement
from octollm.contracts.auth import (
    SESSION_LIFETIME_SECONDS,
    SESSION_TOKEN_PREFIX,
    CreateSessionRequest,
    DirectoryResponse,
    EndSessionRequest,
    IssuerList,
    SessionResponse,
    TokenExchangeRequest,
    TokenRequest,
    TokenResponse,
)
from octollm.contracts.services import service_of
from octollm.contracts.stream import NDJSON
from octollm.contracts.task import Budget, Task
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.services.orchestrator.accounts import Account, Accounts
from octollm.services.orchestrator.audit import SYSTEM_TENANT, Actor, actor_from_call, record_audit
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.sessions import SessionStore
from octollm.storage import Database, Transaction
from octollm.tasks.changes import NewTask
from octollm.tasks.store import TaskStore

ACCESS_TOKEN_SECONDS = 300
MAX_DIRECT_TOKEN_SECONDS = 3600
NO_OPERATION = ScopeSet.parse("orchestrator:none")
"""A scope that no operation has."""


@dataclass(frozen=True, slots=True)
class TokensApi:
    """The operations on tokens."""

    db: Database
    accounts: Accounts
    sessions: SessionStore
    registry: ServiceRegistry
    revocation_store: RevocationStore
    minter: RootMinter
    store: TaskStore
    max_tokens: int
    clock: Clock
    ids: IdGenerator
    draining: asyncio.Event
    ring: KeyRing
    roots: TrustedRoots

    async def exchange(self, call: IncomingCall, body: TokenExchangeRequest) -> TokenResponse:
        """Exchange an API key, a login or a session for an access token of a service (RFC 8693)."""
        session_id = ""
        try:
            if body.subject_token.startswith(SESSION_TOKEN_PREFIX):
                session_id, cred = await self.sessions.find_credential(body.subject_token)
                account = await self.accounts.find_by_credential(cred)
            else:
                account = await self.accounts.authenticate(body.subject_token)
        except OctoError:
            await self._audit_refusal(call)
            raise
        scopes = account.scopes.owned_by(body.audience)
        if not len(scopes) and body.audience != "orchestrator":
            raise OctoError(f"The credential has no scope of {body.audience}.", code="authority_missing")
        # The gateway authenticates every caller here, also one whose scopes are all of another service.
        minted = scopes if len(scopes) else NO_OPERATION
        token = self.minter.mint_access(account.principal, body.audience, minted, ACCESS_TOKEN_SECONDS)
        if session_id:
            # Recorded, so that the end of the session revokes it.
            try:
                await self.sessions.add_token(session_id, read_chain(token).access.claims.jti)
            except OctoError:
                await self._audit_refusal(call)
                raise
        return TokenResponse(token, ACCESS_TOKEN_SECONDS, str(scopes), tenant=account.principal.tenant)

    async def open_session(self, call: IncomingCall, body: CreateSessionRequest) -> SessionResponse:
        """Open a browser session for a valid credential or login code."""
        try:
            if body.login is not None:
                account = await self.accounts.authenticate_code(body.login)
            else:
                account = await self.accounts.authenticate(body.subject_token or "")
        except OctoError:
            await self._audit_refusal(call)
            raise
        session = await self.sessions.open(account.principal)
        return SessionResponse(
            session, SESSION_LIFETIME_SECONDS, account.principal.tenant, str(orchestrator_scopes(account))
        )

    async def list_issuers(self, _call: IncomingCall, _body: object) -> IssuerList:
        """Return the issuers that accept browser logins."""
        return IssuerList(await self.accounts.list_issuers())

    async def end_session(self, _call: IncomingCall, body: EndSessionRequest) -> Acknowledgement:
        """End a session and revoke its access tokens."""
        await self.sessions.end(body.session)
        return Acknowledgement()

    async def _audit_refusal(self, call: IncomingCall) -> None:
        actor = Actor(Principal("unknown", "unknown", SYSTEM_TENANT), call.request_id, call.correlation_id, call.peer)
        async with self.db.transaction() as tx:
            await record_audit(tx, actor, "token.refused", "gateway", self.clock.now())

    async def issue_direct_token(self, call: IncomingCall, body: TokenRequest) -> TokenResponse:
        """Issue a token for direct calls. It belongs to an ad-hoc task with a budget, which ends when it expires."""
        if not 1 <= body.lifetime_seconds <= MAX_DIRECT_TOKEN_SECONDS:
            detail = f"A token is valid for 1 to {MAX_DIRECT_TOKEN_SECONDS} seconds."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/lifetime_seconds", detail),))
        scopes = ScopeSet.parse(body.scope)
        if not len(scopes) or any(service_of(scope.family) != body.aud for scope in scopes):
            detail = f"Name scopes of {body.aud}, e.g. {body.aud}:execute."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/scope", detail),))
        principal = call.authority.principal
        allowed = await self.accounts.current_scopes(principal.cred)
        if not scopes.is_subset(allowed):
            raise OctoError(f"You may not issue a token for {body.scope}.", code="scope_missing")
        delegation = parse_delegation_tree({})
        declarations = self.registry.declarations()
        for scope in scopes:
            tree, missing = attenuate(str(scope), declarations, allowed)
            if missing:
                raise OctoError(f"The authority for {', '.join(missing)} is missing.", code="authority_missing")
            delegation = union(delegation, tree)
        task_id = f"task-{self.ids.hex()}"
        now = self.clock.now()

        async def audit_issue(tx: Transaction) -> None:
            detail = {"scope": body.scope, "aud": body.aud}
            await record_audit(tx, actor_from_call(call), "token.issued", task_id, now, detail)

        # Stored before the token exists: a token without its task would have no budget and no end.
        await self.store.create(
            NewTask(
                task_id=task_id,
                tenant=principal.tenant,
                sub=principal.sub,
                cred=principal.cred,
                authority=str(allowed),
                contract=Task(f"token for {body.scope}", budget=Budget(max_tokens=self.max_tokens)),
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
                deadline_at=now + body.lifetime_seconds,
                kind="adhoc",
            ),
            audit_issue,
        )
        token = self.minter.mint_access(
            principal,
            body.aud,
            scopes,
            body.lifetime_seconds,
            task=TaskRef(task_id),
            delegation=delegation,
            holder_jkt=self.registry.thumbprint(body.aud),
            grant_lifetime=body.lifetime_seconds,
        )
        return TokenResponse(token, body.lifetime_seconds, str(scopes), task_id)

    async def directory(self, _call: IncomingCall, _body: object) -> DirectoryResponse:
        """Return the services with their keys, and the trusted root keys, signed."""
        self.roots.replace(self.ring.trusted_keys(self.clock.now()))
        return DirectoryResponse(self.minter.sign_directory(self.registry.directory()))

    async def revocations(self, call: IncomingCall, _body: object) -> object:
        """Return the revocations in force; as NDJSON, a full list followed by each new one."""
        if NDJSON in call.request.headers.get("accept", ""):
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self.revocation_store.stream(self.draining), media_type=NDJSON, headers=headers)
        return self.revocation_store.list()

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(public_api.CREATE_TOKEN, self.issue_direct_token),
            implement(internal.EXCHANGE_TOKEN, self.exchange),
            implement(internal.CREATE_SESSION, self.open_session),
            implement(internal.LIST_LOGIN_ISSUERS, self.list_issuers),
            implement(internal.CLOSE_SESSION, self.end_session),
            implement(internal.READ_DIRECTORY, self.directory),
            # Its NDJSON lines are revocations, not the frames of a streamed call.
            implement(internal.READ_REVOCATIONS, self.revocations, raw=True),
        ]


def orchestrator_scopes(account: Account) -> ScopeSet:
    """Return the scopes of an account that the orchestrator itself checks."""
    return account.scopes.owned_by("orchestrator")
