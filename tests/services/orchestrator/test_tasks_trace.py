from __future__ import annotations

import msgspec
from orchestrator_kit import OrchestratorHarness, problem

from octollm.testing import wait_until


async def test_without_the_monitor_tasks_go_on_and_the_trace_says_why_it_is_not_there(
    orch: OrchestratorHarness,
) -> None:
    task = await orch.run({"goal": "Do it"})
    assert task.status == "completed"
    answer = await orch.send("GET", f"/tasks/{task.task_id}/trace")
    refusal = problem(answer)
    assert (answer.status, refusal["code"], refusal["retryable"]) == (503, "unavailable", True)
    assert "monitor" in refusal["detail"]
    assert "Tasks run without it" in refusal["detail"]

    async def degraded() -> bool:
        ready = await orch.harness.send("orchestrator", "GET", "/ready")
        found = msgspec.json.decode(ready.body)
        return ready.status == 200 and found["status"] == "degraded" and not found["dependencies"]["traces"]["ok"]

    await wait_until(degraded, description="the service says that its spans are not taken")


async def test_another_tenant_is_told_of_no_such_task(orch: OrchestratorHarness) -> None:
    task = await orch.run({"goal": "Do it"})
    rival = orch.harness.token("tasks:read", aud="orchestrator", tenant="rival", task=None)
    answer = await orch.harness.send("orchestrator", "GET", f"/tasks/{task.task_id}/trace", token=rival)
    assert (answer.status, problem(answer)["code"]) == (404, "task_not_found")
