from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from octollm.rpc.idempotency import (
    KEEP_SECONDS,
    LEASE_SECONDS,
    Claimed,
    Conflict,
    InFlight,
    KeyOf,
    NestedKeys,
    Stored,
    Unknown,
)
from octollm.rpc.idempotency_sql import MAX_ANSWER, SqlIdempotency
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate

KEY = KeyOf("t1", "user", "coder", "execute", "k")


class HandClock:
    def __init__(self) -> None:
        self.time = 1e9

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def db(clock: HandClock) -> AsyncGenerator[Database]:
    async with open_database("memory://", clock=clock) as database:
        await migrate(database, "orchestrator")
        yield database


@pytest.fixture
def store(db: Database) -> SqlIdempotency:
    return SqlIdempotency(db, "holder")


async def claim(store: SqlIdempotency, key: KeyOf = KEY, body: str = "b", *, repeatable: bool = True) -> object:
    return await store.claim(key, body, repeatable=repeatable, bearer="")


async def test_a_key_is_claimed_once_and_its_answer_is_kept(store: SqlIdempotency) -> None:
    found = await asyncio.gather(*(claim(store) for _ in range(20)))
    assert found.count(Claimed(1)) == 1
    assert found.count(InFlight()) == 19
    await store.complete(KEY, 1, 200, b"answer")
    assert await claim(store) == Stored(200, b"answer")
    assert await claim(store, body="other") == Conflict()


@pytest.mark.parametrize("field", ["tenant", "subject", "service", "operation", "key"])
async def test_a_key_is_nobody_elses(store: SqlIdempotency, field: str) -> None:
    await claim(store)
    await store.complete(KEY, 1, 200, b"mine")
    parts = {name: getattr(KEY, name) for name in ("tenant", "subject", "service", "operation", "key")}
    assert await claim(store, KeyOf(**{**parts, field: "another"})) == Claimed(1)


async def test_a_released_key_may_be_claimed_again(store: SqlIdempotency) -> None:
    await claim(store)
    await store.release(KEY, 1)
    assert await claim(store) == Claimed(1)


async def test_a_dead_holders_repeatable_call_is_done_again_and_its_answer_is_refused(
    store: SqlIdempotency, clock: HandClock
) -> None:
    await claim(store)
    clock.time += LEASE_SECONDS - 1
    await store.renew(KEY, 1)
    clock.time += LEASE_SECONDS - 1
    assert await claim(store) == InFlight()
    clock.time += LEASE_SECONDS
    assert await claim(store) == Claimed(2)
    await store.complete(KEY, 1, 200, b"from the dead")
    assert await claim(store) == InFlight()
    await store.complete(KEY, 2, 200, b"right")
    assert await claim(store) == Stored(200, b"right")


async def test_a_dead_holders_once_call_is_never_done_again(store: SqlIdempotency, clock: HandClock) -> None:
    await claim(store, repeatable=False)
    clock.time += LEASE_SECONDS + 1
    assert await claim(store, repeatable=False) == Unknown()
    assert await claim(store, repeatable=False) == Unknown()


async def test_old_keys_are_dropped_and_huge_answers_are_not_kept(store: SqlIdempotency, clock: HandClock) -> None:
    await claim(store)
    await store.complete(KEY, 1, 200, b"x" * (MAX_ANSWER + 1))
    assert await claim(store) == Claimed(1)
    await store.complete(KEY, 1, 200, b"x")
    clock.time += KEEP_SECONDS + 1
    await claim(store, KeyOf("t", "s", "x", "y", "new"))
    assert await claim(store) == Claimed(1)


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
