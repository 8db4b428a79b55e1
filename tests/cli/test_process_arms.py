"""`octollm arms`, `--json` of the small commands, `run` without an installation, and completion."""

from __future__ import annotations

import json

from command_line import GOAL
from scripts import CODE

from octollm.cli.app import load_commands
from octollm.contracts.services import BUILT_IN_ARMS

WITHOUT_JSON = {
    "octollm demo": "it shows a person how it works",
    "octollm up": "it prints where it listens, and goes on",
    "octollm serve": "it writes its log as JSON lines already",
    "octollm new arm": "it makes files, and tells a person what to do with them",
    "octollm audit export": "it prints JSON lines already",
    "octollm task export": "it writes JSON lines to a file",
    "octollm events show": "it prints JSON",
    "octollm hooks show": "it prints JSON",
    "octollm webhooks show": "it prints JSON",
    "octollm models pull": "it prints where the file is",
}


def commands(group, prefix="octollm"):
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        if hasattr(command, "commands"):
            yield from commands(command, full)
        else:
            yield full, command


def test_every_command_that_prints_data_has_json():
    without = {
        name
        for name, command in commands(load_commands())
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without == set(WITHOUT_JSON)


def test_every_command_option_and_argument_is_explained():
    for name, command in commands(load_commands()):
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", ""), f"{name} {parameter.name}"


async def test_arms_are_listed_and_told(shared_command_line):
    ended = await shared_command_line.run("arms")
    assert ended.code == 0, ended.err
    for name in BUILT_IN_ARMS:
        assert name in ended.out
    listed = json.loads((await shared_command_line.run("arms", "--json")).out)["arms"]
    assert {arm["name"] for arm in listed} == set(BUILT_IN_ARMS)
    one = await shared_command_line.run("arms", "coder")
    assert "coder:execute" in one.out
    assert json.loads((await shared_command_line.run("arms", "coder", "--json")).out)["name"] == "coder"


async def test_an_unknown_arm_is_refused_with_those_that_there_are(shared_command_line):
    ended = await shared_command_line.run("arms", "painter")
    assert ended.code == 2
    assert "judge" in ended.err


async def test_keys_tokens_and_cancelled_tasks_as_json(shared_command_line):
    made = json.loads((await shared_command_line.run("keys", "create", "ci", "--json")).out)
    assert made["secret"].startswith("octo_")
    gone = json.loads((await shared_command_line.run("keys", "revoke", made["key"]["id"], "--json")).out)
    assert gone == {"id": made["key"]["id"], "state": "revoked"}
    ended = await shared_command_line.run("token", "mint", "--scope", "judge:validate", "--aud", "judge", "--json")
    assert json.loads(ended.out)["access_token"]


async def test_run_starts_an_installation_where_none_runs(command_line):
    ended = await command_line.run("run", GOAL, "--json")
    assert ended.code == 0, ended.err
    outcome = json.loads(ended.out)
    assert outcome["status"] == "completed"
    assert CODE.splitlines()[0] in outcome["output"]
    assert "starting" in ended.err
    assert command_line.ports_are_free()


async def test_watch_prints_frames_as_json(shared_command_line):
    task_id = json.loads((await shared_command_line.run("run", GOAL, "--json")).out)["task_id"]
    ended = await shared_command_line.run("watch", task_id, "--json")
    assert ended.code == 0, ended.err
    frames = [json.loads(line) for line in ended.out.splitlines()]
    assert frames[-1]["type"] == "result"
    assert [frame["progress"] for frame in frames] == sorted(frame["progress"] for frame in frames)


async def complete(command_line, words: str) -> str:
    command_line.settings |= {
        "_OCTOLLM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    try:
        return (await command_line.run()).out
    finally:
        for name in ("_OCTOLLM_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del command_line.settings[name]


async def test_the_shell_completes_commands_arms_and_models(shared_command_line):
    assert "doctor" in await complete(shared_command_line, "octollm doc")
    assert "coder" in await complete(shared_command_line, "octollm arms co")
    assert "qwen2.5-coder-0.5b" in await complete(shared_command_line, "octollm models pull qw")


async def test_completion_is_silent_where_nothing_runs(command_line):
    assert (await complete(command_line, "octollm arms co")).strip() == ""
