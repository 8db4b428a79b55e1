"""Which waiting tasks run next: shares, limits, and that nobody starves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from octollm.tasks.scheduling import SharePolicy, WaitingTask, choose_tasks

TENANTS = ("a", "b", "c", "d")


@st.composite
def queues(draw: st.DrawFn) -> list[WaitingTask]:
    made = draw(
        st.lists(
            st.tuples(
                st.sampled_from(TENANTS), st.sampled_from(("k1", "k2")), st.integers(-100, 100), st.floats(0, 1000)
            ),
            max_size=40,
        )
    )
    return [WaitingTask(f"task-{n}", *each) for n, each in enumerate(made)]


running_tasks = st.dictionaries(
    st.tuples(st.sampled_from(TENANTS), st.sampled_from(("k1", "k2"))), st.integers(0, 20), max_size=8
)
policies = st.builds(
    SharePolicy,
    st.dictionaries(st.sampled_from(TENANTS), st.sampled_from((0.1, 1.0, 2.0, 7.0))),
    st.integers(0, 5),
    st.integers(0, 5),
)


@given(queues(), running_tasks, st.integers(0, 30), policies)
def test_limits_hold_and_no_slot_stays_empty(
    waiting: list[WaitingTask], running: dict[tuple[str, str], int], slots: int, policy: SharePolicy
) -> None:
    chosen = choose_tasks(waiting, running, slots, policy)
    assert len(chosen) == len(set(chosen)) <= slots
    assert set(chosen) <= set(waiting)
    by_key = Counter(running)
    by_key.update((task.tenant, task.cred) for task in chosen)
    for task in chosen:
        tenant = sum(count for (name, _), count in by_key.items() if name == task.tenant)
        assert not policy.max_per_tenant or tenant <= policy.max_per_tenant
        assert not policy.max_per_key or by_key[task.tenant, task.cred] <= policy.max_per_key
    if len(chosen) < slots:
        for task in set(waiting) - set(chosen):
            tenant = sum(count for (name, _), count in by_key.items() if name == task.tenant)
            assert (policy.max_per_tenant and tenant >= policy.max_per_tenant) or (
                policy.max_per_key and by_key[task.tenant, task.cred] >= policy.max_per_key
            )


@given(queues(), running_tasks, st.integers(1, 30), policies)
def test_a_tenants_tasks_start_by_priority_and_age(
    waiting: list[WaitingTask], running: dict[tuple[str, str], int], slots: int, policy: SharePolicy
) -> None:
    chosen = choose_tasks(waiting, running, slots, policy)
    for task in chosen:
        for other in waiting:
            if (other.tenant, other.cred) == (task.tenant, task.cred) and other not in chosen:
                assert (-task.priority, task.created_at) <= (-other.priority, other.created_at)


@given(queues(), running_tasks, st.integers(1, 30))
def test_a_tenant_without_a_running_task_comes_first(
    waiting: list[WaitingTask], running: dict[tuple[str, str], int], slots: int
) -> None:
    busy = {tenant for (tenant, _), count in running.items() if count}
    idle = {task.tenant for task in waiting} - busy
    chosen = choose_tasks(waiting, running, slots, SharePolicy())
    assert {task.tenant for task in chosen[: len(idle)]} == idle or len(idle) > slots


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 60))
def test_shares_are_by_weight(first: int, second: int, slots: int) -> None:
    waiting = [WaitingTask(f"{tenant}-{n}", tenant, "k", 0, n) for tenant in ("a", "b") for n in range(slots)]
    got = Counter(task.tenant for task in choose_tasks(waiting, {}, slots, SharePolicy({"a": first, "b": second})))
    assert abs(got["a"] - slots * first / (first + second)) <= 1


def test_nobody_starves_while_a_flood_goes_on() -> None:
    """One slot that comes free at a time: of a thousand tenants each is served once before any is served again."""
    waiting = [WaitingTask(f"flood-{n}", "flood", "k", 100, 0.0) for n in range(2000)]
    waiting += [WaitingTask(f"task-{n}", f"tenant-{n}", "k", -100, 1.0 + n) for n in range(50)]
    running: Counter[tuple[str, str]] = Counter({("flood", "k"): 8})
    served: list[str] = []
    for _ in range(60):
        (task,) = choose_tasks(waiting, running, 1, SharePolicy())
        waiting.remove(task)
        served.append(task.tenant)
        running[task.tenant, task.cred] += 1
    assert served[:50] == [f"tenant-{n}" for n in range(50)]
