from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import msgspec
import pytest
from databases import Backend
from sqlalchemy import delete, update

from octollm.clock import SystemClock
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.idempotency import (
    LEASE_SECONDS,
    MAX_STORED_BYTES,
    RETENTION_SECONDS,
    AlreadyCompleted,
    HeldClaim,
    IdempotencyKey,
    IdempotentHandler,
    InFlight,
    KeyConflict,
    KeyedCall,
    NestedKeys,
    NewClaim,
    OutcomeUnknown,
    StoredResponse,
)
from octollm.rpc.idempotency_sql import PRUNE_EVERY, SqlIdempotencyStore
from octollm.rpc.responses import BufferedResponse
from octollm.storage import Database, open_database
from octollm.storage.database import Rows
from octollm.storage.migrations import migrate
from octollm.storage.tables import idempotency as table
from octollm.storage.tables import tasks
from octollm.testing import wait_until

KEY = IdempotencyKey("t1", "user", "coder", "execute", "k")
TASK_ROW = {
    "task_id": "task-1",
    "tenant": "t1",
    "sub": "user",
    "cred": "key-1",
    "authority": "",
    "goal": "do it",
    "contract": {},
    "correlation_id": "corr-1",
    "traceparent": "",
    "status": "running",
    "run": 7,
    "created_at": 1.0,
    "updated_at": 1.0,
}


@pytest.fixture
async def db(backend: Backend) -> AsyncGenerator[Database]:
    async with open_database(backend.url("octollm_orchestrator"), clock=SystemClock()) as database:
        await migrate(database, "orchestrator")
        yield database


async def pass_time(db: Database, seconds: float) -> None:
    """Move every stored time into the past: for a server's own clock cannot be set."""
    moved = {column.name: column - seconds for column in (table.c.lease_until, table.c.created_at)}
    async with db.transaction() as tx:
        await tx.execute(update(table).values(moved))


@pytest.fixture
def store(db: Database) -> SqlIdempotencyStore:
    return SqlIdempotencyStore(db, "holder")


async def claim(
    store: SqlIdempotencyStore, key: IdempotencyKey = KEY, body: str = "b", *, repeatable: bool = True
) -> object:
    return await store.claim(key, body, idempotent=repeatable, bearer="")


async def claimed_epoch(store: SqlIdempotencyStore, key: IdempotencyKey = KEY) -> int:
    """Claim a free key and return the epoch of the claim."""
    outcome = await claim(store, key)
    assert isinstance(outcome, HeldClaim)
    return outcome.epoch


async def test_a_key_is_claimed_once_and_its_answer_is_kept(store: SqlIdempotencyStore) -> None:
    found = await asyncio.gather(*(claim(store) for _ in range(20)))
    [epoch] = [outcome.epoch for outcome in found if isinstance(outcome, HeldClaim)]
    assert found.count(InFlight()) == 19
    await store.complete(KEY, epoch, StoredResponse(200, b"answer", {"etag": "1"}))
    assert await claim(store) == AlreadyCompleted(StoredResponse(200, b"answer", {"etag": "1"}))
    assert await claim(store, body="other") == KeyConflict()


