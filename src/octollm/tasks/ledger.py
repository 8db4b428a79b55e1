"""The budget ledger: reserves tokens and cost before a model call and settles them after it.

Since the reservation is an upper bound, calls in parallel never exceed the budget. A repeated call is answered from
the model journal and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, case, func, literal, select, update
from sqlalchemy.engine import RowMapping

from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.api import UsageBy, UsageReport, UsageRow
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


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BudgetShare:
    """What a task can give to a sub-task.

    ``ancestors`` are the tasks whose budgets the sub-task spends: those above the task, and the task itself, last.
    ``tokens`` is what is left of the tightest of them, ``share`` the part of it that is the sub-task's by default.
    """

    ancestors: tuple[str, ...]
    tokens: int
    share: int


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
            chain = await _lock_budgets(tx, request.task_id)
            task = await tx.first(select(tasks).where(tasks.c.task_id == request.task_id))
            if task is None or task["tenant"] != request.tenant:
                raise OctoError("There is no task of that id.", code="task_not_found")
            if is_final(task["status"]):
                raise OctoError(f"The task is {task['status']}.", code="state_conflict")
            # Fence: a worker that lost its lease cannot spend tokens. An ad-hoc task has no worker and no epochs.
            if request.epoch is not None and task["kind"] == "task" and request.epoch != task["run"]:
                raise OctoError("A newer run holds the task.", code="fence_lost")
            if not chain:
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
            if await self._settle_abandoned(tx, request, chain):
                chain = await _lock_budgets(tx, request.task_id)
            return await self._reserve_tokens(tx, request, chain)

    async def _settle_abandoned(self, tx: Transaction, request: ReservationRequest, chain: Sequence[Row]) -> bool:
        """Settle the reservations that earlier tries of the same call left open; return whether there were any."""
        query = select(reservations).where(
            reservations.c.task_id == request.task_id,
            reservations.c.key == request.key,
            reservations.c.state == "open",
        )
        abandoned = await tx.all(query)
        await self._settle_at_bound(tx, abandoned, chain)
        return bool(abandoned)

    async def settle_open(self, tx: Transaction, task_id: str) -> None:
        """Settle every open reservation of a task that ends, at its upper bound; a later settlement has no effect."""
        chain = await _lock_budgets(tx, task_id)
        query = select(reservations).where(reservations.c.task_id == task_id, reservations.c.state == "open")
        await self._settle_at_bound(tx, await tx.all(query), chain)

    async def _settle_at_bound(self, tx: Transaction, rows: Sequence[RowMapping], chain: Sequence[Row]) -> None:
        # Only the totals rise, not ``prompt_tokens`` and ``completion_tokens``: how the tokens divide is unknown.
        for row in rows:
            tokens = int(row["tokens"])
            await tx.execute(
                update(reservations)
                .where(reservations.c.id == row["id"])
                .values(
                    state="settled",
                    used_tokens=tokens,
                    used_cost_usd=row["cost_usd"],
                    settled_at=self._clock.now(),
                )
            )
            await tx.execute(
                update(budgets)
                .where(budgets.c.task_id.in_(_ids(chain)))
                .values(
                    reserved_tokens=budgets.c.reserved_tokens - tokens,
                    used_tokens=budgets.c.used_tokens + tokens,
                    reserved_cost_usd=budgets.c.reserved_cost_usd - row["cost_usd"],
                    used_cost_usd=budgets.c.used_cost_usd + row["cost_usd"],
                )
            )

    async def _reserve_tokens(self, tx: Transaction, request: ReservationRequest, chain: Sequence[Row]) -> Reservation:
        # A tree of tasks shares the budget of its root: a call has to fit into that of every task above it, too.
        budget = min(chain, key=_tokens_left)
        limit, remaining = budget["max_tokens"], _tokens_left(budget)
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
        cost = _bound_cost(request, tokens, chain)
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
            .where(budgets.c.task_id.in_(_ids(chain)))
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
            row, chain = await tx.first(query), list[Row]()
            if row is not None:
                # The first read only finds the task, whose budget must be locked before its reservations (lock order).
                # The second, under the lock, sees whether another settlement was faster.
                chain = await _lock_budgets(tx, row["task_id"])
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
                .where(budgets.c.task_id.in_(_ids(chain)))
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

    async def share(self, task_id: str) -> BudgetShare:
        """Return what is left for a sub-task of a task: its open steps divide it evenly. Nothing is reserved."""
        async with self._db.read() as conn:
            query = select(budgets.c.ancestors).where(budgets.c.task_id == task_id)
            above: Sequence[str] = await conn.scalar(query) or ()
            ancestors = (*above, task_id)
            rows = await conn.all(select(budgets).where(budgets.c.task_id.in_(ancestors)))
            is_open = steps.c.task_id == task_id, steps.c.status.in_(("pending", "running"))
            open_steps = int(await conn.scalar(select(func.count()).select_from(steps).where(*is_open)) or 0)
        tokens = max(0, min((_tokens_left(row_to_dict(row)) for row in rows), default=0))
        return BudgetShare(ancestors, tokens, tokens // max(1, open_steps))

    async def usage(self, task_id: str) -> Usage:
        """Return the settled usage of a task.

        Tokens of calls that were cut off count as completion tokens, at their upper bound.
        """
        rows = await self._db.fetch(
            "SELECT prompt_tokens, used_tokens, used_cost_usd FROM budgets WHERE task_id = $1", task_id
        )
        if not rows:
            return Usage()
        row = rows[0]
        # The total includes them; how they divide is unknown.
        return Usage(row["prompt_tokens"], row["used_tokens"] - row["prompt_tokens"], row["used_cost_usd"])


async def _lock_budgets(tx: Transaction, task_id: str) -> list[Row]:
    """Return the budgets that a task spends, locked until the commit: those of the tasks above it, and its own.

    On SQLite the transaction itself is the lock. Without a budget of its own, the task has none.
    """
    # Read before the locks: which tasks are above one never changes.
    ancestors: Sequence[str] = await tx.scalar(select(budgets.c.ancestors).where(budgets.c.task_id == task_id)) or ()
    # In the order of their ids, as everybody locks them.
    query = select(budgets).where(budgets.c.task_id.in_((*ancestors, task_id))).order_by(budgets.c.task_id)
    rows: list[Row] = [row_to_dict(row) for row in await tx.all(query.with_for_update())]
    return rows if any(row["task_id"] == task_id for row in rows) else []


def _ids(chain: Sequence[Row]) -> list[str]:
    return [row["task_id"] for row in chain]


def _tokens_left(budget: Row) -> int:
    return int(budget["max_tokens"] - budget["used_tokens"] - budget["reserved_tokens"])


def _bound_cost(request: ReservationRequest, tokens: int, chain: Sequence[Row]) -> float:
    """Return the highest cost of a call in US dollars; raise ``budget_exhausted`` when it exceeds a budget."""
    cost = tokens * (request.token_usd or 0.0)
    for budget in chain:
        _check_cost(request, cost, budget)
    return cost


def _check_cost(request: ReservationRequest, cost: float, budget: Row) -> None:
    limit = budget["max_cost_usd"]
    if limit is None:
        return
    if request.token_usd is None:
        raise OctoError(
            f"The price of {request.model} is unknown, so budget.max_cost_usd cannot be enforced. Omit it and limit"
            " the tokens instead.",
            code="budget_exhausted",
        )
    committed = budget["used_cost_usd"] + budget["reserved_cost_usd"]
    if committed + cost > limit:
        raise OctoError(
            f"The task may cost {limit:g} US dollars; {committed:g} are used or reserved, and this call may cost"
            f" {cost:g}.",
            code="budget_exhausted",
        )


def encode_journal_entry(answer: msgspec.Raw) -> bytes | None:
    """Return the journal entry for an answer; ``None`` for JSON's null."""
    # Null means that the call got no complete answer. It is not journaled, so a repeat calls the model again.
    data = bytes(answer)
    return None if data in (b"", b"null") else data


