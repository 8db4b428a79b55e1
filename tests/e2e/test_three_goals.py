"""The three kinds of goal through every real part; only the model's words are scripted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_client import GatewayClient
from scripts import CODE, NOTES, QUERY, SALES, ReplaceableScript, default_reply

from octollm.testing.fake_model import ScriptedReply, ScriptedRequest

pytestmark = pytest.mark.sandbox


@pytest.fixture
def gateway(shared_gateway: GatewayClient) -> GatewayClient:
    return shared_gateway


@pytest.fixture
def script(shared_installation: Any) -> ReplaceableScript:
    return shared_installation.script


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

    def failing_reply(asked: ScriptedRequest) -> str | ScriptedReply:
        if "SQL" in asked.system and asked.schema is None:
            seen.append(asked.last)
            if len(seen) == 1:
                return "SELECT count(*) AS rows, sum(amout) AS total FROM sales WHERE amount > 100"
        return default_reply(asked)

    script.reply = failing_reply
    task = await gateway.run("How many rows have amount > 100, and their total?", {"sales.csv": SALES})
    assert task["status"] == "completed", task["error"]
    assert "amout" in seen[1]


async def test_a_question_over_a_table_and_a_text_is_answered_from_both(gateway: GatewayClient) -> None:
    task = await gateway.run(
        "How many rows have amount > 100, and how often is a call retried?", {"sales.csv": SALES, "notes.md": NOTES}
    )
    assert task["status"] == "completed", task["error"]
    assert [step["arm"] for step in task["steps"]] == ["retriever", "coder", "retriever"]
    assert [step["depends_on"] for step in task["steps"]] == [[], ["s1"], ["s1", "s2"]]
    assert "[notes.md:3]" in task["output"]
    assert QUERY in task["output"]
    assert "400" in task["output"]


async def test_a_document_is_summarised_at_the_length_that_was_asked_for(
    gateway: GatewayClient, script: ReplaceableScript
) -> None:
    said = ["The service retries a failed call three times.", "Cats sleep through most of the day.", "Cats fly."]
    script.reply = lambda asked: json.dumps({"sentences": said}) if "sentences" in str(asked.schema) else "unused"
    task = await gateway.run("Summarize the notes in two bullet points", {"notes.md": NOTES})
    assert task["status"] == "completed", task["error"]
    assert task["found"] is True
    assert [step["title"] for step in task["steps"]] == ["Summarise notes.md"]
    assert task["output"].split("\n") == [f"- {said[0]} [notes.md:3]", f"- {said[1]} [notes.md:5]"]
    assert task["steps"][0]["evidence"]["work"] == "summary"


async def test_a_question_without_an_answer_completes_and_says_so(gateway: GatewayClient) -> None:
    task = await gateway.run("Who painted the ceiling of the chapel?", {"notes.md": NOTES})
    assert task["status"] == "completed"
    assert task["found"] is False
    assert task["output"].startswith("Not found")


async def test_fields_of_documents_become_a_table(gateway: GatewayClient) -> None:
    files = {f"i{n}.txt": f"Vendor: Acme {n}\nTotal: EUR {n}00.50\n" for n in (1, 2)}
    task = await gateway.run("Extract vendor and total from each invoice", files)
    assert task["status"] == "completed", task["error"]
    assert [artifact["name"] for artifact in task["artifacts"]] == ["table.csv", "table.json"]
    assert "| i2.txt | Acme 2 [i2.txt:1] | EUR 200.50 [i2.txt:2] |" in task["output"]


async def test_without_a_model_the_error_says_how_to_get_one(gateway: GatewayClient, script: ReplaceableScript) -> None:
    script.reply = lambda _asked: ScriptedReply(error_status=401)
    task = await gateway.run("Write a Python function double(number) with tests")
    assert task["status"] == "failed"
    assert task["error"]["code"] == "model_failed"
    assert "key" in task["error"]["detail"] + str(task["error"].get("reasons"))
