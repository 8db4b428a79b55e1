"""Idempotency keys held by the orchestrator, for services without SQL of their own.

Claims and completions are sent by group commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from octollm.capability import ServiceTokenSigner
from octollm.clock import Clock
from octollm.contracts.declarations import BodyT, DeclaredOperation
from octollm.contracts.internal import (
    ClaimBatch,
    ClaimRequest,
    ClaimResponse,
    ClaimResponseBatch,
    ClaimUpdate,
    ClaimUpdateBatch,
)
from octollm.contracts.internal_operations import CLAIM_KEYS, COMPLETE_CLAIMS, RELEASE_CLAIMS, RENEW_CLAIMS
from octollm.contracts.problems import Problem
from octollm.errors import OctoError
from octollm.group_commit import GroupCommit
from octollm.resilience import Deadline
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.idempotency import (
    AlreadyCompleted,
    CancellableClaims,
    ClaimOutcome,
    HeldClaim,
    IdempotencyKey,
    InFlight,
    KeyConflict,
    OutcomeUnknown,
    StoredResponse,
)
from octollm.rpc.problems import remote_error

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Most bytes of bearers, or of responses, in one batch."""
_CALL_SECONDS = 10.0
_NO_RESPONSE = StoredResponse(0, b"")


class _PendingClaim(msgspec.Struct, frozen=True):
    key: IdempotencyKey
    claim: ClaimRequest


class RemoteIdempotencyStore:
    """Claims and completions over HTTP, authenticated as one service."""

    def __init__(self, client: ServiceClient, signer: ServiceTokenSigner, clock: Clock) -> None:
        self._client = client
        self._signer = signer
        self._clock = clock
        self._claims: GroupCommit[_PendingClaim, ClaimOutcome] = GroupCommit(
            self._claim_all,
            name="claims of keys",
            weight_of=lambda pending: len(pending.claim.bearer),
            max_weight=MAX_BATCH_BYTES,
        )
        self._completions: GroupCommit[ClaimUpdate, None] = GroupCommit(
            self._complete_all,
            name="completions of keys",
            weight_of=lambda update: len(update.answer) * 4 // 3,
            max_weight=MAX_BATCH_BYTES,
        )
        self._claiming = CancellableClaims(self._claims, self.release)

    async def claim(self, key: IdempotencyKey, body_digest: str, *, idempotent: bool, bearer: str) -> ClaimOutcome:
        """Claim the key, or return its state."""
        pending = _PendingClaim(key, ClaimRequest(bearer, key.operation, key.key, body_digest, idempotent))
        return await self._claiming.claim(pending, key)

    async def _claim_all(self, pending: Sequence[_PendingClaim]) -> Sequence[ClaimOutcome | OctoError]:
        call = self._call(CLAIM_KEYS, ClaimBatch(tuple(each.claim for each in pending)))
        responses = (await self._client.call(call, ClaimResponseBatch)).answers
        if len(responses) != len(pending):
            raise OctoError("The orchestrator answered a different number of claims.", code="peer_protocol")
        return [_parse_outcome(response) for response in responses]

    async def renew(self, claims: Sequence[tuple[IdempotencyKey, int]]) -> None:
        """Renew the leases of claims."""
        await self._send(RENEW_CLAIMS, [_create_update(key, epoch) for key, epoch in claims])

    async def complete(
        self, key: IdempotencyKey, epoch: int, response: StoredResponse, *, idempotent: bool = False
    ) -> None:
        """Store the response of a claimed call."""
        await self._completions.wait(_create_update(key, epoch, response, idempotent=idempotent))

    async def _complete_all(self, updates: Sequence[ClaimUpdate]) -> Sequence[None]:
        await self._send(COMPLETE_CLAIMS, updates)
        return [None] * len(updates)

    async def release(self, key: IdempotencyKey, epoch: int) -> None:
        """Release a claim."""
        await self._send(RELEASE_CLAIMS, [_create_update(key, epoch)])

    async def _send(self, declared: DeclaredOperation[ClaimUpdateBatch, Any], updates: Sequence[ClaimUpdate]) -> None:
        await self._client.send(self._call(declared, ClaimUpdateBatch(tuple(updates))))

    def _call(self, declared: DeclaredOperation[BodyT, Any], body: BodyT) -> OutgoingCall:
        return OutgoingCall(
            CallTarget.of(declared),
            self._signer.sign_token("orchestrator"),
            Deadline.after(self._clock, _CALL_SECONDS),
            msgspec.json.encode(body),
        )


def _parse_outcome(response: ClaimResponse) -> ClaimOutcome | OctoError:
    match response.outcome:
        case "claimed":
            return HeldClaim(response.run)
        case "stored":
            return AlreadyCompleted(StoredResponse(response.status, response.answer, response.headers))
        case "in_flight":
            return InFlight()
        case "conflict":
            return KeyConflict()
        case "unknown":
            return OutcomeUnknown()
        case "refused":
            return remote_error(response.problem or _MISSING_PROBLEM, "orchestrator")


_MISSING_PROBLEM = Problem(
    "A service answered in a form that is not understood", 503, "", "peer_protocol", retryable=False
)


def _create_update(
    key: IdempotencyKey, epoch: int, response: StoredResponse = _NO_RESPONSE, *, idempotent: bool = False
) -> ClaimUpdate:
    return ClaimUpdate(
        key.tenant,
        key.subject,
        key.operation,
        key.key,
        epoch,
        response.status,
        response.body,
        dict(response.headers),
        idempotent,
    )