DAY_SECONDS = 86_400.0
MAX_USAGE_ROWS = 200
"""Rows of a report; days are at most as many as the query asks for, and arms and models are few."""


class UsageReader:
    """Reads usage, by day (UTC), arm or model."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def read(self, tenant: str, by: UsageBy, days: int) -> UsageReport:
        """Return what a tenant used in the last ``days`` days (UTC), today included.

        Days are in order, and everything else has the costliest first.
        """
        today = self._clock.now() // DAY_SECONDS * DAY_SECONDS
        since = today - (days - 1) * DAY_SECONDS
        group = _group(by, since, days)
        cost = func.sum(reservations.c.used_cost_usd)
        tokens = func.sum(reservations.c.used_tokens)
        query = (
            select(group.label("name"), func.count().label("calls"), tokens.label("tokens"), cost.label("cost"))
            .select_from(
                reservations.join(tasks, tasks.c.task_id == reservations.c.task_id).outerjoin(
                    steps, and_(steps.c.task_id == reservations.c.task_id, steps.c.step == reservations.c.step)
                )
            )
            .where(tasks.c.tenant == tenant, reservations.c.state == "settled", reservations.c.created_at >= since)
            .group_by(group)
            .order_by(*((group,) if by == "day" else (cost.desc(), tokens.desc(), group)))
            .limit(MAX_USAGE_ROWS)
        )
        async with self._db.read() as conn:
            rows = await conn.all(query)
        return UsageReport(
            by,
            format_rfc3339(since),
            tuple(
                UsageRow(_name(by, since, row["name"]), int(row["calls"]), int(row["tokens"]), float(row["cost"]))
                for row in rows
            ),
        )


def _group(by: UsageBy, since: float, days: int) -> ColumnElement[Any]:
    if by == "model":
        return reservations.c.model
    if by == "arm":
        return func.coalesce(steps.c.arm, "")
    # As cases: SQLite and PostgreSQL have no common way to round a time down.
    ends = [(reservations.c.created_at < since + (day + 1) * DAY_SECONDS, literal(day)) for day in range(days - 1)]
    return case(*ends, else_=literal(days - 1)) if ends else literal(0)


def _name(by: UsageBy, since: float, value: Any) -> str:
    return format_rfc3339(since + int(value) * DAY_SECONDS)[:10] if by == "day" else str(value)
