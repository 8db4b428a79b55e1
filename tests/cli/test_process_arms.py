"""`octollm arms`, `--json` of the small commands, `run` without an installation, and completion."""

from __future__ import annotations

import json

from cli_support import GOAL
from scripts import CODE

from octollm.cli.app import load_commands
from octollm.contracts.services import BUILT_IN_ARMS

WITHOUT_JSON = {
    "octollm demo": "it shows a person how it works",
    "octollm up": "it prints where it listens, and goes on",
    "octollm serve": "it writes its log as JSON lines already",
    "octollm new arm": "it makes files, and tells a person what to do with them",
    "octollm audit export": "it prints JSON lines already",
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


async def test_arms_are_listed_and_told(shared_place):
    ended = await shared_place.run("arms")
    assert ended.code == 0, ended.err
    for name in BUILT_IN_ARMS:
        assert name in ended.out
    listed = json.loads((await shared_place.run("arms", "--json")).out)["arms"]
    assert {arm["name"] for arm in listed} == set(BUILT_IN_ARMS)
    one = await shared_place.run("arms", "coder")
    assert "coder:execute" in one.out
    assert json.loads((await shared_place.run("arms", "coder", "--json")).out)["name"] == "coder"


async def test_an_unknown_arm_is_refused_with_those_that_there_are(shared_place):
    ended = await shared_place.run("arms", "painter")
    assert ended.code == 2
    assert "judge" in ended.err


async def test_keys_tokens_and_cancelled_tasks_as_json(shared_place):
    made = json.loads((await shared_place.run("keys", "create", "ci", "--json")).out)
    assert made["secret"].startswith("octo_")
    gone = json.loads((await shared_place.run("keys", "revoke", made["key"]["id"], "--json")).out)
    assert gone == {"id": made["key"]["id"], "state": "revoked"}
    ended = await shared_place.run("token", "mint", "--scope", "judge:validate", "--aud", "judge", "--json")
    assert json.loads(ended.out)["access_token"]


async def test_run_starts_an_installation_where_none_runs(place):
    ended = await place.run("run", GOAL, "--json")
    assert ended.code == 0, ended.err
    outcome = json.loads(ended.out)
    assert outcome["status"] == "completed"
    assert CODE.splitlines()[0] in outcome["output"]
    assert "starting" in ended.err
    assert place.ports_are_free()


async def test_watch_prints_frames_as_json(shared_place):
    task_id = json.loads((await shared_place.run("run", GOAL, "--json")).out)["task_id"]
    ended = await shared_place.run("watch", task_id, "--json")
    assert ended.code == 0, ended.err
    frames = [json.loads(line) for line in ended.out.splitlines()]
    assert frames[-1]["type"] == "result"
    assert [frame["progress"] for frame in frames] == sorted(frame["progress"] for frame in frames)


async def complete(place, words: str) -> str:
    place.settings |= {
        "_OCTOLLM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    try:
        return (await place.run()).out
    finally:
        for name in ("_OCTOLLM_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del place.settings[name]


async def test_the_shell_completes_commands_arms_and_models(shared_place):
    assert "doctor" in await complete(shared_place, "octollm doc")
    assert "coder" in await complete(shared_place, "octollm arms co")
    assert "qwen2.5-coder-0.5b" in await complete(shared_place, "octollm models pull qw")


async def test_completion_is_silent_where_nothing_runs(place):
    assert (await complete(place, "octollm arms co")).strip() == ""
