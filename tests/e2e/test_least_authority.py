"""What arms may do beside what they do: over the kinds of goal every declared call is used, and none refused."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import msgspec
import pytest
from gateway_client import GatewayClient
from scripts import NOTES, SALES
from starlette.requests import Request

from octollm.capability import BUILT_IN_CALLS
from octollm.capability.inspection import inspect
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.rpc.auth import AuthContext, CapabilityAuthenticator
from octollm.rpc.call import Operation
from octollm.testing import wait_until

pytestmark = pytest.mark.sandbox

MAIL = "From: a@example.org\nTo: b@example.org\nSubject: Invoice\n\nVendor: Acme\nTotal: EUR 5\n"
GOALS: list[tuple[str, dict[str, str]]] = [
    ("Write a Python function double(number) with tests", {"notes.md": NOTES}),
    ("How many rows of sales.csv have an amount above 100, and what is their total?", {"sales.csv": SALES}),
    ("How often is a failed call retried?", {"notes.md": NOTES}),
    ("Extract vendor and total from the mail", {"mail.eml": MAIL}),
]


REFUSED = ("authority_missing", "token_invalid", "token_malformed", "token_expired", "token_revoked", "scope_missing")
DONE = {"planner:plan", "coder:execute", "judge:validate", "judge:accept", "retriever:execute", "executor:run"}
"""What arms are asked for in these."""


async def test_every_declared_call_is_used_and_none_refused(gateway: GatewayClient) -> None:
    used: dict[str, set[str]] = {}
    for goal, files in GOALS:
        task = await gateway.run(goal, files)
        assert task["status"] == "completed", task
        spans = await settled(gateway, task["task_id"])
        assert not [span for span in spans if span["code"] in REFUSED]
        by_id = {span["span_id"]: span for span in spans}
        for span in spans:
            chain = [msgspec.json.decode(link) for link in span["attributes"].get("octollm.chain", ())]
            if span["kind"] != "server" or len(chain) < 2:
                continue
            asking = find_caller(by_id, span)
            if asking is not None:
                used.setdefault(asking, set()).add(chain[-1]["scope"])
        if task.get("artifacts"):
            # Small artifacts come in the step's response: the orchestrator stores them if the arm may write files.
            used[f"{task['steps'][-1]['arm']}:execute"].add("files:write")
    # The memory embeds a query once the document has its vectors, which may be later than the search.
    assert used.pop("memory:read", {"models:embeddings"}) == {"models:embeddings"}
    assert used.keys() == DONE
    for operation in DONE:
        declared = {call.scope for call in BUILT_IN_CALLS[operation]}
        # A selector narrows a declared call: a file is read by its digest.
        asked = {":".join(scope.split(":")[:2]) for scope in used[operation]}
        assert asked == declared, f"{operation} declares what it uses, and uses what it declares"


def find_caller(by_id: dict[str, dict[str, Any]], span: dict[str, Any]) -> str | None:
    """Return the operation that made a call: the nearest span of a service that served one, and may call others."""
    while span["parent_id"]:
        span = by_id[span["parent_id"]]
        if span["kind"] == "server" and span["service"] in (*BUILT_IN_ARMS, "memory"):
            return f"{span['service']}:{span['name']}"
    return None


async def settled(gateway: GatewayClient, task_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def is_complete() -> bool:
        nonlocal found
        before, found = len(found), (await gateway.client.get(f"/tasks/{task_id}/trace")).json()["spans"]
        return bool(found) and before == len(found) and any(span["name"] == "task" for span in found)

    await wait_until(is_complete, description="the trace is whole", interval=0.5, timeout=20)
    return found


async def test_a_chain_as_it_travels_from_coder_over_judge_to_executor(
    gateway: GatewayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the executor is really sent, drawn by the command that an operator has for it."""
    seen: list[str] = []
    honest = CapabilityAuthenticator.authenticate

    async def record_authentication(
        self: CapabilityAuthenticator, request: Request, operation: Operation
    ) -> AuthContext:
        opened = await honest(self, request, operation)
        if operation.name == "run":
            seen.append(opened.bearer)
        return opened

    monkeypatch.setattr(CapabilityAuthenticator, "authenticate", record_authentication)
    task = await gateway.run(GOALS[0][0])
    assert task["status"] == "completed", task
    chains = [(bearer, inspect(bearer)) for bearer in seen]
    bearer, chain = next(each for each in chains if [hop.holder for hop in each[1].hops][:2] == ["coder", "judge"])
    assert [(hop.issuer, hop.holder) for hop in chain.hops][:2] == [("orchestrator", "coder"), ("coder", "judge")]
    last = chain.hops[-1]
    assert (last.issuer, last.holder, last.allows) == ("judge", "executor", ("executor:run",))
    assert "models:chat" in chain.hops[0].allows
    assert "models:chat" in chain.hops[1].dropped
    assert chain.chars <= 3500
    assert chain.task is not None
    assert chain.task.task == task["task_id"]

    command = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from octollm.cli import main; main()", "token", "inspect", "-", "--for", "executor",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OCTOLLM_HOME": str(gateway.system.home.root), "NO_COLOR": "1"},
    )  # fmt: skip
    drawn = (await command.communicate(bearer.encode()))[0].decode()
    hops = ("orchestrator → coder  grant", "coder → judge  grant", "judge → executor  access")
    for text in (*hops, "may do  executor:run", "executor takes it"):
        assert text in drawn, drawn
