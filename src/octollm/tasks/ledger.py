"""The budget ledger: reserves tokens and cost before a model call and settles them after it.

Since the reservation is an upper bound, calls in parallel never exceed the budget. A repeated call is answered from
the model journal and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.engine import RowMapping

from octollm.clock import Clock, IdGenerator
from octollm.contracts.task import Usage
from octollm.errors import OctoError
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import budgets, model_journal, reservations, steps, tasks
from octollm.tasks.state import is_final

MIN_COMPLETION_TOKENS = 16
"""The least completion worth a call. With less budget than this the call is refused, rather than paid for an answer
that is cut off at once."""


@dataclass(frozen=True, slots=True)
class ReservationRequest:
    """The tokens that a model call needs: its prompt (exact, or an upper bound) and the limit of its completion.

    ``token_usd`` is the highest price of a token in US dollars, ``None`` when the price is unknown.
    """

    tenant: str
    task_id: str
    step: str
    attempt: int
    epoch: int | None
    key: str
    model: str
    prompt_tokens: int
    max_completion_tokens: int | None
    token_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A reservation. With ``journal``, the recorded answer of the same call, nothing was reserved."""

    id: str
    max_completion_tokens: int
    journal: bytes | None = None


def allocate_completion(*, remaining: int, open_steps: int, prompt: int, requested: int | None) -> int | None:
    """Return the completion tokens of a call, or ``None`` when its prompt does not fit into the budget.

    A step may spend ``remaining ÷ open_steps``. Without a requested limit the call gets all of that.
    """
    # An even share, so that one of several parallel steps cannot use up the budget of the others. What a step does not
    # use returns to ``remaining``. During planning there are no steps.
    share = remaining // max(1, open_steps)
    room = share - prompt
    if room < MIN_COMPLETION_TOKENS:
        return None
    return room if requested is None else min(room, requested)


