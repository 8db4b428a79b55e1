"""An arm of somebody's own beside an installation: served by module:name, joined, planned for, judged."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from command_line import CommandLine
from scripts import default_reply

from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedReply, ScriptedRequest, scripted_model

pytestmark = pytest.mark.sandbox
EXAMPLE = Path(__file__).parents[2] / "examples" / "translator" / "translator.py"
GOAL = "Translate 'Good morning' into French"
PORT = 8110


def reply(asked: ScriptedRequest) -> str | ScriptedReply:
    """Translate what the translator asks, and answer everything else as ever."""
    return "Bonjour" if asked.last.startswith("Translate with") else default_reply(asked)


@contextlib.asynccontextmanager
async def served(command_line: CommandLine, *settings: tuple[str, str]) -> AsyncGenerator[int]:
    """Run the example beside what runs; yield its process id once it is there, and stop it well."""
    command_line.settings.update(settings)
    process = await command_line.start("serve", "translator:arm")

    async def there() -> bool:
        assert process.returncode is None, (await process.communicate())[1].decode()
        async with httpx.AsyncClient(timeout=5) as client:
            with contextlib.suppress(httpx.TransportError):
                return (await client.get(f"http://127.0.0.1:{PORT + command_line.shift}/ready")).json()[
                    "status"
                ] == "ready"
        return False

    await wait_until(there, description="the translator is ready", timeout=40)
    try:
        yield process.pid
    finally:
        ended = await command_line.interrupt(process, signal.SIGTERM)
        assert ended.code == 0, ended.err
        assert "octojoin_" not in ended.err


@pytest.mark.timeout(180)
async def test_an_arm_joins_is_planned_for_and_needs_no_secret_again(tmp_path: Path) -> None:
    async with scripted_model(reply) as model:
        command_line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url})
        shutil.copy(EXAMPLE, command_line.work / "translator.py")
        up = await command_line.up()
        try:
            # Without a secret of its own it joins by the home that both share.
            async with served(command_line):
                listed = json.loads((await command_line.run("arms", "--json")).out)["arms"]
                (own,) = (arm for arm in listed if arm["name"] == "translator")
                assert own["url"] == f"http://127.0.0.1:{PORT + command_line.shift}"
                ended = await command_line.run("run", GOAL, "--json")
                assert ended.code == 0, ended.err
                result = json.loads(ended.out.splitlines()[-1])
                assert result["output"] == "Bonjour"
                task = json.loads((await command_line.run("task", "show", result["task_id"], "--json")).out)
                assert [step["arm"] for step in task["steps"]] == ["translator"]
                assert task["usage"]["prompt_tokens"] > 0
            # It has left, so the goal goes to an arm that is there.
            gone = json.loads((await command_line.run("arms", "--json")).out)["arms"]
            assert "healthy" not in [arm["state"] for arm in gone if arm["name"] == "translator"]
            # It has pinned the roots: the next start joins nothing.
            async with served(command_line):
                assert "translator" in (await command_line.run("run", GOAL)).out
        finally:
            await command_line.interrupt(up)


async def test_what_cannot_be_served_is_said_with_what_to_do(tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path, {"OCTOLLM_STARTUP_TIMEOUT": "1"})
    (command_line.work / "mine.py").write_text(
        "from octollm import Arm\narm = Arm('mine', description='Mine')\nx = 1\n"
    )
    for target, told in [
        ("mine:arm", "octollm keys enrol --name mine"),
        ("mine:x", "arms in it: arm"),
        ("mine:", "module:name"),
        ("nowhere:arm", "There is no module nowhere"),
    ]:
        ended = await command_line.run("serve", target)
        assert ended.code == 2, (target, ended.err)
        assert told in ended.err
    command_line.settings["OCTOLLM_ENROLMENT_TOKEN"] = "nonsense"
    ended = await command_line.run("serve", "mine:arm")
    assert "not an enrolment token" in ended.err
    assert ended.code != 0
