"""Keys kept with the orchestrator, for services without SQL of their own: what comes together is asked for together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octollm.capability import SelfSigner
from octollm.clock import Clock
from octollm.contracts.api import ClaimAnswer, ClaimAnswers, ClaimRequest, Claims, ClaimUpdate, ClaimUpdates
from octollm.contracts.problems import Problem
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.batches import Batches
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.claiming import Claiming
from octollm.rpc.idempotency import Claimed, Conflict, InFlight, Kept, KeyOf, Outcome, Stored, Unknown
from octollm.rpc.problems import error_of

MOST_BYTES = 4 * 1024 * 1024
"""Bytes of bearers, or of answers, that are sent together."""
_CALL_SECONDS = 10.0
_NOT_YET = Kept(0, b"")


class _Wanted(msgspec.Struct, frozen=True):
    key: KeyOf
    claim: ClaimRequest


class RemoteIdempotency:
    """Claims and completions over HTTP, in the name of one service."""

    def __init__(self, caller: Caller, signer: SelfSigner, clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock
        self._claims: Batches[_Wanted, Outcome] = Batches(
            self._claim_all,
            name="claims of keys",
            weigh=lambda wanted: len(wanted.claim.bearer),
            most_weight=MOST_BYTES,
        )
        self._completions: Batches[ClaimUpdate, None] = Batches(
            self._complete_all,
            name="completions of keys",
            weigh=lambda update: len(update.answer) * 4 // 3,
            most_weight=MOST_BYTES,
        )
        self._claiming = Claiming(self._claims, self.release)

    async def claim(self, key: KeyOf, body_digest: str, *, repeatable: bool, bearer: str) -> Outcome:
        """Take the key, or say what stands in the way."""
        wanted = _Wanted(key, ClaimRequest(bearer, key.operation, key.key, body_digest, repeatable))
        return await self._claiming.claim(wanted, key)

    async def _claim_all(self, wanted: Sequence[_Wanted]) -> Sequence[Outcome | OctoError]:
        call = self._call("claim", Claims(tuple(each.claim for each in wanted)))
        answers = (await self._caller.answer(call, ClaimAnswers)).answers
        if len(answers) != len(wanted):
            raise OctoError("The orchestrator answered another number of claims than were made.", code="peer_protocol")
        return [_outcome(answer) for answer in answers]

    async def renew(self, claims: Sequence[tuple[KeyOf, int]]) -> None:
        """Prolong the leases of claims."""
        await self._send("renew", [_update(key, run) for key, run in claims])

    async def complete(self, key: KeyOf, run: int, kept: Kept) -> None:
        """Store the answer of a claimed call."""
        await self._completions.wait(_update(key, run, kept))

    async def _complete_all(self, updates: Sequence[ClaimUpdate]) -> Sequence[None]:
        await self._send("complete", updates)
        return [None] * len(updates)

    async def release(self, key: KeyOf, run: int) -> None:
        """Give a claim back."""
        await self._send("release", [_update(key, run)])

    async def _send(self, action: str, updates: Sequence[ClaimUpdate]) -> None:
        await self._caller.send(self._call(action, ClaimUpdates(tuple(updates))))

    def _call(self, action: str, body: Claims | ClaimUpdates) -> Outgoing:
        # Each of these may be repeated: they name the claim, and the store compares it.
        return Outgoing(
            Target("orchestrator", f"idempotency.{action}", "POST", f"/idempotency/{action}", "read_only"),
            self._signer.svc_token("orchestrator"),
            Deadline.after(self._clock, _CALL_SECONDS),
            msgspec.json.encode(body),
        )


def _outcome(answer: ClaimAnswer) -> Outcome | OctoError:
    match answer.outcome:
        case "claimed":
            return Claimed(answer.run)
        case "stored":
            return Stored(Kept(answer.status, answer.answer, answer.headers))
        case "in_flight":
            return InFlight()
        case "conflict":
            return Conflict()
        case "unknown":
            return Unknown()
        case "refused":
            return error_of(answer.problem or _UNSAID, "orchestrator")


_UNSAID = Problem("A service answered in a form that is not understood", 503, "", "peer_protocol", retryable=False)


def _update(key: KeyOf, run: int, kept: Kept = _NOT_YET) -> ClaimUpdate:
    return ClaimUpdate(
        key.tenant, key.subject, key.operation, key.key, run, kept.status, kept.answer, dict(kept.headers)
    )
