"""How many calls between services the simplest code task makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from gateway_client import GatewayClient
from internal_calls import GOAL, count_calls, measure_watchers, reply_with_usable_plan
from test_traces import spans_of

pytestmark = pytest.mark.sandbox
MAX_CALLS = 24
MAX_HISTORY_READS = 10
"""The gateway reads a task's events once for all who watch it: at the beginning, and after a gap."""


async def test_the_simplest_code_task_makes_few_internal_calls(gateway: GatewayClient, script: Any) -> None:
    script.reply = reply_with_usable_plan
    for _ in range(3):
        before = await count_calls(gateway)
        task = await gateway.run(GOAL)
        assert task["status"] == "completed"
        # On a busy machine a call may be lost and repeated, which is not what is counted.
        if {step["attempt"] for step in task["steps"]} == {1}:
            break
    spans = await spans_of(gateway, task["task_id"])
    # Calls about keys go out in groups, in no task's trace; the metrics count them.
    calls = Counter({name: n for name, n in (await count_calls(gateway) - before).items() if ".idempotency." in name})
    calls += Counter(
        f"{span['service']} → {span['name']}"
        for span in spans
        # A call to the provider is none between services; those about keys are counted already.
        if span["kind"] == "client" and not span["name"].startswith(("model ", "orchestrator.idempotency."))
    )
    table = "\n".join(f"{count:4} {call}" for call, count in sorted(calls.items()))
    assert calls["orchestrator → coder.execute"] == 1, table
    assert not [call for call in calls if call.startswith("executor → orchestrator.idempotency")], table
    assert not [call for call in calls if call.startswith("judge → orchestrator.files")], table
    assert calls.total() <= MAX_CALLS, f"{calls.total()} internal calls:\n{table}"


async def test_what_watchers_cost_the_orchestrator(gateway: GatewayClient, script: Any) -> None:
    script.reply = reply_with_usable_plan
    await gateway.run(GOAL)  # the gateway's token for its caller is fetched once
    cost = await measure_watchers(gateway, 20)
    # Each connection is authorised by one read of the task.
    assert cost.calls.pop("reflex → orchestrator.tasks.read") == cost.watchers
    assert cost.calls.pop("reflex → orchestrator.tasks.history") <= MAX_HISTORY_READS
    assert not cost.calls
