"""What other services ask of the orchestrator in their own name: budgets, idempotency keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from octollm.capability import PublicKey, Verified, Verifier
from octollm.clock import Clock
from octollm.contracts.api import (
    ClaimAnswer,
    ClaimRequest,
    ClaimUpdate,
    Done,
    ReserveAnswer,
    ReserveRequest,
    SettleRequest,
)
from octollm.errors import OctoError
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.idempotency import Claimed, Conflict, InFlight, Kept, KeyOf, Stored, Unknown, check_key
from octollm.rpc.idempotency_sql import SqlIdempotency
from octollm.services.orchestrator.revoking import Revoking
from octollm.tasks.ledger import Ledger, Wanted, encode_answer
from octollm.tasks.store import TaskStore


@dataclass(frozen=True, slots=True)
class ServicesApi:
    """What these operations work with."""

    ledger: Ledger
    store: TaskStore
    keys: SqlIdempotency
    revoking: Revoking
    roots: Mapping[str, PublicKey]
    clock: Clock
    verifiers: dict[str, Verifier] = field(default_factory=dict[str, Verifier])

    def _authority(self, peer: str, bearer: str) -> Verified:
        """Return the authority that ``peer`` was shown: tenant, subject and task come from it, never from the peer."""
        verifier = self.verifiers.get(peer)
        if verifier is None:
            verifier = Verifier(peer, self.roots, self.clock, revocations=self.revoking.known)
            self.verifiers[peer] = verifier
        return verifier.verify(bearer)

    async def reserve(self, call: Call, body: ReserveRequest) -> ReserveAnswer:
        """Reserve tokens of a task for a model call."""
        verified = self._authority(call.peer, body.bearer)
        verified.require("models:chat")
        task = verified.task
        if task is None:
            raise OctoError("A model call needs a token that stands for a task.", code="authority_missing")
        key = check_key(body.key)
        if key is None:
            raise OctoError("A reservation needs a key.", code="invalid_body")
        reserved = await self.ledger.reserve(
            Wanted(
                tenant=verified.tenant,
                task_id=task.task,
                step=task.step or "",
                attempt=task.attempt or 0,
                run=task.run,
                key=f"{task.task}:{key}",
                model=body.model,
                prompt_tokens=body.prompt_tokens,
                max_completion_tokens=body.max_completion_tokens,
                token_usd=body.token_usd,
            )
        )
        journal = msgspec.Raw(reserved.journal or b"null")
        return ReserveAnswer(reserved.id, reserved.max_completion_tokens, task.task, journal)

    async def settle(self, _call: Call, body: SettleRequest) -> Done:
        """Settle a reservation."""
        await self.ledger.settle(body.reservation, body.usage, encode_answer(body.answer))
        return Done()

    async def claim(self, call: Call, body: ClaimRequest) -> ClaimAnswer:
        """Claim an idempotency key for a call that the peer serves; raise ``fence_lost`` for one of an older run."""
        verified = self._authority(call.peer, body.bearer)
        check_key(body.key)
        key = KeyOf(verified.tenant, verified.subject, call.peer, body.operation, body.key)
        ref = verified.task
        task = ref.task if ref is not None else None
        if ref is not None and ref.run is not None:
            await self.store.check_run(ref.task, ref.run)
        outcome = await self.keys.claim_for(key, body.body_digest, repeatable=body.repeatable, task_id=task)
        match outcome:
            case Claimed(run):
                return ClaimAnswer("claimed", run)
            case Stored(kept):
                return ClaimAnswer("stored", 0, kept.status, kept.answer, dict(kept.headers))
            case InFlight():
                return ClaimAnswer("in_flight")
            case Conflict():
                return ClaimAnswer("conflict")
            case Unknown():
                return ClaimAnswer("unknown")

    async def renew(self, call: Call, body: ClaimUpdate) -> Done:
        """Prolong a claim."""
        await self.keys.renew([(_key(call, body), body.run)])
        return Done()

    async def complete(self, call: Call, body: ClaimUpdate) -> Done:
        """Store a claimed call's answer."""
        await self.keys.complete(_key(call, body), body.run, Kept(body.status, body.answer, body.headers))
        return Done()

    async def release(self, call: Call, body: ClaimUpdate) -> Done:
        """Give a claim back."""
        await self.keys.release(_key(call, body), body.run)
        return Done()

    def operations(self) -> list[Operation]:
        """Return the operations that services call in their own name."""

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
                answer=answer,
                summary=summary,
                about=About(codes=codes),
            )

        return [
            post(
                "budget.reserve",
                "/budget/reserve",
                self.reserve,
                ReserveRequest,
                ReserveAnswer,
                "models",
                "Reserve.",
                "authority_missing",
                "budget_exhausted",
                "fence_lost",
                "state_conflict",
                "task_not_found",
            ),
            post("budget.settle", "/budget/settle", self.settle, SettleRequest, Done, "models", "Settle.", "not_found"),
            post(
                "idempotency.claim",
                "/idempotency/claim",
                self.claim,
                ClaimRequest,
                ClaimAnswer,
                "*",
                "Claim a key.",
                "fence_lost",
                "task_not_found",
            ),
            post("idempotency.renew", "/idempotency/renew", self.renew, ClaimUpdate, Done, "*", "Renew."),
            post("idempotency.complete", "/idempotency/complete", self.complete, ClaimUpdate, Done, "*", "Complete."),
            post("idempotency.release", "/idempotency/release", self.release, ClaimUpdate, Done, "*", "Release."),
        ]


def _key(call: Call, body: ClaimUpdate) -> KeyOf:
    return KeyOf(body.tenant, body.subject, call.peer, body.operation, body.key)
