"""Operations for other services: budget reservations, idempotency keys and audit records."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from octollm.capability import PublicKey, Scope, VerifiedChain, Verifier
from octollm.clock import Clock
from octollm.contracts import internal_operations as internal
from octollm.contracts.api import Acknowledgement
from octollm.contracts.internal import (
    AuditEntry,
    ClaimBatch,
    ClaimRequest,
    ClaimResponse,
    ClaimResponseBatch,
    ClaimUpdate,
    ClaimUpdateBatch,
    ReserveRequest,
    ReserveResponse,
    SettleRequest,
)
from octollm.contracts.problems import to_problem
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.rpc.idempotency import (
    AlreadyCompleted,
    ClaimCompletion,
    ClaimOutcome,
    HeldClaim,
    IdempotencyKey,
    InFlight,
    KeyConflict,
    NewClaim,
    OutcomeUnknown,
    StoredResponse,
    check_key,
)
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.audit import Actor, record_audit
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Database
from octollm.tasks.ledger import BudgetLedger, ReservationRequest, encode_journal_entry


@dataclass(frozen=True, slots=True)
class ServicesApi:
    """The operations for built-in services."""

    db: Database
    ledger: BudgetLedger
    idempotency: SqlIdempotencyStore
    revocation_store: RevocationStore
    roots: Mapping[str, PublicKey]
    clock: Clock
    verifiers: dict[str, Verifier] = field(default_factory=dict[str, Verifier])

    def _verify_bearer(self, peer: str, bearer: str) -> VerifiedChain:
        """Verify the token that ``peer`` received: tenant, subject and task come from it, never from the peer."""
        verifier = self.verifiers.get(peer)
        if verifier is None:
            verifier = Verifier(peer, self.roots, self.clock, revocations=self.revocation_store.revocations)
            self.verifiers[peer] = verifier
        return verifier.verify(bearer)

    async def reserve(self, call: IncomingCall, body: ReserveRequest) -> ReserveResponse:
        """Reserve tokens of a task for a model call."""
        verified = self._verify_bearer(call.peer, body.bearer)
        # Whichever of the two the caller may do: which one it did, models has checked.
        if not verified.scopes.allows(Scope("models:embeddings")):
            verified.require("models:chat")
        task = verified.task
        if task is None:
            raise OctoError("A model call needs a token of a task.", code="authority_missing")
        key = check_key(body.key)
        if key is None:
            raise OctoError("A reservation needs a key.", code="invalid_body")
        reserved = await self.ledger.reserve(
            ReservationRequest(
                tenant=verified.tenant,
                task_id=task.task,
                step=task.step or "",
                attempt=task.attempt or 0,
                epoch=task.run,
                # The caller chooses the key; with the task in front, it cannot meet that of another task.
                key=f"{task.task}:{key}",
                model=body.model,
                prompt_tokens=body.prompt_tokens,
                max_completion_tokens=body.max_completion_tokens,
                token_usd=body.token_usd,
            )
        )
        journal = msgspec.Raw(reserved.journal or b"null")
        return ReserveResponse(reserved.id, reserved.max_completion_tokens, task.task, journal)

    async def settle(self, _call: IncomingCall, body: SettleRequest) -> Acknowledgement:
        """Settle a reservation."""
        await self.ledger.settle(body.reservation, body.usage, encode_journal_entry(body.answer))
        return Acknowledgement()

    async def claim(self, call: IncomingCall, body: ClaimBatch) -> ClaimResponseBatch:
        """Claim idempotency keys for calls that the peer serves; a claim of a stale run gets ``fence_lost``."""
        verified = [self._verify_claim(call.peer, claim) for claim in body.claims]
        claims = [each for each in verified if isinstance(each, NewClaim)]
        outcomes = iter(await self.idempotency.claim_many(claims))
        return ClaimResponseBatch(
            tuple(
                _to_response(each if isinstance(each, OctoError) else next(outcomes), call.request_id)
                for each in verified
            )
        )

    def _verify_claim(self, peer: str, claim: ClaimRequest) -> NewClaim | OctoError:
        try:
            # Returned, not raised: a claim that is refused must not fail the others of its batch.
            verified = self._verify_bearer(peer, claim.bearer)
            check_key(claim.key)
        except OctoError as error:
            return error
        key = IdempotencyKey(verified.tenant, verified.subject, peer, claim.operation, claim.key)
        task = verified.task
        if task is None:
            return NewClaim(key, claim.body_digest, claim.repeatable)
        # The run is the fence: a worker that lost the task begins no more calls.
        return NewClaim(key, claim.body_digest, claim.repeatable, task.task, task.run)

    async def renew(self, call: IncomingCall, body: ClaimUpdateBatch) -> Acknowledgement:
        """Renew the leases of claims."""
        await self.idempotency.renew([(_idempotency_key(call, each), each.run) for each in body.updates])
        return Acknowledgement()

    async def complete(self, call: IncomingCall, body: ClaimUpdateBatch) -> Acknowledgement:
        """Store the responses of claimed calls."""
        await self.idempotency.complete_many([_to_completion(call, each) for each in body.updates])
        return Acknowledgement()

    async def release(self, call: IncomingCall, body: ClaimUpdateBatch) -> Acknowledgement:
        """Release claims of calls that were not made."""
        await asyncio.gather(
            *(self.idempotency.release(_idempotency_key(call, each), each.run) for each in body.updates)
        )
        return Acknowledgement()

    async def record(self, call: IncomingCall, body: AuditEntry) -> Acknowledgement:
        """Record in the audit log what a caller of the peer does."""
        verified = self._verify_bearer(call.peer, body.bearer)
        actor = Actor(verified.principal, body.request_id, body.correlation_id, call.peer)
        async with self.db.transaction() as tx:
            await record_audit(tx, actor, body.action, body.target, self.clock.now(), body.detail or None)
        return Acknowledgement()

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(internal.RESERVE_BUDGET, self.reserve),
            implement(internal.SETTLE_BUDGET, self.settle),
            implement(internal.RECORD_AUDIT, self.record),
            implement(internal.CLAIM_KEYS, self.claim),
            implement(internal.RENEW_CLAIMS, self.renew),
            implement(internal.COMPLETE_CLAIMS, self.complete),
            implement(internal.RELEASE_CLAIMS, self.release),
        ]


def _idempotency_key(call: IncomingCall, body: ClaimUpdate) -> IdempotencyKey:
    return IdempotencyKey(body.tenant, body.subject, call.peer, body.operation, body.key)


def _to_completion(call: IncomingCall, body: ClaimUpdate) -> ClaimCompletion:
    return ClaimCompletion(
        _idempotency_key(call, body),
        body.run,
        StoredResponse(body.status, body.answer, body.headers),
        body.repeatable,
    )


def _to_response(outcome: ClaimOutcome | OctoError, request_id: str) -> ClaimResponse:
    match outcome:
        case HeldClaim(epoch):
            return ClaimResponse("claimed", epoch)
        case AlreadyCompleted(stored):
            return ClaimResponse("stored", 0, stored.status, stored.body, dict(stored.headers))
        case InFlight():
            return ClaimResponse("in_flight")
        case KeyConflict():
            return ClaimResponse("conflict")
        case OutcomeUnknown():
            return ClaimResponse("unknown")
        case OctoError():
            return ClaimResponse("refused", problem=to_problem(outcome, request_id))
