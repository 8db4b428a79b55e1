"""Tokens over HTTP: exchange for the door, tokens made by hand, the directory, revocations."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.responses import StreamingResponse

from octollm.capability import Principal, RootMinter, ScopeSet, TaskRef, closure, merge, parse_may
from octollm.capability.inspecting import read_chain
from octollm.capability.keyring import KeyRing, Roots
from octollm.clock import Clock, Ids
from octollm.contracts.api import (
    Done,
    ExchangeRequest,
    TokenAnswer,
    TokenRequest,
)
from octollm.contracts.revocations import RevocationList
from octollm.contracts.services import service_of
from octollm.contracts.session import (
    SESSION_PREFIX,
    SESSION_SECONDS,
    EndSession,
    IssuerList,
    OpenSession,
    SessionAnswer,
)
from octollm.contracts.stream import NDJSON
from octollm.contracts.task import Budget, TaskContract
from octollm.errors import Fault, OctoError
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.identity import DirectoryAnswer
from octollm.services.orchestrator.accounts import Account, Accounts
from octollm.services.orchestrator.audit import SYSTEM_TENANT, Actor, actor_of, record
from octollm.services.orchestrator.registry import Registry
from octollm.services.orchestrator.revoking import Revoking
from octollm.services.orchestrator.sessions import Sessions
from octollm.storage import Database, Transaction
from octollm.tasks.store import NewTask, TaskStore

DOOR_SECONDS = 300
MAX_HAND_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class TokensApi:
    """What the operations on tokens work with."""

    db: Database
    accounts: Accounts
    sessions: Sessions
    registry: Registry
    revoking: Revoking
    minter: RootMinter
    store: TaskStore
    max_tokens: int
    clock: Clock
    ids: Ids
    draining: asyncio.Event
    ring: KeyRing
    roots: Roots

    async def exchange(self, call: Call, body: ExchangeRequest) -> TokenAnswer:
        """Exchange an API key for an access token at this service (RFC 8693)."""
        session_id = ""
        try:
            if body.subject_token.startswith(SESSION_PREFIX):
                session_id, cred = await self.sessions.credential(body.subject_token)
                account = await self.accounts.of_credential(cred)
            else:
                account = await self.accounts.authenticate(body.subject_token)
        except OctoError:
            await self._refused(call)
            raise
        scopes = door_scopes(account)
        token = self.minter.access(account.principal, "orchestrator", scopes, DOOR_SECONDS)
        if session_id:
            await self.sessions.note(session_id, read_chain(token).access.claims.jti)
        return TokenAnswer(token, DOOR_SECONDS, str(scopes), tenant=account.principal.tenant)

    async def open_session(self, call: Call, body: OpenSession) -> SessionAnswer:
        """Open a session for a credential that is good."""
        try:
            if body.login is not None:
                account = await self.accounts.by_code(body.login)
            else:
                account = await self.accounts.authenticate(body.subject_token or "")
        except OctoError:
            await self._refused(call)
            raise
        session = await self.sessions.open(account.principal)
        return SessionAnswer(session, SESSION_SECONDS, account.principal.tenant, str(door_scopes(account)))

    async def issuers(self, _call: Call, _body: object) -> IssuerList:
        """Return the issuers at which a browser can log in."""
        return IssuerList(await self.accounts.issuers())

    async def end_session(self, _call: Call, body: EndSession) -> Done:
        """End a session, and revoke what it was given."""
        await self.sessions.end(body.session)
        return Done()

    async def _refused(self, call: Call) -> None:
        actor = Actor(Principal("unknown", "unknown", SYSTEM_TENANT), call.request_id, call.correlation_id, call.peer)
        async with self.db.transaction() as tx:
            await record(tx, actor, "token.refused", "door", self.clock.now())

    async def by_hand(self, call: Call, body: TokenRequest) -> TokenAnswer:
        """Make a token for direct calls: it stands for a task of its own with a budget, which ends with it."""
        if not 1 <= body.lifetime_seconds <= MAX_HAND_SECONDS:
            detail = f"From 1 to {MAX_HAND_SECONDS} seconds."
            raise OctoError(detail, code="invalid_body", faults=(Fault("/lifetime_seconds", detail),))
        scopes = ScopeSet.parse(body.scope)
        if not len(scopes) or any(service_of(scope.family) != body.aud for scope in scopes):
            detail = f"Name scopes of {body.aud}, e.g. {body.aud}:execute."
            raise OctoError(detail, code="invalid_body", faults=(Fault("/scope", detail),))
        principal = call.authority.principal
        allowed = await self.accounts.scopes_now(principal.cred)
        if not scopes.narrower_or_equal(allowed):
            raise OctoError(f"You may not make a token for {body.scope}.", code="scope_missing")
        may = parse_may({})
        declarations = self.registry.declarations()
        for scope in scopes:
            tree, missing = closure(str(scope), declarations, allowed)
            if missing:
                raise OctoError(f"The authority for {', '.join(missing)} is missing.", code="authority_missing")
            may = merge(may, tree)
        task_id = f"task-{self.ids.hex()}"
        now = self.clock.now()

        async def also(tx: Transaction) -> None:
            detail = {"scope": body.scope, "aud": body.aud}
            await record(tx, actor_of(call), "token.issued", task_id, now, detail)

        await self.store.create(
            NewTask(
                task_id=task_id,
                tenant=principal.tenant,
                sub=principal.sub,
                cred=principal.cred,
                authority=str(allowed),
                contract=TaskContract(f"token for {body.scope}", budget=Budget(max_tokens=self.max_tokens)),
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
                deadline_at=now + body.lifetime_seconds,
                kind="adhoc",
            ),
            also,
        )
        token = self.minter.access(
            principal,
            body.aud,
            scopes,
            body.lifetime_seconds,
            task=TaskRef(task_id),
            may=may,
            holder_jkt=self.registry.thumbprint(body.aud),
            grant_lifetime=body.lifetime_seconds,
        )
        return TokenAnswer(token, body.lifetime_seconds, str(scopes), task_id)

    async def directory(self, _call: Call, _body: object) -> DirectoryAnswer:
        """Return the services and their keys, and the roots that are believed now, signed."""
        self.roots.replace(self.ring.believed(self.clock.now()))
        return DirectoryAnswer(self.minter.directory(self.registry.directory()))

    async def revocations(self, call: Call, _body: object) -> object:
        """Return what is revoked; as NDJSON, all of it and then each revocation as it is made."""
        if NDJSON in call.request.headers.get("accept", ""):
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self.revoking.follow(self.draining), media_type=NDJSON, headers=headers)
        return self.revoking.list()

    def operations(self) -> list[Operation]:
        """Return the operations on tokens."""
        return [
            Operation(
                "token.exchange",
                "POST",
                "/token",
                self.exchange,
                auth="service",
                scope="reflex",
                body=ExchangeRequest,
                answer=TokenAnswer,
                summary="Exchange a caller's credential for an access token.",
                about=About(codes=("api_key_invalid", "login_refused")),
            ),
            Operation(
                "sessions.open",
                "POST",
                "/sessions",
                self.open_session,
                auth="service",
                scope="reflex",
                body=OpenSession,
                answer=SessionAnswer,
                summary="Open a session of the page.",
                about=About(codes=("api_key_invalid", "login_refused")),
            ),
            Operation(
                "sessions.issuers",
                "GET",
                "/sessions/issuers",
                self.issuers,
                auth="service",
                scope="reflex",
                answer=IssuerList,
                summary="Where a browser can log in.",
            ),
            Operation(
                "sessions.end",
                "POST",
                "/sessions/end",
                self.end_session,
                auth="service",
                scope="reflex",
                body=EndSession,
                answer=Done,
                summary="End a session of the page.",
            ),
            Operation(
                "token.by_hand",
                "POST",
                "/tokens",
                self.by_hand,
                scope="tasks:create",
                body=TokenRequest,
                answer=TokenAnswer,
                strict=True,
                summary="Make a token for direct calls.",
                about=About(codes=("authority_missing", "invalid_parameter")),
            ),
            Operation(
                "directory",
                "GET",
                "/directory",
                self.directory,
                auth="service",
                scope="*",
                answer=DirectoryAnswer,
                cacheable=True,
                summary="The services and their keys, signed by the root.",
            ),
            Operation(
                "revocations",
                "GET",
                "/revocations",
                self.revocations,
                auth="service",
                scope="*",
                answer=RevocationList,
                # Its lines are not those of an answer that takes its time.
                raw=True,
                limited=False,
                timeout=3600.0,
                summary="What is revoked.",
                about=About(stream=NDJSON),
            ),
        ]


def door_scopes(account: Account) -> ScopeSet:
    """Return what an account may do at the orchestrator itself."""
    return account.scopes.owned_by("orchestrator")
