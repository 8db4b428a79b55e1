"""Tokens, the audit log and keys from the command line of a running installation."""

from __future__ import annotations

import json
import sqlite3

import httpx
import pytest
from command_line import GOAL

from octollm.testing import wait_until

pytestmark = pytest.mark.sandbox
CHECK = {"language": "python", "code": "x = 1\n"}


async def mint(command_line, scope: str, aud: str) -> str:
    made = await command_line.run("token", "mint", "--scope", scope, "--aud", aud)
    assert made.code == 0, made.err
    return made.out.strip()


async def status_of(command_line, port: int, path: str, token: str) -> int:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port + command_line.shift}") as client:
        answer = await client.post(path, json=CHECK, headers={"Authorization": f"Bearer {token}"})
        return answer.status_code


async def test_a_token_is_drawn_used_and_revoked(command_line, up):
    token = await mint(command_line, "judge:validate", "judge")
    shown = await command_line.run("token", "inspect", "-", "--for", "judge", "--for", "coder", stdin=token)
    assert shown.code == 1
    for text in (
        "orchestrator → judge  grant",
        "may ask  executor:run",
        "may do  judge:validate",
        "✓ judge takes it",
        "✗ coder refuses it: audience_wrong",
    ):
        assert text in shown.out
    said = json.loads((await command_line.run("token", "inspect", "-", "--json", stdin=token)).out)
    assert said["verdicts"] == [{"service": "judge", "accepted": True, "reason": "", "why": ""}]
    assert [hop["kind"] for hop in said["says"]["hops"]] == ["grant", "access"]
    nothing = await command_line.run("token", "inspect", "-", stdin="nonsense")
    assert (nothing.code, "bearer_malformed" in nothing.err) == (2, True)

    assert await status_of(command_line, 8103, "/validate", token) == 200
    revoked = await command_line.run("token", "revoke", "-", stdin=token)
    assert revoked.code == 0, revoked.err

    async def refused() -> bool:
        return await status_of(command_line, 8103, "/validate", token) == 401

    await wait_until(refused, description="the judge refuses it", timeout=1)
    assert await status_of(command_line, 8103, "/validate", await mint(command_line, "judge:validate", "judge")) == 200
    other = await mint(command_line, "executor:run", "executor")
    assert (
        await command_line.run("token", "revoke", "--service", "executor", "--json")
    ).out.strip() == '{"revoked":["executor"]}'

    async def is_delegation_refused() -> bool:
        return await status_of(command_line, 8101, "/run", other) == 401

    await wait_until(is_delegation_refused, description="the executor refuses what it was lent", timeout=1)
    assert (await command_line.run("token", "revoke")).code == 2


async def test_the_audit_log_is_exported_and_checked(command_line, up):
    assert (await command_line.run("keys", "create", "for the audit")).code == 0
    await mint(command_line, "judge:validate", "judge")

    async def sealed() -> bool:
        return (await command_line.run("audit", "export")).out.count('"action"') >= 2

    await wait_until(sealed, description="the rows are sealed", timeout=20)
    export = await command_line.run("audit", "export")
    (command_line.work / "audit.jsonl").write_text(export.out)
    actions = [json.loads(line).get("action") for line in export.out.splitlines()]
    assert {"key.added", "token.issued"} <= set(actions)
    assert actions[-1] is None
    assert "octo_" not in export.out

    good = await command_line.run("audit", "verify")
    assert (good.code, "✓" in good.out) == (0, True), good.out + good.err
    good = json.loads((await command_line.run("audit", "verify", "audit.jsonl", "--json")).out)
    assert good["faults"] == []
    assert good["rows"] == len(actions) - 1

    (command_line.work / "changed.jsonl").write_text(export.out.replace("for the audit", "for nothing"))
    bad = await command_line.run("audit", "verify", "changed.jsonl")
    assert bad.code == 1
    assert "it was changed: key.added" in bad.out
    (command_line.work / "cut.jsonl").write_text("\n".join(export.out.splitlines()[:-1]))
    assert (await command_line.run("audit", "verify", "cut.jsonl")).code == 2

    async with httpx.AsyncClient(base_url=command_line.gateway_url) as client:
        assert (await client.get("/tasks", headers={"Authorization": "Bearer octo_no_such-key"})).status_code == 401

    async def is_told() -> bool:
        return "token.refused" in (await command_line.run("audit", "export", "--system")).out

    await wait_until(is_told, description="what was refused is in the system's log", timeout=20)
    assert (await command_line.run("audit", "verify", "--system")).code == 0

    # Whoever writes to the database alone is found out: by the rows, and by an earlier export.
    database = sqlite3.connect(command_line.home / "data" / "orchestrator.db", timeout=20)
    database.execute("UPDATE audit SET sub = 'mallory' WHERE tenant = 'local' AND seq = 1")
    database.commit()
    found = await command_line.run("audit", "verify")
    assert (found.code, "row 1: it was changed" in found.out) == (1, True), found.out
    database.execute("DELETE FROM audit WHERE tenant = 'local'")
    database.execute("DELETE FROM audit_heads WHERE tenant = 'local'")
    database.commit()
    database.close()
    assert (await command_line.run("audit", "verify")).code == 0
    found = await command_line.run("audit", "verify", "--against", "audit.jsonl")
    assert (found.code, "the earlier export ends there with another row" in found.out) == (1, True)


async def test_keys_are_changed_and_the_work_goes_on(command_line):
    up = await command_line.up()
    try:
        token = await mint(command_line, "judge:validate", "judge")
    finally:
        await command_line.interrupt(up)
    for name in ("judge", "root"):
        rotated = await command_line.run("keys", "rotate", name)
        assert rotated.code == 0, rotated.err
        assert "Restart the orchestrator" in rotated.out
    up = await command_line.up()
    try:
        assert await status_of(command_line, 8103, "/validate", token) == 200, "what the old keys signed is good still"
        done = await command_line.run("run", GOAL, "--json")
        assert done.code == 0, done.err
        doubtful = await command_line.run("audit", "verify")
        assert doubtful.code == 0, doubtful.out
    finally:
        await command_line.interrupt(up)
    assert (await command_line.run("keys", "rotate", "root", "--at-once")).code == 0
    up = await command_line.up()
    try:
        assert await status_of(command_line, 8103, "/validate", token) == 401
        assert (await command_line.run("run", GOAL, "--json")).code == 0
    finally:
        await command_line.interrupt(up)
    wrong = await command_line.run("keys", "rotate", "nobody")
    assert (wrong.code, "There are root, reflex" in wrong.err) == (2, True)