class BudgetLedger:
    """The budget ledger: the budgets of all tasks, with their reservations."""

    def __init__(self, db: Database, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids

    async def reserve(self, request: ReservationRequest) -> Reservation:
        """Reserve tokens for a call.

        Raises ``budget_exhausted`` with the numbers, ``task_not_found``, ``state_conflict`` for a task that has
        ended, ``fence_lost`` for an outdated epoch.
        """
        async with self._db.transaction() as tx:
            # All reservations of a task are serialized by the lock on its budget, on whichever replica they arrive, so
            # no tokens are granted twice. The task is read once the lock is acquired: the end of an ad-hoc task settles
            # its open reservations under the same lock, so it either precedes this read or finds what is reserved here.
            budget = await _lock_budget(tx, request.task_id)
            task = await tx.first(select(tasks).where(tasks.c.task_id == request.task_id))
            if task is None or task["tenant"] != request.tenant:
                raise OctoError("There is no task of that id.", code="task_not_found")
            if is_final(task["status"]):
                raise OctoError(f"The task is {task['status']}.", code="state_conflict")
            # Fence: a worker that lost its lease cannot spend tokens. An ad-hoc task has no worker and no epochs.
            if request.epoch is not None and task["kind"] == "task" and request.epoch != task["run"]:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            if budget is None:
                raise OctoError("The task has no budget.", code="budget_exhausted")
            # Also under the lock: if the same call was settled by now, its answer is found, and not paid for twice.
            journal_entry = await tx.first(
                select(model_journal).where(
                    model_journal.c.tenant == request.tenant, model_journal.c.key == request.key
                )
            )
            if journal_entry is not None:
                return Reservation("", journal_entry["completion_tokens"], journal_entry["answer"])
            # A worker that crashed between reserve and settle leaves a reservation of the same key open. The provider
            # may have charged for that call, so all of it counts as used.
            if await self._settle_abandoned(tx, request):
                budget = await _lock_budget(tx, request.task_id) or budget
            return await self._reserve_tokens(tx, request, budget)

    async def _settle_abandoned(self, tx: Transaction, request: ReservationRequest) -> bool:
        """Settle the reservations that earlier tries of the same call left open; return whether there were any."""
        query = select(reservations).where(
            reservations.c.task_id == request.task_id,
            reservations.c.key == request.key,
            reservations.c.state == "open",
        )
        abandoned = await tx.all(query)
        await self._settle_at_bound(tx, abandoned)
        return bool(abandoned)

    async def settle_open(self, tx: Transaction, task_id: str) -> None:
        """Settle every open reservation of a task that ends, at its upper bound; a later settlement has no effect."""
        await _lock_budget(tx, task_id)
        query = select(reservations).where(reservations.c.task_id == task_id, reservations.c.state == "open")
        await self._settle_at_bound(tx, await tx.all(query))

    async def _settle_at_bound(self, tx: Transaction, rows: Sequence[RowMapping]) -> None:
        # Only the totals rise, not ``prompt_tokens`` and ``completion_tokens``: how the tokens divide is unknown.
        for row in rows:
            tokens = int(row["tokens"])
            await tx.execute(
                update(reservations)
                .where(reservations.c.id == row["id"])
                .values(state="settled", used_tokens=tokens, settled_at=self._clock.now())
            )
            await tx.execute(
                update(budgets)
                .where(budgets.c.task_id == row["task_id"])
                .values(
                    reserved_tokens=budgets.c.reserved_tokens - tokens,
                    used_tokens=budgets.c.used_tokens + tokens,
                    reserved_cost_usd=budgets.c.reserved_cost_usd - row["cost_usd"],
                    used_cost_usd=budgets.c.used_cost_usd + row["cost_usd"],
                )
            )

    async def _reserve_tokens(
        self, tx: Transaction, request: ReservationRequest, budget: Mapping[str, Any]
    ) -> Reservation:
        limit = budget["max_tokens"]
        committed = budget["used_tokens"] + budget["reserved_tokens"]
        remaining = limit - committed
        open_steps = await tx.scalar(
            select(func.count())
            .select_from(steps)
            .where(steps.c.task_id == request.task_id, steps.c.status.in_(("pending", "running")))
        )
        completion = allocate_completion(
            remaining=remaining,
            open_steps=int(open_steps or 0),
            prompt=request.prompt_tokens,
            requested=request.max_completion_tokens,
        )
        if completion is None:
            raise OctoError(
                f"The task may use {limit} tokens; {budget['used_tokens']} are used, {budget['reserved_tokens']} are"
                f" reserved and {int(open_steps or 0)} steps are open, so this call's prompt of {request.prompt_tokens}"
                " does not fit. Submit it with a larger budget.max_tokens.",
                code="budget_exhausted",
            )
        tokens = request.prompt_tokens + completion
        cost = _bound_cost(request, tokens, budget)
        reservation = self._ids.hex()
        await tx.execute(
            tx.insert(reservations).values(
                id=reservation,
                task_id=request.task_id,
                step=request.step,
                attempt=request.attempt,
                run=request.epoch or 0,
                key=request.key,
                model=request.model,
                tokens=tokens,
                cost_usd=cost,
                created_at=self._clock.now(),
            )
        )
        await tx.execute(
            update(budgets)
            .where(budgets.c.task_id == request.task_id)
            .values(
                reserved_tokens=budgets.c.reserved_tokens + tokens,
                reserved_cost_usd=budgets.c.reserved_cost_usd + cost,
            )
        )
        return Reservation(reservation, completion)

    async def settle(self, reservation: str, usage: Usage, answer: bytes | None) -> None:
        """Settle a reservation with the actual usage, and store ``answer`` for repeats of the call.

        A second settlement has no effect. Raises ``not_found`` for an unknown reservation.
        """
        async with self._db.transaction() as tx:
            query = select(reservations).where(reservations.c.id == reservation)
            row = await tx.first(query)
            if row is not None:
                # The first read only finds the task, whose budget must be locked before its reservations (lock order).
                # The second, under the lock, sees whether another settlement was faster.
                await _lock_budget(tx, row["task_id"])
                row = await tx.first(query)
            if row is None:
                raise OctoError("There is no reservation of that id.", code="not_found")
            if row["state"] != "open":
                return
            now = self._clock.now()
            await tx.execute(
                update(reservations)
                .where(reservations.c.id == reservation)
                .values(
                    state="settled",
                    used_tokens=usage.total_tokens,
                    used_cost_usd=usage.cost_usd,
                    settled_at=now,
                )
            )
            await tx.execute(
                update(budgets)
                .where(budgets.c.task_id == row["task_id"])
                .values(
                    reserved_tokens=budgets.c.reserved_tokens - row["tokens"],
                    reserved_cost_usd=budgets.c.reserved_cost_usd - row["cost_usd"],
                    used_tokens=budgets.c.used_tokens + usage.total_tokens,
                    used_cost_usd=budgets.c.used_cost_usd + usage.cost_usd,
                    prompt_tokens=budgets.c.prompt_tokens + usage.prompt_tokens,
                    completion_tokens=budgets.c.completion_tokens + usage.completion_tokens,
                )
            )
            if answer is not None:
                tenant = await tx.scalar(select(tasks.c.tenant).where(tasks.c.task_id == row["task_id"]))
                await tx.execute(
                    tx.insert(model_journal)
                    .values(
                        tenant=tenant,
                        key=row["key"],
                        task_id=row["task_id"],
                        step=row["step"],
                        body_digest="",
                        answer=answer,
                        prompt_tokens=usage.prompt_tokens,
                        completion_tokens=usage.completion_tokens,
                        cost_usd=usage.cost_usd,
                        model=row["model"],
                        created_at=now,
                    )
                    # The first answer wins, because its caller may have acted on it already.
                    .on_conflict_do_nothing()
                )

    async def usage(self, task_id: str) -> Usage:
        """Return the settled usage of a task."""
        async with self._db.read() as conn:
            row = await conn.first(select(budgets).where(budgets.c.task_id == task_id))
        if row is None:
            return Usage()
        return Usage(row["prompt_tokens"], row["completion_tokens"], row["used_cost_usd"])


async def _lock_budget(tx: Transaction, task_id: str) -> Mapping[str, Any] | None:
    """Return a task's budget, locked until the commit (on SQLite the transaction itself is the lock)."""
    row = await tx.first(select(budgets).where(budgets.c.task_id == task_id).with_for_update())
    return None if row is None else row_to_dict(row)


def _bound_cost(request: ReservationRequest, tokens: int, budget: Mapping[str, Any]) -> float:
    """Return the highest cost of a call in US dollars; raise ``budget_exhausted`` when it exceeds the budget."""
    limit = budget["max_cost_usd"]
    if limit is None:
        return tokens * (request.token_usd or 0.0)
    if request.token_usd is None:
        raise OctoError(
            f"The price of {request.model} is unknown, so budget.max_cost_usd cannot be enforced. Omit it and limit"
            " the tokens instead.",
            code="budget_exhausted",
        )
    cost = tokens * request.token_usd
    committed = budget["used_cost_usd"] + budget["reserved_cost_usd"]
    if committed + cost > limit:
        raise OctoError(
            f"The task may cost {limit:g} US dollars; {committed:g} are used or reserved, and this call may cost"
            f" {cost:g}.",
            code="budget_exhausted",
        )
    return cost


def encode_journal_entry(answer: msgspec.Raw) -> bytes | None:
    """Return the journal entry for an answer; ``None`` for JSON's null."""
    # Null means that the call got no complete answer. It is not journaled, so a repeat calls the model again.
    data = bytes(answer)
    return None if data in (b"", b"null") else data
