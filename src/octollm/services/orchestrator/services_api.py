"""Operations for other services: budget reservations and idempotency keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from octollm.capability import PublicKey, VerifiedChain, Verifier
from octollm.clock import Clock
from octollm.contracts.api import Acknowledgement
from octollm.contracts.internal import (
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
from octollm.rpc.call import IncomingCall, Operation, OperationDocs
from octollm.rpc.idempotency import (
    AlreadyCompleted,
    ClaimCompletion,
    Claimed,
    ClaimOutcome,
    IdempotencyKey,
    InFlight,
    KeyConflict,
    NewClaim,
    OutcomeUnknown,
    StoredResponse,
    check_key,
)
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.tasks.ledger import BudgetLedger, ReservationRequest, encode_journal_entry

MAX_CLAIMS_BODY = 8 * 1024 * 1024
"""Bytes of a batch; one stored answer has up to 1 MiB, plus a third for base64."""


@dataclass(frozen=True, slots=True)
class ServicesApi:
    """The operations for built-in services."""

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

    def operations(self) -> list[Operation]:
        """Return their declarations."""

        def post(
            name: str, path: str, handler: object, body: object, answer: object, who: str, summary: str, *codes: str
        ) -> Operation:
            return Operation(
                name,
                "POST",
                path,
                handler,  # type: ignore[arg-type]
                auth="service",
                scope=who,
                body=body,
                response=answer,
                max_body=MAX_CLAIMS_BODY,
                summary=summary,
                docs=OperationDocs(error_codes=codes),
            )

        return [
            post(
                "budget.reserve",
                "/budget/reserve",
                self.reserve,
                ReserveRequest,
                ReserveResponse,
                "models",
                "Reserve.",
                "authority_missing",
                "budget_exhausted",
                "fence_lost",
                "state_conflict",
                "task_not_found",
            ),
            post(
                "budget.settle",
                "/budget/settle",
                self.settle,
                SettleRequest,
                Acknowledgement,
                "models",
                "Settle.",
                "not_found",
            ),
            post(
                "idempotency.claim",
                "/idempotency/claim",
                self.claim,
                ClaimBatch,
                ClaimResponseBatch,
                "*",
                "Claim keys.",
            ),
            post(
                "idempotency.renew", "/idempotency/renew", self.renew, ClaimUpdateBatch, Acknowledgement, "*", "Renew."
            ),
            post(
                "idempotency.complete",
                "/idempotency/complete",
                self.complete,
                ClaimUpdateBatch,
                Acknowledgement,
                "*",
                "Complete.",
            ),
            post(
                "idempotency.release",
                "/idempotency/release",
                self.release,
                ClaimUpdateBatch,
                Acknowledgement,
                "*",
                "Release.",
            ),
        ]


def _idempotency_key(call: IncomingCall, body: ClaimUpdate) -> IdempotencyKey:
    return IdempotencyKey(body.tenant, body.subject, call.peer, body.operation, body.key)


def _to_completion(call: IncomingCall, body: ClaimUpdate) -> ClaimCompletion:
    return ClaimCompletion(
        _idempotency_key(call, body), body.run, StoredResponse(body.status, body.answer, body.headers)
    )


def _to_response(outcome: ClaimOutcome | OctoError, request_id: str) -> ClaimResponse:
    match outcome:
        case Claimed(epoch):
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
