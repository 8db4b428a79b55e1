"""The three example arms in one installation with ``octollm up --arm``: each goal finds its arm, files and all."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from scripts import default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model

pytestmark = pytest.mark.sandbox
EXAMPLES = Path(__file__).parents[2] / "examples"
ARMS = {"translator": "translator", "sql_analyst": "sql-analyst", "lengths": "lengths"}
QUERY = "SELECT city, sum(amount) AS total FROM orders GROUP BY city ORDER BY city"


def reply(asked: ScriptedRequest) -> str | ScriptedReply:
    """Answer what the three arms ask for, and everything else as ever."""
    if "SQLite SELECT" in asked.last:
        return json.dumps({"sql": QUERY})
    if asked.last.startswith("Translate with"):
        return "Der Arm winkt"
    if asked.raw.get("tools") and asked.last == "1609.344":
        return "A mile is 1609.344 metres."
    if asked.raw.get("tools"):
        return ScriptedReply(tool_calls=(("convert", '{"amount": 1, "unit": "miles", "into": "metres"}'),))
    return default_reply(asked)


def shop(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE orders (city TEXT, amount REAL)")
        database.executemany("INSERT INTO orders VALUES (?, ?)", [("Bonn", 10.5), ("Kiel", 4.0), ("Bonn", 2.0)])
        database.commit()


@pytest.mark.timeout(180)
async def test_each_goal_is_done_by_the_arm_that_it_is_for(tmp_path: Path) -> None:
    async with scripted_model(reply) as model:
        command_line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url})
        for source in EXAMPLES.glob("*/*.py"):
            shutil.copy(source, command_line.work / source.name)
        shop(command_line.work / "shop.sqlite3")
        up = await command_line.up(*(word for module in ARMS for word in ("--arm", f"{module}:arm")))

        async def goal(*command: str) -> dict[str, Any]:
            ended = await command_line.run("run", *command, "--json")
            assert ended.code == 0, ended.err
            result = json.loads(ended.out.splitlines()[-1])
            task = json.loads((await command_line.run("task", "show", result["task_id"], "--json")).out)
            return {**result, "arms": [step["arm"] for step in task["steps"]]}

        async def served() -> bool:
            listed = json.loads((await command_line.run("arms", "--json")).out)["arms"]
            return {arm["name"] for arm in listed if arm["state"] == "healthy"} >= set(ARMS.values())

        try:
            await wait_until(served, description="the three arms are registered", timeout=30, interval=0.2)
            translated = await goal("Translate 'the arm waves' into German")
            assert (translated["output"], translated["arms"]) == ("Der Arm winkt", ["translator"])
            queried = await goal("What is the total of each city?", "--file", "shop.sqlite3")
            assert queried["arms"] == ["sql-analyst"]
            assert "| Bonn | 12.5 |\n| Kiel | 4.0 |" in queried["output"]
            assert [artifact["name"] for artifact in queried["artifacts"]] == ["result.csv"]
            converted = await goal("Convert one mile into metres")
            assert (converted["output"], converted["arms"]) == ("A mile is 1609.344 metres.", ["lengths"])
            # What no arm accepts is refused before a task is made of it.
            (command_line.work / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
            refused = await command_line.run("run", "What is this?", "--file", "photo.png")
            assert refused.code == 2
            assert "No arm of your own reads image/png either" in refused.err
        finally:
            stopped = await command_line.interrupt(up)
        assert stopped.code == 130, stopped.err
        assert command_line.ports_are_free()
