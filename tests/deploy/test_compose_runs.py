"""The Compose file and the chart carried out without an engine: their commands and settings, on hosts, do a goal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from chart import by_name, container, environment, manifests, need_helm
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


def test_what_the_compose_file_starts_does_a_goal(tmp_path: Path) -> None:
    in_namespace("test_compose_runs:run_compose_file", str(tmp_path), seconds=280)


def test_what_the_chart_starts_does_a_goal(tmp_path: Path) -> None:
    need_helm()
    in_namespace("test_compose_runs:run_chart", str(tmp_path), seconds=280)


@dataclass(frozen=True)
class Started:
    """What a description of an installation starts as a process: its arguments and environment."""

    arguments: list[str]
    environment: dict[str, str]


def _read_compose_file(model: str) -> dict[str, Started]:
    variables = {"POSTGRES_PASSWORD": "pgsecret", "REDIS_PASSWORD": "redissecret"}
    services = compose({**variables, "OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model})["services"]
    return {
        name: Started(
            services[name]["command"], {key: str(value) for key, value in services[name]["environment"].items()}
        )
        for name in ("migrate", *SERVICES)
    }


def _read_chart(model: str) -> dict[str, Started]:
    objects = manifests({"model": {"name": "openai:scripted", "url": model}, "executor": {"sandbox": "bubblewrap"}})
    secrets = {
        "octollm-database": {"url": "postgresql://octollm:pgsecret@postgres:5432/octollm"},
        "octollm-redis": {"url": "redis://:redissecret@redis:6379/0"},
    }
    found = by_name(objects, "Deployment")
    pods = {name: found[info.host] for name, info in SERVICES.items()} | {
        "migrate": by_name(objects, "Job")["octollm-migrate"]
    }
    return {name: Started(container(pod)["args"], environment(pod, secrets)) for name, pod in pods.items()}


async def run_compose_file(folder: str) -> None:
    await _run_installation(Path(folder), _read_compose_file)


async def run_chart(folder: str) -> None:
    await _run_installation(Path(folder), _read_chart)


async def _run_installation(root: Path, read: Callable[[str], dict[str, Started]]) -> None:
    """Make the keys and the schemas, start every service at an address of its own, and do a goal."""
    zone = Zone()
    zone.names = {"postgres": [POSTGRES], "redis": [REDIS]}
    for number, info in enumerate(SERVICES.values()):
        zone.names[info.host] = [f"10.77.1.{number + 1}"]
    for (address,) in zone.names.values():
        add_address(address)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(zone.served())
        model = await stack.enter_async_context(scripted_model(default_reply))
        started = read(model.url)
        postgres = PostgresProcess(POSTGRES, 5432)
        stack.callback(postgres.close)
        postgres.start()
        await _create_database(postgres.url)
        redis = ["redis-server", "--save", "", "--appendonly", "no", "--requirepass", "redissecret", "--bind", REDIS]
        _start(stack, root, "redis", [*redis, "--dir", str(root)], {})
        await _run(root, ["keys", "provision", str(root / "keys")], {})
        await _run(root, started["migrate"].arguments, _settings(root, "migrate", started["migrate"]))
        for name in SERVICES:
            _start(stack, root, name, [*OCTOLLM, *started[name].arguments], _settings(root, name, started[name]))
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

    await wait_until(ready, description="the gateway is ready", timeout=150, interval=0.1)
    submitted = await client.post("/tasks", json={"goal": GOAL})
    found: dict[str, Any] = submitted.json()
    assert submitted.status_code == 201, found

    async def final() -> bool:
        found.update((await client.get(f"/tasks/{found['task_id']}")).json())
        return found["status"] in FINAL_STATUSES

    await wait_until(final, description="the task ends", timeout=100, interval=0.1)
    return found


def _settings(root: Path, name: str, started: Started) -> dict[str, str]:
    """Return the environment with the image's, and with folders of the test for those of a container."""
    folders = {"OCTOLLM_HOME": str(root / "home"), "OCTOLLM_KEYS": str(root / "keys" / name)}
    return {**started.environment, "OCTOLLM_HOST": "0.0.0.0", **folders}


async def _create_database(url: str) -> None:
    """Make the user and the database of the installation."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE ROLE octollm LOGIN PASSWORD 'pgsecret'")
        await connection.execute("CREATE DATABASE octollm OWNER octollm")
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
