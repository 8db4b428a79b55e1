"""The Compose file carried out without an engine: its commands and settings, on hosts with its names, do a goal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from compose import compose
from gateway_client import FINAL_STATUSES
from namespace import Zone, add_address, in_namespace
from postgres_process import PostgresProcess
from scripts import default_reply

from octollm.contracts.services import SERVICES
from octollm.testing import wait_until
from octollm.testing.fake_model import scripted_model

pytestmark = [pytest.mark.sandbox, pytest.mark.redis, pytest.mark.postgres, pytest.mark.timeout(300)]
GOAL = "Write a Python function double(number) with tests"
POSTGRES, REDIS = "10.77.4.1", "10.77.4.2"
OCTOLLM = [sys.executable, "-c", "from octollm.cli import main; main()"]


def test_what_the_file_starts_does_a_goal(tmp_path: Path) -> None:
    in_namespace("test_compose_runs:carried_out", str(tmp_path))


async def carried_out(folder: str) -> None:
    """Do as ``keys``, ``migrate`` and ``up`` would."""
    root = Path(folder)
    zone = Zone()
    zone.names = {"postgres": [POSTGRES], "redis": [REDIS]}
    for number, info in enumerate(SERVICES.values()):
        zone.names[info.host] = [f"10.77.1.{number + 1}"]
    for (address,) in zone.names.values():
        add_address(address)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(zone.served())
        model = await stack.enter_async_context(scripted_model(default_reply))
        services = compose(
            {
                "POSTGRES_PASSWORD": "pgsecret",
                "REDIS_PASSWORD": "redissecret",
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
            }
        )["services"]
        postgres = PostgresProcess(POSTGRES, 5432)
        stack.callback(postgres.close)
        postgres.start()
        await _owned(postgres.url, services["postgres"]["environment"])
        _start(stack, root, "redis", [*services["redis"]["command"], "--bind", REDIS, "--dir", folder], {})
        await _run(root, ["keys", "provision", str(root / "keys")], {})
        await _run(root, services["migrate"]["command"], services["migrate"]["environment"])
        for name in SERVICES:
            _start(stack, root, name, [*OCTOLLM, *services[name]["command"]], _settings(root, name, services[name]))
        key = (root / "keys" / "orchestrator" / "local.key").read_text().strip()
        async with httpx.AsyncClient(
            base_url="http://127.0.0.1:8000", headers={"Authorization": f"Bearer {key}"}, timeout=20
        ) as client:
            task = await _done(client)
    assert task["status"] == "completed", (task["error"], _logs(root))


async def _done(client: httpx.AsyncClient) -> dict[str, Any]:
    async def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await client.get("/ready")).status_code == 200
        return False

    await wait_until(ready, description="the gateway is ready", timeout=90, interval=0.1)
    submitted = await client.post("/tasks", json={"goal": GOAL})
    found: dict[str, Any] = submitted.json()
    assert submitted.status_code == 201, found

    async def final() -> bool:
        found.update((await client.get(f"/tasks/{found['task_id']}")).json())
        return found["status"] in FINAL_STATUSES

    await wait_until(final, description="the task ends", timeout=60, interval=0.1)
    return found


def _settings(root: Path, name: str, service: dict[str, Any]) -> dict[str, str]:
    """Return the file's environment with the image's, and the folder that the file puts at OCTOLLM_KEYS."""
    given = {key: str(value) for key, value in service["environment"].items()}
    return {**given, "OCTOLLM_HOST": "0.0.0.0", "OCTOLLM_KEYS": str(root / "keys" / name)}


async def _owned(url: str, environment: dict[str, str]) -> None:
    """Make the user and the database that the server's image makes."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"CREATE ROLE {environment['POSTGRES_USER']} LOGIN PASSWORD 'pgsecret'")
        await connection.execute(f"CREATE DATABASE {environment['POSTGRES_DB']} OWNER {environment['POSTGRES_USER']}")
    finally:
        await connection.close()


def _environment(settings: dict[str, str], root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTOLLM_")}
    return {**kept, "OCTOLLM_HOME": str(root / "home"), **settings}


async def _run(root: Path, command: list[str], settings: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *OCTOLLM,
        *command,
        env=_environment(settings, root),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


def _start(
    stack: contextlib.AsyncExitStack, root: Path, name: str, command: list[str], settings: dict[str, str]
) -> None:
    log = stack.enter_context((root / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, env=_environment(settings, root), stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)


def _logs(root: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-1200:]}" for path in sorted(root.glob("*.log")))