@pytest.mark.postgres
async def test_one_of_many_claimers_in_two_processes_wins_each_time(postgres: Backend) -> None:
    url = postgres.url("octollm_orchestrator")
    lines = (
        "import asyncio, sys",
        "from octollm.clock import SystemClock",
        "from octollm.rpc.idempotency import HeldClaim, IdempotencyKey",
        "from octollm.rpc.idempotency_sql import SqlIdempotencyStore",
        "from octollm.storage import open_database",
        "async def main():",
        f"    async with open_database({url!r}, clock=SystemClock()) as db:",
        "        store = SqlIdempotencyStore(db, 'x')",
        "        print('ready', flush=True)",
        "        await asyncio.to_thread(sys.stdin.readline)",
        "        keys = [IdempotencyKey('t', 'u', 'coder', 'execute', str(n % 10)) for n in range(100)]",
        "        found = await asyncio.gather(*(store.claim(k, 'b', idempotent=True, bearer='') for k in keys))",
        "        print(sum(isinstance(outcome, HeldClaim) for outcome in found))",
        "asyncio.run(main())",
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "\n".join(lines),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    assert sum(int(output) for output, _ in outputs) == 10


@pytest.mark.parametrize("field", ["tenant", "subject", "service", "operation", "key"])
async def test_a_key_is_nobody_elses(store: SqlIdempotencyStore, field: str) -> None:
    await store.complete(KEY, await claimed_epoch(store), StoredResponse(200, b"mine"))
    parts = {name: getattr(KEY, name) for name in ("tenant", "subject", "service", "operation", "key")}
    assert await claimed_epoch(store, IdempotencyKey(**{**parts, field: "another"}))


async def test_a_released_key_may_be_claimed_again(store: SqlIdempotencyStore) -> None:
    await store.release(KEY, await claimed_epoch(store))
    assert await claimed_epoch(store)


async def test_a_claim_of_a_dead_holder_does_not_outlive_a_clock_that_was_set_back(
    store: SqlIdempotencyStore, db: Database
) -> None:
    epoch = await claimed_epoch(store)
    async with db.transaction() as tx:
        await tx.execute(update(table).values(lease_until=table.c.lease_until + 3600))
    assert await claim(store) == HeldClaim(epoch + 1)


async def test_a_key_that_is_claimed_anew_never_gets_the_epoch_of_a_lost_claim(
    store: SqlIdempotencyStore, db: Database
) -> None:
    """A crash of the database server may take an unfinished claim along; its holder still runs."""
    lost = await claimed_epoch(store)
    async with db.transaction() as tx:
        await tx.execute(delete(table))
    await pass_clock_tick()
    epoch = await claimed_epoch(store)
    assert epoch > lost
    await store.complete(KEY, lost, StoredResponse(200, b"late"))
    assert await claim(store) == InFlight()
    await store.complete(KEY, epoch, StoredResponse(200, b"right"))
    assert await claim(store) == AlreadyCompleted(StoredResponse(200, b"right"))


async def pass_clock_tick() -> None:
    """Wait until a millisecond, the resolution of an epoch, has passed."""
    began = time.monotonic()
    await wait_until(lambda: time.monotonic() > began + 0.002, description="two milliseconds have passed")


@pytest.mark.postgres
@pytest.mark.parametrize(("idempotent", "setting"), [(True, "off"), (False, "on")])
async def test_only_the_commits_of_an_at_most_once_call_wait_for_the_disk(
    postgres: Backend, idempotent: bool, setting: str
) -> None:
    async with open_database(postgres.url("octollm_orchestrator"), clock=SystemClock()) as db:
        await migrate(db, "orchestrator")
        recorded: list[str] = []
        assert db.direct_pool is not None
        assert db.lazy_pool is not None
        for pool in (db.direct_pool, db.lazy_pool):
            [[value]] = await pool.fetch("SELECT current_setting('synchronous_commit')")
            pool.fetch = partial(_record_fetch, pool.fetch, recorded, str(value))  # type: ignore[method-assign]
        store = SqlIdempotencyStore(db, "holder")
        outcome = await claim(store, repeatable=idempotent)
        assert isinstance(outcome, HeldClaim)
        await store.complete(KEY, outcome.epoch, StoredResponse(200, b"x"), idempotent=idempotent)
        assert recorded == [setting, setting]


async def _record_fetch(
    fetch: Callable[..., Awaitable[Rows]], recorded: list[str], setting: str, statement: str, *parameters: object
) -> Rows:
    recorded.append(setting)
    return await fetch(statement, *parameters)


async def test_a_claim_for_an_older_run_of_a_task_is_refused(store: SqlIdempotencyStore, db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(tx.insert(tasks).values(**TASK_ROW))
    held = [
        NewClaim(msgspec.structs.replace(KEY, key=f"k{epoch}"), "b", True, "task-1", epoch) for epoch in (6, 7, 8, None)
    ]
    outcomes = await store.claim_many(held)
    assert [type(outcome) for outcome in outcomes] == [OctoError, HeldClaim, HeldClaim, HeldClaim]
    assert isinstance(outcomes[0], OctoError)
    assert outcomes[0].code == "fence_lost"
    # The stale claim left nothing: the present run may use the key.
    assert isinstance((await store.claim_many([msgspec.structs.replace(held[0], epoch=7)]))[0], HeldClaim)
    # A stale run learns nothing of a key that is claimed, either.
    [again] = await store.claim_many([msgspec.structs.replace(held[1], epoch=6)])
    assert isinstance(again, OctoError)
    assert again.code == "fence_lost"


async def test_a_dead_holders_repeatable_call_is_done_again_and_its_answer_is_refused(
    store: SqlIdempotencyStore, db: Database
) -> None:
    epoch = await claimed_epoch(store)
    await pass_time(db, LEASE_SECONDS - 2)
    await store.renew([])
    await store.renew([(KEY, epoch)])
    await pass_time(db, LEASE_SECONDS - 2)
    assert await claim(store) == InFlight()
    await pass_time(db, LEASE_SECONDS)
    assert await claim(store) == HeldClaim(epoch + 1)
    await store.complete(KEY, epoch, StoredResponse(200, b"from the dead"))
    assert await claim(store) == InFlight()
    await store.complete(KEY, epoch + 1, StoredResponse(200, b"right"))
    assert await claim(store) == AlreadyCompleted(StoredResponse(200, b"right"))


async def test_a_dead_holders_once_call_is_never_done_again(store: SqlIdempotencyStore, db: Database) -> None:
    await claim(store, repeatable=False)
    await pass_time(db, LEASE_SECONDS + 1)
    assert await claim(store, repeatable=False) == OutcomeUnknown()
    assert await claim(store, repeatable=False) == OutcomeUnknown()


@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_response_too_large_to_store_never_lets_an_at_most_once_call_run_again(
    store: SqlIdempotencyStore, db: Database, idempotent: bool
) -> None:
    runs: list[int] = []

    async def work() -> BufferedResponse:
        runs.append(1)
        return BufferedResponse(200, b"x" * (MAX_STORED_BYTES + 1), [])

    handler = IdempotentHandler(store)
    call = KeyedCall(KEY, "digest", idempotent, "", "req-1")
    deadline = Deadline.after(SystemClock(), 5)
    assert len((await handler.run(call, work, deadline)).body) == MAX_STORED_BYTES + 1
    await pass_time(db, LEASE_SECONDS + 1)
    if idempotent:
        await handler.run(call, work, deadline)
        assert len(runs) == 2
        return
    with pytest.raises(OctoError) as caught:
        await handler.run(call, work, deadline)
    assert (caught.value.code, len(runs)) == ("outcome_unknown", 1)


async def test_old_keys_are_dropped_and_huge_answers_are_not_kept(store: SqlIdempotencyStore, db: Database) -> None:
    await store.complete(KEY, await claimed_epoch(store), StoredResponse(200, b"x" * (MAX_STORED_BYTES + 1)))
    await store.complete(KEY, await claimed_epoch(store), StoredResponse(200, b"x"))
    await pass_time(db, RETENTION_SECONDS + 1)
    # It is not looked for with every claim, but soon enough.
    await asyncio.gather(
        *(claim(store, IdempotencyKey("t", "s", "x", "y", f"new-{number}")) for number in range(PRUNE_EVERY))
    )
    assert await claimed_epoch(store)


def test_nested_keys_repeat_with_their_parent() -> None:
    def made(parent: str) -> list[str]:
        keys = NestedKeys(parent)
        return [
            keys.next("judge", "validate", b"1"),
            keys.next("judge", "validate", b"1"),
            keys.next("judge", "x", b"1"),
        ]

    assert made("p") == made("p")
    assert len(set(made("p")) | set(made("q"))) == 6
