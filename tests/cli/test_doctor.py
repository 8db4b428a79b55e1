"""`octollm doctor`: what is right, what is broken, and what to do; it never hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import stat

import pytest
from ports import free_port

from octollm.cli.doctor import CheckResult, DiagnosticCheck, run_checks
from octollm.errors import OctoError


async def test_every_check_is_told_in_order_whatever_others_do():
    async def good():
        return [CheckResult("one", "ok", "well")]

    async def raising():
        raise OctoError("It is away. Start it.", code="unavailable")

    found = await run_checks([DiagnosticCheck("two", raising), DiagnosticCheck("one", good)])
    assert found == [CheckResult("two", "broken", "It is away. Start it."), CheckResult("one", "ok", "well")]


async def test_a_check_that_hangs_is_broken_and_ends():
    async def hanging():
        await asyncio.Event().wait()
        return []

    [found] = await run_checks([DiagnosticCheck("slow", hanging)], timeout=0.05)
    assert (found.check, found.level) == ("slow", "broken")


async def test_a_defect_in_a_check_is_not_swallowed():
    async def wrong():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_checks([DiagnosticCheck("wrong", wrong)])


async def doctor(command_line) -> tuple[int, dict[str, list[dict[str, str]]]]:
    ended = await command_line.run("doctor", "--json")
    rows: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(ended.out):
        rows.setdefault(row["check"], []).append(row)
    return ended.code, rows


def levels(rows, check) -> set[str]:
    return {row["level"] for row in rows[check]}


async def test_a_machine_where_nothing_runs_is_well(command_line):
    ended = await command_line.run("doctor")
    assert ended.code == 0, ended.out + ended.err
    for word in ("python", "home", "ports", "model", "sandbox", "redis", "services"):
        assert word in ended.out
    assert not command_line.home.exists()


async def test_a_running_installation_is_asked_service_by_service(command_line, up):
    code, rows = await doctor(command_line)
    assert code == 0, rows
    for name in ("reflex", "orchestrator", "memory", "monitor", "models", "planner", "executor", "coder", "judge"):
        assert levels(rows, name) == {"ok"}
    assert levels(rows, "clock") == {"ok"}
    assert str(up.pid) in rows["ports"][0]["found"]


async def test_redis_that_is_away_is_broken_and_its_password_is_not_shown(command_line):
    command_line.settings["OCTOLLM_REDIS_URL"] = f"redis://me:hidden@127.0.0.1:{free_port()}/0"
    ended = await command_line.run("doctor")
    assert ended.code == 1
    assert "✗ redis" in ended.out
    assert "hidden" not in ended.out + ended.err


async def test_a_provider_that_refuses_the_key_or_is_away_is_broken(command_line):
    command_line.settings["OCTOLLM_MODEL_URL"] = f"http://127.0.0.1:{free_port()}/v1"
    code, rows = await doctor(command_line)
    assert code == 1
    assert levels(rows, "model") == {"broken"}


async def test_a_model_that_is_not_here_is_said_with_how_to_get_it(command_line):
    command_line.settings |= {"OCTOLLM_MODEL": "embedded", "OCTOLLM_MODEL_CACHE": str(command_line.root / "none")}
    code, rows = await doctor(command_line)
    assert code == 1
    assert "octollm models pull" in rows["model"][0]["found"]


async def test_keys_that_others_may_read_are_broken(command_line):
    keys = command_line.home / "keys"
    keys.mkdir(parents=True, mode=0o700)
    (keys / "root.jwk").write_text("{}")
    (keys / "root.jwk").chmod(0o644)
    command_line.home.chmod(stat.S_IRWXU)
    code, rows = await doctor(command_line)
    assert code == 1
    assert "chmod" in rows["home"][0]["found"]


async def test_a_taken_port_and_an_unknown_setting_are_warnings(command_line):
    command_line.settings["OCTOLLM_SANDBOXX"] = "wasi"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 8103 + command_line.shift))
        other.listen()
        code, rows = await doctor(command_line)
    assert code == 0
    assert levels(rows, "ports") == {"warning"}
    assert "OCTOLLM_SANDBOX?" in rows["settings"][0]["found"]
