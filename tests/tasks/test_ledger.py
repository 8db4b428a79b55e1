"""The budget ledger: what it grants, and that reserved and spent tokens never exceed the budget."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import pytest
from databases import Backend
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from sqlalchemy import select, text, update
from task_kit import open_task_database

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.task import Budget, Task, Usage
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.storage import Database, Transaction, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import budgets, tasks
from octollm.tasks.changes import NewTask
from octollm.tasks.ledger import (
    MIN_COMPLETION_TOKENS,
    BudgetLedger,
    Reservation,
    ReservationRequest,
)
from octollm.tasks.store import TaskStore
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
MAX_TOKENS = 1000
T = TypeVar("T")
REQUEST = ReservationRequest("t", "", "s1", 1, None, "k1", "fake", 100, 200)


@dataclass(frozen=True)
class StoredBudget:
    """The budget of a task as it is stored."""

    used: int
    reserved: int
    used_cost: float
    reserved_cost: float
    prompt: int
    completion: int


@dataclass(frozen=True)
class LedgerKit:
    """A ledger over a database in memory, and one task of a tenant of its own: the journal is by tenant and key."""

    db: Database
    ledger: BudgetLedger
    task_id: str
    tenant: str

    async def reserve(
        self, key: str = "k1", prompt: int = 100, completion: int | None = 200, **more: Any
    ) -> Reservation:
        own = {"task_id": self.task_id, "tenant": self.tenant, **more}
        request = replace(REQUEST, key=key, prompt_tokens=prompt, max_completion_tokens=completion, **own)
        return await self.ledger.reserve(request)

    async def stored_budget(self) -> StoredBudget:
        async with self.db.read() as conn:
            row = await conn.first(select(budgets).where(budgets.c.task_id == self.task_id))
        assert row is not None
        return StoredBudget(
            row["used_tokens"],
            row["reserved_tokens"],
            row["used_cost_usd"],
            row["reserved_cost_usd"],
            row["prompt_tokens"],
            row["completion_tokens"],
        )


@contextlib.asynccontextmanager
async def open_ledger_database() -> AsyncGenerator[Database]:
    async with open_task_database(CLOCK) as db:
        yield db


async def add_task(db: Database, budget: Budget) -> LedgerKit:
    task_id, tenant = f"task-{IDS.hex()}", IDS.hex()
    store = TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK)
    task = Task("do it", budget=budget)
    await store.create(NewTask(task_id, tenant, "s", "c", "", task, "corr", "", CLOCK.now() + 600))
    return LedgerKit(db, BudgetLedger(db, CLOCK, IDS), task_id, tenant)


@contextlib.asynccontextmanager
async def open_ledger_kit(budget: Budget) -> AsyncGenerator[LedgerKit]:
    async with open_ledger_database() as db:
        yield await add_task(db, budget)


@pytest.fixture
async def kit() -> AsyncGenerator[LedgerKit]:
    async with open_ledger_kit(Budget(max_tokens=MAX_TOKENS)) as opened:
        yield opened


async def test_a_call_is_granted_what_it_asks_for_and_pays_what_it_used(kit: LedgerKit) -> None:
    reserved = await kit.reserve()
    assert (reserved.max_completion_tokens, reserved.journal) == (200, None)
    assert await kit.stored_budget() == StoredBudget(0, 300, 0, 0, 0, 0)
    await kit.ledger.settle(reserved.id, Usage(90, 40), b'{"text": "yes"}')
    assert await kit.stored_budget() == StoredBudget(130, 0, 0, 0, 90, 40)
    assert await kit.ledger.usage(kit.task_id) == Usage(90, 40)


async def test_settling_again_changes_nothing(kit: LedgerKit) -> None:
    reserved = await kit.reserve()
    await kit.ledger.settle(reserved.id, Usage(90, 40), b"1")
    await kit.ledger.settle(reserved.id, Usage(500, 500), b"2")
    assert await kit.stored_budget() == StoredBudget(130, 0, 0, 0, 90, 40)
    assert (await kit.reserve()).journal == b"1"


async def test_usage_has_the_tokens_of_calls_that_were_cut_off(kit: LedgerKit) -> None:
    await kit.ledger.settle((await kit.reserve("k1")).id, Usage(90, 40), b"1")
    await kit.reserve("k2", prompt=100, completion=200)
    async with kit.db.transaction() as tx:
        await kit.ledger.settle_open(tx, kit.task_id)
    usage = await kit.ledger.usage(kit.task_id)
    assert usage == Usage(90, 40 + 300)
    assert usage.total_tokens == (await kit.stored_budget()).used


async def test_a_repeat_is_answered_from_the_journal_and_reserves_nothing(kit: LedgerKit) -> None:
    reserved = await kit.reserve()
    await kit.ledger.settle(reserved.id, Usage(90, 40), b'{"text": "yes"}')
    before = await kit.stored_budget()
    assert await kit.reserve() == Reservation("", 40, b'{"text": "yes"}')
    assert await kit.stored_budget() == before


async def test_a_call_that_failed_is_not_in_the_journal_and_returns_what_it_did_not_use(kit: LedgerKit) -> None:
    reserved = await kit.reserve()
    await kit.ledger.settle(reserved.id, Usage(), None)
    assert await kit.stored_budget() == StoredBudget(0, 0, 0, 0, 0, 0)
    assert (await kit.reserve()).journal is None


async def test_a_call_that_was_cut_off_is_paid_in_full_when_it_is_repeated(kit: LedgerKit) -> None:
    lost = await kit.reserve()
    again = await kit.reserve()
    assert again.id != lost.id
    assert await kit.stored_budget() == StoredBudget(300, 300, 0, 0, 0, 0)
    # The first one turns up after all: it was accounted for.
    await kit.ledger.settle(lost.id, Usage(1, 1), b"late")
    assert (await kit.stored_budget()).used == 300


async def test_of_calls_that_come_together_no_two_get_the_same_tokens(kit: LedgerKit) -> None:
    results = await asyncio.gather(
        *(kit.reserve(f"k{number}", 100, 300) for number in range(5)), return_exceptions=True
    )
    granted = [each for each in results if isinstance(each, Reservation)]
    refused = [each for each in results if isinstance(each, OctoError)]
    assert [each.max_completion_tokens for each in granted] == [300, 300, 100]
    assert {each.code for each in refused} == {"budget_exhausted"}
    assert (await kit.stored_budget()).reserved == MAX_TOKENS


async def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(kit: LedgerKit) -> None:
    with pytest.raises(OctoError, match=f"may use {MAX_TOKENS} tokens; 0 are used, 0 are reserved") as caught:
        await kit.reserve(prompt=MAX_TOKENS)
    assert caught.value.code == "budget_exhausted"
    assert (await kit.stored_budget()).reserved == 0


async def test_money_is_bounded_like_tokens() -> None:
    async with open_ledger_kit(Budget(max_tokens=MAX_TOKENS, max_cost_usd=0.5)) as kit:
        reserved = await kit.reserve(token_usd=0.001)
        assert (await kit.stored_budget()).reserved_cost == pytest.approx(0.3)
        with pytest.raises(OctoError, match="US dollars") as caught:
            await kit.reserve("k2", token_usd=0.001)
        assert caught.value.code == "budget_exhausted"
        await kit.ledger.settle(reserved.id, Usage(100, 100, 0.2), b"1")
        assert (await kit.stored_budget()).used_cost == pytest.approx(0.2)
        await kit.reserve("k2", token_usd=0.001)


async def test_a_model_without_a_price_is_refused_where_money_is_bounded() -> None:
    async with open_ledger_kit(Budget(max_tokens=MAX_TOKENS, max_cost_usd=0.5)) as kit:
        with pytest.raises(OctoError, match="price of fake is unknown") as caught:
            await kit.reserve(token_usd=None)
        assert caught.value.code == "budget_exhausted"


@pytest.mark.parametrize(
    ("columns", "request_", "code"),
    [
        ({"status": "cancelled"}, {}, "state_conflict"),
        ({"run": 3}, {"epoch": 2}, "fence_lost"),
        ({}, {"tenant": "another"}, "task_not_found"),
    ],
)
async def test_no_call_is_made_for_a_task_that_is_not_the_callers_to_work_on(
    kit: LedgerKit, columns: dict[str, Any], request_: dict[str, Any], code: str
) -> None:
    async with kit.db.transaction() as tx:
        await tx.execute(
            update(tasks).where(tasks.c.task_id == kit.task_id).values(status="running", **columns)
            if "status" not in columns
            else update(tasks).values(**columns)
        )
    with pytest.raises(OctoError) as caught:
        await kit.reserve(**request_)
    assert caught.value.code == code
    assert (await kit.stored_budget()).reserved == 0


async def test_a_reservation_that_never_was_is_not_found(kit: LedgerKit) -> None:
    with pytest.raises(OctoError) as caught:
        await kit.ledger.settle("nothing", Usage(), None)
    assert caught.value.code == "not_found"


async def test_a_reservation_sees_the_end_of_its_task_that_it_had_to_wait_for(postgres: Backend) -> None:
    """The end of a task locks the budget and settles what is open; a reservation must not slip in after it."""
    async with open_database(postgres.url("octollm_orchestrator"), clock=CLOCK) as db:
        await migrate(db, "orchestrator")
        store, ledger = TaskStore(db, EventLog(db, CLOCK, IDS), CLOCK), BudgetLedger(db, CLOCK, IDS)
        task = Task("token", budget=Budget(max_tokens=MAX_TOKENS))
        await store.create(NewTask("adhoc-1", "t", "s", "c", "", task, "corr", "", CLOCK.now(), kind="adhoc"))
        waiting: list[asyncio.Task[Reservation]] = []

        async def settle(tx: Transaction) -> None:
            await ledger.settle_open(tx, "adhoc-1")
            waiting.append(asyncio.create_task(ledger.reserve(replace(REQUEST, task_id="adhoc-1"))))
            await wait_until(partial(is_waiting_for_lock, db), description="the reservation waits for the budget")

        data = {"status": "completed", "duration_ms": 1, "reason": "expired"}
        await store.change("adhoc-1", "task.completed", data, new_status="completed", hook=settle)
        with pytest.raises(OctoError) as caught:
            await waiting[0]
        assert caught.value.code == "state_conflict"


async def is_waiting_for_lock(db: Database) -> bool:
    async with db.read() as conn:
        blocked = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return await conn.scalar(blocked) > 0


@dataclass
class OpenReservation:
    """A reservation of the model that the machine compares with."""

    id: str
    key: str
    tokens: int


class LedgerMachine(RuleBasedStateMachine):
    """Reservations and settlements in any order, beside a plain account of what they must come to."""

    open_ones = Bundle("open_ones")
    settled_ones = Bundle("settled_ones")

    runner: asyncio.Runner
    db: Database

    def __init__(self) -> None:
        super().__init__()
        self.used = 0
        self.open: dict[str, OpenReservation] = {}
        self.journal: dict[str, bytes] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        self.kit = self.run(add_task(self.db, Budget(max_tokens=MAX_TOKENS)))

    @rule(
        target=open_ones,
        key=st.sampled_from("abcdef"),
        prompt=st.integers(0, 400),
        completion=st.none() | st.integers(MIN_COMPLETION_TOKENS, 400),
    )
    def reserve(self, key: str, prompt: int, completion: int | None) -> Any:
        abandoned = self.open.get(key)
        try:
            reserved = self.run(self.kit.reserve(key, prompt, completion))
        except OctoError as error:
            assert error.code == "budget_exhausted"
            # A refusal leaves everything as it was, the abandoned reservation of the same call too.
            assert MAX_TOKENS - self.used - self.reserved < prompt + MIN_COMPLETION_TOKENS
            return cast("Any", multiple())
        if key in self.journal:
            assert reserved.journal == self.journal[key]
            assert reserved.id == ""
            return cast("Any", multiple())
        if abandoned is not None:
            self.used += abandoned.tokens
        taken = OpenReservation(reserved.id, key, prompt + reserved.max_completion_tokens)
        self.open[key] = taken
        assert completion is None or reserved.max_completion_tokens <= completion
        return taken

    @rule(target=settled_ones, reserved=consumes(open_ones), share=st.floats(0, 1), whole=st.booleans())
    def settle(self, reserved: OpenReservation, share: float, whole: bool) -> OpenReservation:
        used = int(reserved.tokens * share)
        answer = f"answer {reserved.id}".encode()
        self.run(self.kit.ledger.settle(reserved.id, Usage(used - used // 2, used // 2), answer if whole else None))
        if self.open.get(reserved.key) is reserved:
            del self.open[reserved.key]
            self.used += used
            if whole:
                self.journal[reserved.key] = answer
        return reserved

    @rule(reserved=settled_ones, used=st.integers(0, MAX_TOKENS))
    def settle_again(self, reserved: OpenReservation, used: int) -> None:
        self.run(self.kit.ledger.settle(reserved.id, Usage(used, used), b"another"))

    @property
    def reserved(self) -> int:
        return sum(each.tokens for each in self.open.values())

    @invariant()
    def check_balance(self) -> None:
        stored_budget = self.run(self.kit.stored_budget())
        assert (stored_budget.used, stored_budget.reserved) == (self.used, self.reserved)
        assert 0 <= stored_budget.used + stored_budget.reserved <= MAX_TOKENS


class TestLedgerMachine(LedgerMachine.TestCase):
    """Every example has a task of its own in one database: migrating a database for each would take longer."""

    settings = settings(
        max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )

    @classmethod
    def setUpClass(cls) -> None:
        LedgerMachine.runner = asyncio.Runner()
        cls.addClassCleanup(LedgerMachine.runner.close)
        stack = contextlib.AsyncExitStack()
        LedgerMachine.db = LedgerMachine.runner.run(stack.enter_async_context(open_ledger_database()))
        cls.addClassCleanup(lambda: LedgerMachine.runner.run(stack.aclose()))
