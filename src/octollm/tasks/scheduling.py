"""Which waiting tasks run next: fair shares between tenants, priority within one, and limits of concurrency.

A plain rule over values; :mod:`octollm.tasks.leases` reads them and writes the outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_PRIORITY = 100
"""Priorities are from -100 to 100. They order the tasks of one tenant."""
MAX_GENERATIONS = 8
"""Generations of sub-tasks below a root."""


class WaitingTask(NamedTuple):
    """A task that no worker holds."""

    task_id: str
    tenant: str
    cred: str
    priority: int
    created_at: float
    generation: int = 0
    """How far it is below its root. A sub-task is outside of the limits: a task that runs may wait for it."""


@dataclass(frozen=True, slots=True)
class SharePolicy:
    """How running tasks are shared out.

    A tenant without a weight has 1. At most ``max_per_tenant`` tasks of a tenant, and ``max_per_key`` of one
    credential, run at a time on all replicas together; 0 is no limit.
    """

    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    max_per_tenant: int = 0
    max_per_key: int = 0


def places_of(max_tasks: int, max_subtasks: int) -> tuple[int, ...]:
    """Return how many tasks of each generation a worker runs at a time, the roots first.

    A task whose arm waits for its sub-tasks keeps its place, so each generation has places of its own: nothing else
    can hold those that it waits for. A task of the last generation waits for nobody and ends, which frees a place of
    its generation, so that those of the one above go on, up to the root. This holds for each worker by itself, and
    so for any number of them; the limits of tenants and keys count roots only.
    """
    return (max_tasks, *([max_subtasks] * MAX_GENERATIONS))


def choose_tasks(
    waiting: Sequence[WaitingTask], running: Mapping[tuple[str, str], int], slots: int, policy: SharePolicy
) -> list[WaitingTask]:
    """Return up to ``slots`` tasks of one generation to start, in order.

    ``running`` counts the running tasks by tenant and credential, without sub-tasks.

    The next slot goes to the tenant with the fewest running tasks for its weight, and among equals to the one whose
    next task is the oldest. Of a tenant's tasks the one with the highest priority is next, then the oldest. So a tenant
    without a running task is served before any other one gets a further slot, however many tasks those have.
    """
    queues: dict[str, list[WaitingTask]] = {}
    for task in sorted(waiting, key=lambda each: (-each.priority, each.created_at, each.task_id)):
        queues.setdefault(task.tenant, []).append(task)
    by_tenant: Counter[str] = Counter()
    for (tenant, _cred), count in running.items():
        by_tenant[tenant] += count
    by_key = Counter(running)
    subtasks: Counter[str] = Counter()
    chosen: list[WaitingTask] = []
    while len(chosen) < slots:
        heads: list[tuple[float, float, str, WaitingTask]] = []
        for tenant, queue in queues.items():
            is_full = bool(policy.max_per_tenant) and by_tenant[tenant] >= policy.max_per_tenant
            allowed = (each for each in queue if each.generation or not (is_full or _is_key_full(each, by_key, policy)))
            head = next(allowed, None)
            if head is not None:
                load = (by_tenant[tenant] + subtasks[tenant]) / policy.weights.get(tenant, 1.0)
                heads.append((load, head.created_at, tenant, head))
        if not heads:
            break
        *_, tenant, task = min(heads, key=lambda each: each[:3])
        queues[tenant].remove(task)
        if task.generation:
            subtasks[tenant] += 1
        else:
            by_tenant[tenant] += 1
            by_key[tenant, task.cred] += 1
        chosen.append(task)
    return chosen


def _is_key_full(task: WaitingTask, by_key: Mapping[tuple[str, str], int], policy: SharePolicy) -> bool:
    return bool(policy.max_per_key) and by_key[task.tenant, task.cred] >= policy.max_per_key
