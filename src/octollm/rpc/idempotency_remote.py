"""Keys kept with the orchestrator, for services without SQL of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from octollm.capability import SelfSigner
from octollm.clock import Clock
from octollm.contracts.api import ClaimAnswer, ClaimRequest, ClaimUpdate
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.idempotency import Claimed, Conflict, InFlight, Kept, KeyOf, Outcome, Stored, Unknown

_NOT_YET = Kept(0, b"")


class RemoteIdempotency:
    """Claims and completions over HTTP, in the name of one service."""

    def __init__(self, caller: Caller, signer: SelfSigner, clock: Clock) -> None:
        self._caller = caller
        self._signer = signer
        self._clock = clock

    async def claim(self, key: KeyOf, body_digest: str, *, repeatable: bool, bearer: str) -> Outcome:
        """Take the key, or say what stands in the way."""
        request = ClaimRequest(bearer, key.operation, key.key, body_digest, repeatable)
        answer = await self._caller.answer(self._call("claim", request), ClaimAnswer)
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

    async def renew(self, claims: Sequence[tuple[KeyOf, int]]) -> None:
        """Prolong the leases of claims."""
        await asyncio.gather(*(self._caller.send(self._call("renew", _update(key, run))) for key, run in claims))

    async def complete(self, key: KeyOf, run: int, kept: Kept) -> None:
        """Store the answer of a claimed call."""
        await self._caller.send(self._call("complete", _update(key, run, kept)))

    async def release(self, key: KeyOf, run: int) -> None:
        """Give a claim back."""
        await self._caller.send(self._call("release", _update(key, run)))

    def _call(self, action: str, body: ClaimRequest | ClaimUpdate) -> Outgoing:
        # Each of these may be repeated: they name the claim, and the store compares it.
        return Outgoing(
            Target("orchestrator", f"idempotency.{action}", "POST", f"/idempotency/{action}", "safe"),
            self._signer.svc_token("orchestrator"),
            Deadline.after(self._clock, 10),
            msgspec.json.encode(body),
        )


def _update(key: KeyOf, run: int, kept: Kept = _NOT_YET) -> ClaimUpdate:
    return ClaimUpdate(
        key.tenant, key.subject, key.operation, key.key, run, kept.status, kept.answer, dict(kept.headers)
    )
