"""How many calls between services the simplest code task makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest
from gateway_client import GatewayClient
from prometheus_client.parser import text_string_to_metric_families
from scripts import default_reply
from test_traces import spans_of

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

pytestmark = pytest.mark.sandbox
GOAL = "Write a Python function double(number) with tests"
MAX_CALLS = 24
KEY_OPERATIONS = ("idempotency.claim", "idempotency.complete", "idempotency.release")
PLAN = (
    '{"steps": [{"id": "s1", "title": "Write it", "arm": "coder", "goal": "' + GOAL + '", "depends_on": [],'
    ' "files": [], "acceptance_criteria": ["It is done."]}]}'
)


def plans(asked: ScriptedRequest) -> str | ScriptedReply:
    """Answer as a capable model does, whose first plan can be used."""
    return PLAN if asked.schema is not None and "steps" in str(asked.schema) else default_reply(asked)


async def key_calls(gateway: GatewayClient) -> Counter[str]:
    """Return the calls about idempotency keys so far: they go out in groups, in no task's trace; metrics count them."""
    found: Counter[str] = Counter()
    async with httpx.AsyncClient() as client:
        for url in gateway.system.urls.values():
            for family in text_string_to_metric_families((await client.get(f"{url}/metrics")).text):
                for sample in family.samples:
                    labels = sample.labels
                    # Renewals come by the clock: how many there are says how fast the machine is.
                    if sample.name == "octollm_calls_total" and labels["operation"] in KEY_OPERATIONS:
                        found[f"{labels['service']} → {labels['target']}.{labels['operation']}"] += int(sample.value)
    return found


async def test_the_simplest_code_task_makes_few_internal_calls(gateway: GatewayClient, script: Any) -> None:
    script.reply = plans
    before = await key_calls(gateway)
    task = await gateway.run(GOAL)
    assert task["status"] == "completed"
    spans = await spans_of(gateway, task["task_id"])
    calls = await key_calls(gateway) - before
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
