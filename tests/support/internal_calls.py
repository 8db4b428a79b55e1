"""Counts of the calls between services, from the metrics of a whole installation: what a feature costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

import httpx
from gateway_client import GatewayClient
from prometheus_client.parser import text_string_to_metric_families
from scripts import default_reply

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

GOAL = "Write a Python function double(number) with tests"
PLAN = (
    '{"steps": [{"id": "s1", "title": "Write it", "arm": "coder", "goal": "' + GOAL + '", "depends_on": [],'
    ' "files": [], "acceptance_criteria": ["It is done."]}]}'
)
PERIODIC_OPERATIONS = frozenset(
    {"arms.heartbeat", "directory", "idempotency.renew", "revocations", "services.list", "traces.receive"}
)
"""Calls that come by the clock: how many there are says how fast the machine is."""


def reply_with_usable_plan(asked: ScriptedRequest) -> str | ScriptedReply:
    """Answer as a capable model does, whose first plan can be used."""
    return PLAN if asked.schema is not None and "steps" in str(asked.schema) else default_reply(asked)


async def count_calls(gateway: GatewayClient) -> Counter[str]:
    """Return the calls between services so far, as ``caller → callee.operation``."""
    found: Counter[str] = Counter()
    async with httpx.AsyncClient() as client:
        for url in gateway.system.urls.values():
            for family in text_string_to_metric_families((await client.get(f"{url}/metrics")).text):
                for sample in family.samples:
                    labels = sample.labels
                    if sample.name == "octollm_calls_total" and labels["operation"] not in PERIODIC_OPERATIONS:
                        found[f"{labels['service']} → {labels['target']}.{labels['operation']}"] += int(sample.value)
    return found


@dataclass(frozen=True)
class WatcherCost:
    """What the watchers of one task cost."""

    watchers: int
    events: int
    calls: Counter[str]
    """The gateway's calls to the orchestrator, without the submission of the task."""

    @property
    def per_watcher_and_event(self) -> float:
        """Calls for one watcher and one event."""
        return self.calls.total() / (self.watchers * self.events)


async def measure_watchers(gateway: GatewayClient, watchers: int) -> WatcherCost:
    """Run a task that ``watchers`` WebSocket clients watch from its beginning, and count what they cause."""
    before = await count_calls(gateway)
    task_id = await gateway.submit(GOAL)
    watched = await asyncio.gather(*(gateway.frames(task_id) for _ in range(watchers)))
    calls = await count_calls(gateway) - before
    events = {frame["seq"] for frames, _ in watched for frame in frames}
    assert all(len({frame["seq"] for frame in frames}) == len(events) for frames, _ in watched)
    prefix = "reflex → orchestrator."
    return WatcherCost(
        watchers,
        len(events),
        Counter({call: n for call, n in calls.items() if call.startswith(prefix) and call != f"{prefix}tasks.submit"}),
    )
