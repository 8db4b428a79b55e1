"""Trees of tasks without HTTP, on both databases: one budget, and an end that reaches what is below."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from task_kit import TENANT, TaskKit

from octollm.contracts.task import Budget, Plan, Task, Usage
from octollm.errors import OctoError
from octollm.storage import Transaction
from octollm.tasks import family as family_module
from octollm.tasks.changes import NewTask
from octollm.tasks.family import TaskFamily
from octollm.tasks.ledger import ReservationRequest
from octollm.tasks.store import MAX_CHILDREN


async def child_of(kit: TaskKit, parent: str, *, max_tokens: int = 1000, **contract: Any) -> str:
    """Store a sub-task as a submission does."""
    family, share = TaskFamily(kit.db, kit.store), await kit.ledger.share(parent)
    task_id = f"task-{kit.ids.hex()}"

    async def lock(tx: Transaction) -> None:
        await family.lock_parent(tx, parent, share.ancestors[0])

    task = Task("part of it", budget=Budget(max_tokens=max_tokens), parent_task_id=parent, **contract)
    ends_at = kit.clock.now() + 600
    new = NewTask(task_id, TENANT, "ada", "key-1", "", task, "corr", "", ends_at, ancestors=share.ancestors)
    await kit.store.create(new, lock)
    return task_id


async def reserve(kit: TaskKit, task_id: str, key: str, tokens: int, price: float | None = None) -> str:
    request = ReservationRequest(TENANT, task_id, "a", 1, None, f"{task_id}:{key}", "m", tokens - 20, 20, price)
    return (await kit.ledger.reserve(request)).id


async def used(kit: TaskKit, *task_ids: str) -> list[int]:
    return [(await kit.ledger.usage(task_id)).total_tokens for task_id in task_ids]


async def test_a_tree_shares_one_budget_and_never_exceeds_it(each_kit: TaskKit) -> None:
    kit = each_kit
    root = await kit.submit(budget=Budget(max_tokens=500))
    children = [await child_of(kit, root, max_tokens=400) for _ in range(3)]
    grandchild = await child_of(kit, children[0], max_tokens=400)
    everybody = [root, *children, grandchild]
    assert (await kit.ledger.share(grandchild)).ancestors == (root, children[0], grandchild)

    async def spend(number: int) -> int:
        task_id = everybody[number % len(everybody)]
        try:
            held = await reserve(kit, task_id, f"{number}", 60)
        except OctoError as error:
            assert error.code == "budget_exhausted"
            return 0
        await kit.ledger.settle(held, Usage(40, 20), b"{}")
        return 60

    spent = sum(await asyncio.gather(*(spend(number) for number in range(25))))
    assert spent == 480, "eight calls of 60 fit into 500"
    assert await used(kit, root) == [spent], "the root has what all of them used, once"
    own = await used(kit, *children, grandchild)
    assert own[0] >= own[3], "a task has what those below it used"
    assert (await kit.store.view(root, TENANT)).usage.total_tokens == spent


async def test_a_cost_counts_for_every_task_above(each_kit: TaskKit) -> None:
    kit = each_kit
    root = await kit.submit(budget=Budget(max_tokens=10_000, max_cost_usd=5.0))
    child = await child_of(kit, root, max_tokens=10_000)
    held = await reserve(kit, child, "one", 100, 0.04)
    with pytest.raises(OctoError, match="may cost 5 US dollars"):
        await reserve(kit, root, "two", 100, 0.04)
    with pytest.raises(OctoError, match="price of m is unknown"):
        await reserve(kit, child, "three", 100)
    async with kit.db.transaction() as tx:
        # The call was cut off: it counts at its bound, on every level.
        await kit.ledger.settle_open(tx, child)
    assert [(await kit.ledger.usage(each)).cost_usd for each in (root, child)] == [4.0, 4.0]
    await kit.ledger.settle(held, Usage(1, 1, 0.1), None)
    assert await used(kit, root, child) == [100, 100], "a late settlement changes nothing"


async def test_a_sub_task_may_have_an_even_share_of_what_is_left(each_kit: TaskKit) -> None:
    kit = each_kit
    root = await kit.submit(budget=Budget(max_tokens=500))
    child = await child_of(kit, root, max_tokens=300)
    await reserve(kit, child, "one", 100)
    share = await kit.ledger.share(root)
    assert (share.tokens, share.share) == (400, 400)
    assert (await kit.ledger.share(child)).tokens == 200, "its own limit is tighter than that of its parent"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_what_is_to_end_with_its_parent_is_found_once_that_has_ended(each_kit: TaskKit, status: Any) -> None:
    kit = each_kit
    family = TaskFamily(kit.db, kit.store)
    root = await kit.submit(budget=Budget(max_tokens=500))
    kit.clock.advance(1)
    child, kept = await child_of(kit, root), await child_of(kit, root, on_parent_end="continue")
    assert await family.orphans(10) == []
    view = await kit.store.view(root, TENANT)
    assert {each.task_id for each in view.children} == {child, kept}
    claimed = await kit.claim()
    await kit.store.begin_planning(claimed.task_id, claimed.epoch)
    if status == "completed":
        await kit.store.set_plan(root, Plan(()), claimed.epoch, replan=False, reasons=())
    data: dict[str, object] = {"status": status, "duration_ms": 1, "code": "internal", "reason": "x", "reasons": []}
    await kit.store.change(root, f"task.{status}", data, new_status=status, finished_at=kit.clock.now())
    [orphan] = await family.orphans(10)
    assert (orphan.task_id, orphan.reason) == (child, f"The task that it belongs to is {status}.")
    assert await family.orphans(10, parent=child) == []
    with pytest.raises(OctoError, match="parent task is"):
        await child_of(kit, root)


async def test_another_tenants_task_is_no_parent(each_kit: TaskKit) -> None:
    kit = each_kit
    root = await kit.submit()
    family = TaskFamily(kit.db, kit.store)
    assert (await family.find_parent(root, TENANT)).task_id == root
    for task_id, tenant in ((root, "globex"), ("task-" + "0" * 32, TENANT), ("a\x00b", TENANT), ("", TENANT)):
        with pytest.raises(OctoError) as caught:
            await family.find_parent(task_id, tenant)
        assert caught.value.code == "task_not_found"


async def test_a_task_has_a_bounded_number_of_sub_tasks(kit: TaskKit) -> None:
    root = await kit.submit(budget=Budget(max_tokens=500))
    for _ in range(MAX_CHILDREN):
        await child_of(kit, root)
    with pytest.raises(OctoError, match="at most"):
        await child_of(kit, root)
    assert len(await TaskFamily(kit.db, kit.store).open_children(root)) == MAX_CHILDREN


async def test_a_tree_has_a_bounded_number_of_tasks_however_many_submit_at_once(
    each_kit: TaskKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_module, "MAX_DESCENDANTS", 6)
    kit = each_kit
    root = await kit.submit(budget=Budget(max_tokens=500))
    above = [root, await child_of(kit, root), await child_of(kit, root)]

    async def submit(number: int) -> str:
        try:
            return await child_of(kit, above[number % 3])
        except OctoError as error:
            return error.code

    outcomes = await asyncio.gather(*(submit(number) for number in range(12)))
    assert outcomes.count("state_conflict") == 8
    family = TaskFamily(kit.db, kit.store)
    assert sum([len(await family.open_children(each)) for each in above]) == 6
    assert not await family.is_below(root, root)
    assert all([await family.is_below(each, root) for each in outcomes if each != "state_conflict"])
