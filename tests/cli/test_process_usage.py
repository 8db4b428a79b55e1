"""Wrong usage, wrong input, and the commands around a running installation."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from cli_support import GOAL


async def test_help_says_what_there_is(place):
    ended = await place.run("--help")
    assert ended.code == 0
    for word in ("demo", "up", "run", "watch", "task", "events", "models", "keys", "token", "config", "Exit codes"):
        assert word in ended.out


async def test_no_argument_is_help(place):
    ended = await place.run()
    assert "Usage: octollm" in ended.out + ended.err


async def test_the_version(place):
    assert (await place.run("--version")).out.startswith("octollm 0.")


WRONG = ["nonsense", "run", "run x --max-tokens 0", "token mint", "task list --status x", "up now"]


@pytest.mark.parametrize("line", WRONG)
async def test_wrong_usage_is_exit_code_2(place, line):
    ended = await place.run(*line.split())
    assert ended.code == 2
    assert "Traceback" not in ended.err


async def test_nothing_that_runs_is_said_with_what_to_do(place):
    ended = await place.run("run", GOAL, "--no-start")
    assert ended.code == 1
    assert place.gateway_url in ended.err
    assert "octollm up" in ended.err
    assert not place.home.exists()


@pytest.mark.parametrize("name", ["missing.txt", "binary.csv", "big.txt"])
async def test_a_file_that_cannot_be_sent_is_refused_before_anything_is(place, name):
    (place.work / "binary.csv").write_bytes(bytes(range(256)))
    with (place.work / "big.txt").open("wb") as file:
        file.truncate(20 * 1024 * 1024 + 1)
    # Nothing runs here: had anything been sent, the exit code would be 1.
    ended = await place.run("run", GOAL, "--file", name)
    assert ended.code == 2
    assert name in ended.err
    assert "file_invalid" in ended.err


async def test_an_empty_goal_is_refused(place):
    assert (await place.run("run", "  ")).code == 2


async def test_a_wrong_setting_is_refused_with_its_name(place):
    place.settings["OCTOLLM_SANDBOX"] = "none"
    for command in (["up"], ["demo"], ["run", GOAL], ["config"]):
        ended = await place.run(*command)
        assert ended.code == 2
        assert "OCTOLLM_SANDBOX is 'none'; it must be one of" in ended.err
    assert not place.home.exists()


async def test_an_unknown_setting_is_warned_about(place):
    place.settings["OCTOLLM_SANDBOXX"] = "wasi"
    ended = await place.run("config")
    assert ended.code == 0
    assert "OCTOLLM_SANDBOXX is not a setting" in ended.err
    assert "OCTOLLM_SANDBOX?" in ended.err


async def test_config_masks_secrets(place):
    place.settings |= {"OCTOLLM_API_KEY": "octo_secret", "OCTOLLM_REDIS_URL": "redis://me:hidden@localhost:6379"}
    for arguments in (["config"], ["config", "--json"]):
        ended = await place.run(*arguments)
        assert ended.code == 0
        assert "octo_secret" not in ended.out
        assert "hidden" not in ended.out
        assert "OCTOLLM_API_KEY" in ended.out
    rows = {row["name"]: row for row in json.loads(ended.out)}
    assert rows["OCTOLLM_API_KEY"]["source"] == "environment"
    assert rows["OCTOLLM_HOST"] == {**rows["OCTOLLM_HOST"], "value": "127.0.0.1", "source": "default"}


async def test_a_taken_port_is_named_before_anything_starts(place):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 8103 + place.shift))
        other.listen()
        ended = await place.run("up")
    assert ended.code == 1
    assert f"{8103 + place.shift}" in ended.err
    assert "judge" in ended.err
    assert "OCTOLLM_PORT_OFFSET" in ended.err
    assert place.ports_are_free()


async def test_a_second_installation_in_one_home_is_refused(shared_place):
    ended = await shared_place.run("demo", GOAL)
    assert ended.code == 1
    assert "home_in_use" in ended.err
    assert shared_place.gateway_url in ended.err


async def test_keys_open_the_gateway_until_they_are_revoked(shared_place):
    made = await shared_place.run("keys", "create", "ci", "--scope", "tasks:read")
    assert made.code == 0, made.err
    secret = made.out.strip()
    assert secret.startswith("octo_")
    assert secret not in made.err
    listed = json.loads((await shared_place.run("keys", "list", "--json")).out)["keys"]
    [key] = [key for key in listed if key["name"] == "ci"]
    assert secret not in json.dumps(listed)
    shared_place.settings["OCTOLLM_API_KEY"] = secret
    assert (await shared_place.run("task", "list")).code == 0
    refused = await shared_place.run("run", GOAL)
    assert refused.code == 1
    assert "scope_missing" in refused.err
    del shared_place.settings["OCTOLLM_API_KEY"]
    assert (await shared_place.run("keys", "revoke", key["id"])).code == 0
    shared_place.settings["OCTOLLM_API_KEY"] = secret
    ended = await shared_place.run("task", "list")
    assert ended.code == 1
    assert "api_key_invalid" in ended.err or "token_revoked" in ended.err


async def test_a_token_is_printed_alone_and_opens_its_service_only(shared_place):
    minted = await shared_place.run("token", "mint", "--scope", "judge:validate", "--aud", "judge")
    assert minted.code == 0, minted.err
    [token] = minted.out.splitlines()
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}) as client:
        body = {"code": "def f():\n    return 1\n", "language": "python"}
        answer = await client.post(f"http://127.0.0.1:{8103 + shared_place.shift}/validate", json=body)
        assert answer.json()["is_valid"] is True
        other = await client.post(f"http://127.0.0.1:{8102 + shared_place.shift}/execute", json={"goal": "x"})
        assert other.status_code == 401


@pytest.mark.parametrize(("scope", "aud"), [("judge:vali date", "judge"), ("judge:validate", "coder"), ("x", "judge")])
async def test_a_token_that_cannot_be_is_refused(shared_place, scope, aud):
    ended = await shared_place.run("token", "mint", "--scope", scope, "--aud", aud)
    assert ended.code == 2
    assert ended.out == ""


async def test_a_task_that_is_not_there(shared_place):
    for arguments in (["task", "show", "task-x"], ["task", "cancel", "task-x"], ["watch", "task-x"]):
        ended = await shared_place.run(*arguments)
        assert ended.code == 1
        assert "task_not_found" in ended.err


@pytest.mark.sandbox
async def test_tasks_are_listed_shown_and_their_events_told(place, up):
    outcome = json.loads((await place.run("run", GOAL, "--json")).out)
    task_id = outcome["task_id"]
    assert task_id in (await place.run("task", "list")).out
    listed = json.loads((await place.run("task", "list", "--json", "--status", "completed")).out)
    assert [task["task_id"] for task in listed["tasks"]] == [task_id]
    shown = await place.run("task", "show", task_id)
    assert "completed (100 %)" in shown.out
    assert json.loads((await place.run("task", "show", task_id, "--json")).out)["output"] == outcome["output"]
    assert (await place.run("task", "cancel", task_id)).code == 1
    tail = await place.start("events", "tail", "--after", "0", "--json")
    types = []
    while not types or types[-1] != "task.completed":
        types.append(json.loads(await tail.stdout.readline())["event_type"])
    assert types[types.index("task.accepted") :][:3] == ["task.accepted", "task.planned", "task.started"]
    assert (await place.interrupt(tail)).code == 130


async def test_without_local_trust_only_the_owners_key_opens_the_door(place):
    place.settings["OCTOLLM_TRUST_LOOPBACK"] = "off"
    process = await place.up()
    try:
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{place.gateway_url}/tasks")).status_code == 401
        assert (await place.run("task", "list")).code == 0
        place.settings["OCTOLLM_HOME"] = str(place.root / "elsewhere")
        ended = await place.run("task", "list")
        assert ended.code == 1
        assert "token_missing" in ended.err
    finally:
        place.settings.pop("OCTOLLM_HOME", None)
        await place.interrupt(process)


async def test_a_home_that_others_may_read_is_refused(place):
    (place.home / "keys").mkdir(parents=True)
    (place.home / "keys").chmod(0o755)
    ended = await place.run("up")
    assert ended.code == 2
    assert "chmod" in ended.err


async def test_models_are_listed(place):
    place.settings["OCTOLLM_MODEL_CACHE"] = str(place.root / "cache")
    listed = json.loads((await place.run("models", "list", "--json")).out)
    assert [row["here"] for row in listed] == [False] * len(listed)
    ended = await place.run("models", "pull", "nonsense")
    assert ended.code == 2
    assert "nonsense" in ended.err
