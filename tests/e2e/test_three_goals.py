"""The three kinds of goal through every real part; only the model's words are scripted."""

from __future__ import annotations

import pytest
from gateway_client import GatewayClient
from scripts import CODE, NOTES, QUERY, SALES, ReplaceableScript, default_reply

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

pytestmark = pytest.mark.sandbox


async def test_code_is_written_tested_and_saved(gateway: GatewayClient) -> None:
    task = await gateway.run("Write a Python function double(number) with tests")
    assert task["status"] == "completed", task["error"]
    names = {artifact["name"]: artifact["digest"] for artifact in task["artifacts"]}
    assert len(names) == 2
    (module,) = (name for name in names if not name.startswith("test_"))
    body = await gateway.client.get(f"/tasks/{task['task_id']}/artifacts/{names[module]}")
    assert CODE in body.text
    checks = {check["name"]: check["passed"] for check in task["steps"][0]["evidence"]["checks"]}
    assert checks["tests"] is True
    assert task["usage"]["prompt_tokens"] > 0
    missing = await gateway.client.get(f"/tasks/{task['task_id']}/artifacts/{'0' * 64}")
    assert (missing.status_code, missing.json()["code"]) == (404, "file_not_found")


async def test_wrong_code_is_reported_as_a_failure(gateway: GatewayClient, script: ReplaceableScript) -> None:
    def wrong(asked: ScriptedRequest) -> str | ScriptedReply:
        found = default_reply(asked)
        return found.replace("number * 2", "number + 3") if isinstance(found, str) else found

    script.reply = wrong
    task = await gateway.run("Write a Python function double(number) with tests")
    assert task["status"] == "failed"
    assert task["error"]["code"] == "not_accepted"
    assert task["error"]["reasons"]


async def test_a_question_is_answered_with_the_lines_that_say_so(gateway: GatewayClient) -> None:
    task = await gateway.run("How often does it retry?", {"notes.md": NOTES})
    assert task["status"] == "completed", task["error"]
    (citation,) = task["steps"][0]["evidence"]["citations"]
    assert (citation["file"], citation["line_start"], citation["line_end"]) == ("notes.md", 3, 3)
    assert "three times" in citation["text"]
    assert "three times" in task["output"]


async def test_what_no_document_says_is_not_found(gateway: GatewayClient, script: ReplaceableScript) -> None:
    script.reply = lambda asked: default_reply(asked) if asked.schema else "The population of France is 67 million."
    task = await gateway.run("What is the population of France?", {"notes.md": NOTES})
    assert "67 million" not in task["output"]
    assert "not found" in (task["output"] + str(task["error"])).lower()


async def test_data_is_answered_by_a_query_and_a_changed_cell_changes_the_answer(gateway: GatewayClient) -> None:
    goal = "How many rows have amount > 100, and their total?"
    task = await gateway.run(goal, {"sales.csv": SALES})
    assert task["status"] == "completed", task["error"]
    assert QUERY in task["output"]
    assert "400" in task["output"]
    changed = await gateway.run(goal, {"sales.csv": SALES.replace("90", "190")})
    assert "590" in changed["output"]


async def test_a_query_that_fails_is_repaired(gateway: GatewayClient, script: ReplaceableScript) -> None:
    seen: list[str] = []

    def stumbling(asked: ScriptedRequest) -> str | ScriptedReply:
        if "SQL" in asked.system and asked.schema is None:
            seen.append(asked.last)
            if len(seen) == 1:
                return "SELECT count(*) AS rows, sum(amout) AS total FROM sales WHERE amount > 100"
        return default_reply(asked)

    script.reply = stumbling
    task = await gateway.run("How many rows have amount > 100, and their total?", {"sales.csv": SALES})
    assert task["status"] == "completed", task["error"]
    assert "amout" in seen[1]


async def test_files_of_two_kinds_are_two_steps_side_by_side(gateway: GatewayClient) -> None:
    task = await gateway.run(
        "How many rows have amount > 100, and how often is a call retried?", {"sales.csv": SALES, "notes.md": NOTES}
    )
    assert [step["arm"] for step in task["steps"]] == ["coder", "retriever"]
    assert all(step["depends_on"] == [] for step in task["steps"])


async def test_without_a_model_the_error_says_how_to_get_one(gateway: GatewayClient, script: ReplaceableScript) -> None:
    script.reply = lambda _asked: ScriptedReply(error_status=401)
    task = await gateway.run("Write a Python function double(number) with tests")
    assert task["status"] == "failed"
    assert task["error"]["code"] == "model_failed"
    assert "key" in task["error"]["detail"] + str(task["error"].get("reasons"))
