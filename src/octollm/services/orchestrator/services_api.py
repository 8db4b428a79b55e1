"""What other services ask of the orchestrator in their own name: budgets, idempotency keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from octollm.capability import PublicKey, TaskRef, Verified, Verifier
from octollm.clock import Clock
from octollm.contracts.api import (
    ClaimAnswer,
    ClaimAnswers,
    ClaimRequest,
    Claims,
    ClaimUpdate,
    ClaimUpdates,
    Done,
    ReserveAnswer,
    ReserveRequest,
    SettleRequest,
)
from octollm.contracts.problems import problem_of
from octollm.errors import OctoError
from octollm.rpc.call import About, Call, Operation
from octollm.rpc.idempotency import Claimed, Conflict, InFlight, Kept, KeyOf, Stored, Unknown, check_key
from octollm.rpc.idempotency_sql import SqlIdempotency
from octollm.services.orchestrator.revoking import Revoking
from octollm.tasks.ledger import Ledger, Wanted, encode_answer
from octollm.tasks.store import TaskStore

MAX_CLAIMS_BODY = 8 * 1024 * 1024
"""Bytes of what comes together; one answer that is kept has 1 MiB, a third more as base64."""


class _Read(msgspec.Struct, frozen=True):
    """A claim that may be made: its key, and the work that it is for."""

    key: KeyOf
    task: TaskRef | None


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

    async def claim(self, call: Call, body: Claims) -> ClaimAnswers:
        """Claim idempotency keys for calls that the peer serves; one of an older run is refused with ``fence_lost``."""
        found = [self._read(call.peer, each) for each in body.claims]
        runs = await self.store.runs({read.task.task for read in found if isinstance(read, _Read) and read.task})
        answers = await asyncio.gather(
            *(self._claim(claim, read, runs, call.request_id) for claim, read in zip(body.claims, found, strict=True))
        )
        return ClaimAnswers(tuple(answers))

    def _read(self, peer: str, claim: ClaimRequest) -> _Read | OctoError:
        try:
            verified = self._authority(peer, claim.bearer)
            check_key(claim.key)
        except OctoError as error:
            return error
        key = KeyOf(verified.tenant, verified.subject, peer, claim.operation, claim.key)
        return _Read(key, verified.task)

    async def _claim(
        self, claim: ClaimRequest, read: _Read | OctoError, runs: Mapping[str, int], request_id: str
    ) -> ClaimAnswer:
        if isinstance(read, OctoError):
            return ClaimAnswer("refused", problem=problem_of(read, request_id))
        task = read.task
        if task is not None and task.run is not None and task.run < runs.get(task.task, 0):
            lost = OctoError("A newer run holds the task.", code="fence_lost")
            return ClaimAnswer("refused", problem=problem_of(lost, request_id))
        task_id = None if task is None else task.task
        try:
            outcome = await self.keys.claim_for(
                read.key, claim.body_digest, repeatable=claim.repeatable, task_id=task_id
            )
        except OctoError as error:
            return ClaimAnswer("refused", problem=problem_of(error, request_id))
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

    async def renew(self, call: Call, body: ClaimUpdates) -> Done:
        """Prolong claims."""
        await self.keys.renew([(_key(call, each), each.run) for each in body.updates])
        return Done()

    async def complete(self, call: Call, body: ClaimUpdates) -> Done:
        """Store the answers of claimed calls."""
        await asyncio.gather(
            *(
                self.keys.complete(_key(call, each), each.run, Kept(each.status, each.answer, each.headers))
                for each in body.updates
            )
        )
        return Done()

    async def release(self, call: Call, body: ClaimUpdates) -> Done:
        """Give claims back."""
        await asyncio.gather(*(self.keys.release(_key(call, each), each.run) for each in body.updates))
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
                max_body=MAX_CLAIMS_BODY,
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
                Claims,
                ClaimAnswers,
                "*",
                "Claim keys.",
            ),
            post("idempotency.renew", "/idempotency/renew", self.renew, ClaimUpdates, Done, "*", "Renew."),
            post("idempotency.complete", "/idempotency/complete", self.complete, ClaimUpdates, Done, "*", "Complete."),
            post("idempotency.release", "/idempotency/release", self.release, ClaimUpdates, Done, "*", "Release."),
        ]


def _key(call: Call, body: ClaimUpdate) -> KeyOf:
    return KeyOf(body.tenant, body.subject, call.peer, body.operation, body.key)
