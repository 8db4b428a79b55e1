"""Idempotency keys of an arm, stored by the orchestrator: batched, with an outcome for each."""

from __future__ import annotations

import asyncio

import pytest
from orchestrator_kit import OrchestratorHarness

from octollm.errors import OctoError
from octollm.rpc.idempotency import (
    AlreadyCompleted,
    ClaimOutcome,
    HeldClaim,
    IdempotencyKey,
    InFlight,
    KeyConflict,
    StoredResponse,
)
from octollm.rpc.idempotency_remote import RemoteIdempotencyStore

MANY = 50


def key(name: str) -> IdempotencyKey:
    return IdempotencyKey("default", "user-1", "coder", "execute", name)


def remote(orch: OrchestratorHarness) -> RemoteIdempotencyStore:
    return orch.harness.base("coder").remote_idempotency_store()


async def served(orch: OrchestratorHarness, operation: str) -> float:
    """Return how many calls of an operation the orchestrator has served."""
    lines = (await orch.harness.send("orchestrator", "GET", "/metrics")).body.decode().splitlines()
    mine = [line for line in lines if line.startswith("octollm_requests_total{") and f'"{operation}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in mine)


async def test_what_comes_together_is_claimed_and_completed_together(orch: OrchestratorHarness) -> None:
    keys, bearer = remote(orch), orch.harness.token("coder:execute")

    async def claim(name: str, digest: str = "d") -> ClaimOutcome:
        return await keys.claim(key(name), digest, idempotent=True, bearer=bearer)

    found = await asyncio.gather(*(claim(f"k{number % MANY}") for number in range(2 * MANY)))
    assert [type(outcome) for outcome in found] == [HeldClaim] * MANY + [InFlight] * MANY
    epochs = [outcome.epoch for outcome in found if isinstance(outcome, HeldClaim)]
    await asyncio.gather(
        *(
            keys.complete(key(f"k{number}"), epochs[number], StoredResponse(200, f"{number}".encode(), {"etag": '"1"'}))
            for number in range(MANY)
        )
    )
    again = await asyncio.gather(*(claim(f"k{number}") for number in range(MANY)), claim("k1", "another"))
    assert again[:-1] == [
        AlreadyCompleted(StoredResponse(200, f"{number}".encode(), {"etag": '"1"'})) for number in range(MANY)
    ]
    assert again[-1] == KeyConflict()
    # 151 claims and 50 completions.
    assert 1 <= await served(orch, "idempotency.claim") <= 8
    assert 1 <= await served(orch, "idempotency.complete") <= 4


async def test_one_that_is_refused_takes_no_other_along(orch: OrchestratorHarness) -> None:
    keys, bearer = remote(orch), orch.harness.token("coder:execute")
    good, forged, wrong = await asyncio.gather(
        keys.claim(key("a"), "d", idempotent=True, bearer=bearer),
        keys.claim(key("b"), "d", idempotent=True, bearer=bearer[:-4] + "AAAA"),
        keys.claim(key(""), "d", idempotent=True, bearer=bearer),
        return_exceptions=True,
    )
    assert isinstance(good, HeldClaim)
    assert isinstance(forged, OctoError)
    assert forged.code == "token_invalid"
    assert isinstance(wrong, OctoError)


async def test_who_leaves_gives_its_key_back(orch: OrchestratorHarness) -> None:
    keys, bearer = remote(orch), orch.harness.token("coder:execute")
    leaving = asyncio.create_task(keys.claim(key("k"), "d", idempotent=True, bearer=bearer))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    async with asyncio.timeout(4):  # a lease is longer
        while not isinstance(await keys.claim(key("k"), "d", idempotent=True, bearer=bearer), HeldClaim):
            await asyncio.sleep(0.05)
