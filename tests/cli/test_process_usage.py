"""Wrong usage, wrong input, and the commands around a running installation."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from command_line import GOAL


async def test_help_says_what_there_is(command_line):
    ended = await command_line.run("--help")
    assert ended.code == 0
    for word in ("demo", "up", "run", "watch", "task", "events", "models", "keys", "token", "config", "Exit codes"):
        assert word in ended.out


async def test_no_argument_is_help(command_line):
    ended = await command_line.run()
    assert "Usage: octollm" in ended.out + ended.err


async def test_the_version(command_line):
    assert (await command_line.run("--version")).out.startswith("octollm 0.")


WRONG = ["nonsense", "run", "run x --max-tokens 0", "token mint", "task list --status x", "up now"]


@pytest.mark.parametrize("line", WRONG)
async def test_wrong_usage_is_exit_code_2(command_line, line):
    ended = await command_line.run(*line.split())
    assert ended.code == 2
    assert "Traceback" not in ended.err


async def test_nothing_that_runs_is_said_with_what_to_do(command_line):
    ended = await command_line.run("run", GOAL, "--no-start")
    assert ended.code == 1
    assert command_line.gateway_url in ended.err
    assert "octollm up" in ended.err
    assert not command_line.home.exists()


@pytest.mark.parametrize("name", ["missing.txt", "binary.csv", "big.txt"])
async def test_a_file_that_cannot_be_sent_is_refused_before_anything_is(command_line, name):
    (command_line.work / "binary.csv").write_bytes(bytes(range(256)))
    with (command_line.work / "big.txt").open("wb") as file:
        file.truncate(20 * 1024 * 1024 + 1)
    # Nothing runs here: had anything been sent, the exit code would be 1.
    ended = await command_line.run("run", GOAL, "--file", name)
    assert ended.code == 2
    assert name in ended.err
    assert "file_invalid" in ended.err


async def test_an_empty_goal_is_refused(command_line):
    assert (await command_line.run("run", "  ")).code == 2


async def test_a_wrong_setting_is_refused_with_its_name(command_line):
    command_line.settings["OCTOLLM_SANDBOX"] = "none"
    for command in (["up"], ["demo"], ["run", GOAL], ["config"]):
        ended = await command_line.run(*command)
        assert ended.code == 2
        assert "OCTOLLM_SANDBOX is 'none'; it must be one of" in ended.err
    assert not command_line.home.exists()


async def test_an_unknown_setting_is_warned_about(command_line):
    command_line.settings["OCTOLLM_SANDBOXX"] = "wasi"
    ended = await command_line.run("config")
    assert ended.code == 0
    assert "OCTOLLM_SANDBOXX is not a setting" in ended.err
    assert "OCTOLLM_SANDBOX?" in ended.err


async def test_config_masks_secrets(command_line):
    command_line.settings |= {"OCTOLLM_API_KEY": "octo_secret", "OCTOLLM_REDIS_URL": "redis://me:hidden@localhost:6379"}
    for arguments in (["config"], ["config", "--json"]):
        ended = await command_line.run(*arguments)
        assert ended.code == 0
        assert "octo_secret" not in ended.out
        assert "hidden" not in ended.out
        assert "OCTOLLM_API_KEY" in ended.out
    rows = {row["name"]: row for row in json.loads(ended.out)}
    assert rows["OCTOLLM_API_KEY"]["source"] == "environment"
    assert rows["OCTOLLM_HOST"] == {**rows["OCTOLLM_HOST"], "value": "127.0.0.1", "source": "default"}


async def test_a_taken_port_is_named_before_anything_starts(command_line):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 8103 + command_line.shift))
        other.listen()
        ended = await command_line.run("up")
    assert ended.code == 1
    assert f"{8103 + command_line.shift}" in ended.err
    assert "judge" in ended.err
    assert "OCTOLLM_PORT_OFFSET" in ended.err
    assert command_line.ports_are_free()


async def test_a_second_installation_in_one_home_is_refused(shared_command_line):
    ended = await shared_command_line.run("demo", GOAL)
    assert ended.code == 1
    assert "home_in_use" in ended.err
    assert shared_command_line.gateway_url in ended.err


async def test_keys_open_the_gateway_until_they_are_revoked(shared_command_line):
    made = await shared_command_line.run("keys", "create", "ci", "--scope", "tasks:read")
    assert made.code == 0, made.err
    secret = made.out.strip()
    assert secret.startswith("octo_")
    assert secret not in made.err
    listed = json.loads((await shared_command_line.run("keys", "list", "--json")).out)["keys"]
    [key] = [key for key in listed if key["name"] == "ci"]
    assert secret not in json.dumps(listed)
    shared_command_line.settings["OCTOLLM_API_KEY"] = secret
    assert (await shared_command_line.run("task", "list")).code == 0
    refused = await shared_command_line.run("run", GOAL)
    assert refused.code == 1
    assert "scope_missing" in refused.err
    del shared_command_line.settings["OCTOLLM_API_KEY"]
    assert (await shared_command_line.run("keys", "revoke", key["id"])).code == 0
    shared_command_line.settings["OCTOLLM_API_KEY"] = secret
    ended = await shared_command_line.run("task", "list")
    assert ended.code == 1
    assert "api_key_invalid" in ended.err or "token_revoked" in ended.err


async def test_a_token_is_printed_alone_and_opens_its_service_only(shared_command_line):
    minted = await shared_command_line.run("token", "mint", "--scope", "judge:validate", "--aud", "judge")
    assert minted.code == 0, minted.err
    [token] = minted.out.splitlines()
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}) as client:
        body = {"code": "def f():\n    return 1\n", "language": "python"}
        answer = await client.post(f"http://127.0.0.1:{8103 + shared_command_line.shift}/validate", json=body)
        assert answer.json()["is_valid"] is True
        other = await client.post(f"http://127.0.0.1:{8102 + shared_command_line.shift}/execute", json={"goal": "x"})
        assert other.status_code == 401


@pytest.mark.parametrize(("scope", "aud"), [("judge:vali date", "judge"), ("judge:validate", "coder"), ("x", "judge")])
async def test_a_token_that_cannot_be_is_refused(shared_command_line, scope, aud):
    ended = await shared_command_line.run("token", "mint", "--scope", scope, "--aud", aud)
    assert ended.code == 2
    assert ended.out == ""


async def test_a_task_that_is_not_there(shared_command_line):
    for arguments in (["task", "show", "task-x"], ["task", "cancel", "task-x"], ["watch", "task-x"]):
        ended = await shared_command_line.run(*arguments)
        assert ended.code == 1
        assert "task_not_found" in ended.err


@pytest.mark.sandbox
async def test_tasks_are_listed_shown_and_their_events_told(shared_command_line):
    outcome = json.loads((await shared_command_line.run("run", GOAL, "--json")).out)
    task_id = outcome["task_id"]
    assert task_id in (await shared_command_line.run("task", "list")).out
    listed = json.loads((await shared_command_line.run("task", "list", "--json", "--status", "completed")).out)
    assert task_id in [task["task_id"] for task in listed["tasks"]]
    assert {task["status"] for task in listed["tasks"]} == {"completed"}
    shown = await shared_command_line.run("task", "show", task_id)
    assert "completed (100 %)" in shown.out
    shown = await shared_command_line.run("task", "show", task_id, "--json")
    assert json.loads(shown.out)["output"] == outcome["output"]
    assert (await shared_command_line.run("task", "cancel", task_id)).code == 1
    tail = await shared_command_line.start("events", "tail", "--after", "0", "--json")
    # Events of other tasks, and of rows of the audit log that are sealed meanwhile, come in between.
    types = []
    while not types or types[-1] != "task.completed":
        event = json.loads(await tail.stdout.readline())
        if event["data"].get("task_id") == task_id and event["event_type"].startswith("task."):
            types.append(event["event_type"])
    assert types[:4] == ["task.accepted", "task.planning", "task.planned", "task.started"]
    assert (await shared_command_line.interrupt(tail)).code == 130


async def test_without_trust_on_loopback_only_the_owners_key_is_accepted(command_line):
    command_line.settings["OCTOLLM_TRUST_LOOPBACK"] = "off"
    process = await command_line.up()
    try:
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{command_line.gateway_url}/tasks")).status_code == 401
        assert (await command_line.run("task", "list")).code == 0
        command_line.settings["OCTOLLM_HOME"] = str(command_line.root / "elsewhere")
        ended = await command_line.run("task", "list")
        assert ended.code == 1
        assert "token_missing" in ended.err
    finally:
        command_line.settings.pop("OCTOLLM_HOME", None)
        await command_line.interrupt(process)


async def test_a_home_that_others_may_read_is_refused(command_line):
    (command_line.home / "keys").mkdir(parents=True)
    (command_line.home / "keys").chmod(0o755)
    ended = await command_line.run("up")
    assert ended.code == 2
    assert "chmod" in ended.err


async def test_models_are_listed(command_line):
    command_line.settings["OCTOLLM_MODEL_CACHE"] = str(command_line.root / "cache")
    listed = json.loads((await command_line.run("models", "list", "--json")).out)
    assert [row["here"] for row in listed] == [False] * len(listed)
    ended = await command_line.run("models", "pull", "nonsense")
    assert ended.code == 2
    assert "nonsense" in ended.err


@pytest.mark.sandbox
async def test_a_durable_subscription_is_followed_replayed_and_deleted(shared_command_line):
    task = json.loads((await shared_command_line.run("run", GOAL, "--json")).out)
    follower = await shared_command_line.start(
        "events", "subscribe", "billing", "events:task:completed", "--start", "earliest", "--json"
    )
    # From the earliest event on: other tests' tasks come first.
    line = {"data": {}}
    while line["data"].get("task_id") != task["task_id"]:
        line = json.loads(await follower.stdout.readline())
        assert line["event_type"] == "task.completed"
    assert (await shared_command_line.interrupt(follower)).code == 130
    (view,) = json.loads((await shared_command_line.run("events", "lag", "--json")).out)
    assert view["name"] == "billing"
    shown = json.loads((await shared_command_line.run("events", "show", str(line["seq"]))).out)
    assert shown == line
    beyond = await shared_command_line.run("events", "show", "99999")
    assert beyond.code == 1
    assert "no event of this tenant at position 99999" in " ".join(beyond.err.split())
    assert "99998" not in beyond.err
    replayed = json.loads((await shared_command_line.run("events", "replay", "billing", "--after", "0", "--json")).out)
    assert replayed == {"after": 0}
    assert json.loads((await shared_command_line.run("events", "dead", "--json")).out) == []
    wrong = await shared_command_line.run("events", "subscribe", "b", "events:tasks:*", "--create-only")
    assert wrong.code == 2
    assert "events:task:*" in wrong.err
    assert (await shared_command_line.run("events", "unsubscribe", "billing")).code == 0
    assert (await shared_command_line.run("events", "consumers", "billing")).code == 1


async def test_a_misspelt_member_of_a_signature_is_refused_before_anything_is_sent(command_line):
    # Nothing runs here: had anything been sent, the exit code would be 1.
    hook = ("hooks", "create", "orders", "--scheme", "hmac", "--goal", "Look at it", "--signature")
    for signature, code in (
        ('{"timestamp_heder": "X-Time"}', "unknown_field"),
        ("{", "invalid_json"),
        ("3", "invalid_body"),
    ):
        ended = await command_line.run(*hook, signature)
        assert (ended.code, code in ended.err) == (2, True), ended.err


async def test_memory_says_what_it_did_not_find_and_what_it_erased(shared_command_line):
    command_line = shared_command_line
    none = await command_line.run("memory", "search", "quokka")
    assert (none.code, none.out) == (0, "")
    assert "No document matches." in none.err
    assert json.loads((await command_line.run("memory", "search", "quokka", "--json")).out)["passages"] == []
    for value in ("9-17", "10-14"):
        assert (await command_line.run("memory", "set", "opening-hours", value)).code == 0
    gone = await command_line.run("memory", "erase", "--fact", "opening-hours", "--yes")
    assert "Erased: 1 fact (2 versions), 0 sources, 0 documents, 0 passages." in gone.out
