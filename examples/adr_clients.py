"""The clients of ADR-002, as its text has them, against `octollm up`.

    python examples/adr_clients.py execute    # the orchestrator's call of the coder arm
    python examples/adr_clients.py validate   # the coder's call of the judge arm
    python examples/adr_clients.py events     # a subscription to task events; needs OCTOLLM_REDIS_URL
    python examples/adr_clients.py progress   # a WebSocket client that prints a task's progress

Mended where the text has slips: a pattern wants `psubscribe` and gives `pmessage`, and times carry their zone.
Packages: httpx, redis, websockets.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from typing import Any

import httpx
import redis.asyncio
from websockets.asyncio.client import connect as websocket_connect

GATEWAY = os.environ.get("OCTOLLM_URL", "http://localhost:8000")
CODER = os.environ.get("OCTOLLM_CODER_URL", "http://localhost:8102")
JUDGE = os.environ.get("OCTOLLM_JUDGE_URL", "http://localhost:8103")

# On this machine the gateway needs no key, unless OCTOLLM_TRUST_LOOPBACK is off.
KEY = {"Authorization": f"Bearer {os.environ['OCTOLLM_API_KEY']}"} if "OCTOLLM_API_KEY" in os.environ else {}

TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=10.0, pool=5.0)
LIMITS = httpx.Limits(max_keepalive_connections=20, max_connections=100)


def mint(scope: str, aud: str) -> str:
    """Return a capability token; the command talks to the gateway."""
    command = [sys.executable, "-c", "from octollm.cli import main; main()"]
    arguments = ["token", "mint", "--scope", scope, "--aud", aud]
    return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout.strip()


async def execute_code_task(client: httpx.AsyncClient, goal: str) -> str:
    """Call the coder arm, as the orchestrator does."""
    response = await client.post(
        f"{CODER}/execute",
        json={"task_id": "task-123", "goal": goal},
        headers={
            "Authorization": f"Bearer {mint('coder:execute', 'coder')}",
            "X-Request-ID": str(uuid.uuid4()),
            "X-Correlation-ID": str(uuid.uuid4()),
        },
    )
    response.raise_for_status()
    return response.json()["output"]


async def validate_code(client: httpx.AsyncClient, code: str) -> bool:
    """Call the judge arm, as the coder does."""
    response = await client.post(
        f"{JUDGE}/validate",
        json={"code": code, "language": "python"},
        headers={"Authorization": f"Bearer {mint('judge:validate', 'judge')}"},
    )
    response.raise_for_status()
    return response.json()["is_valid"]


async def submit(client: httpx.AsyncClient, goal: str) -> str:
    """Submit a goal at the gateway; return the task's id."""
    response = await client.post(f"{GATEWAY}/tasks", json={"goal": goal}, headers=KEY)
    response.raise_for_status()
    return response.json()["task_id"]


async def handle_task_events(url: str, client: httpx.AsyncClient) -> None:
    """Subscribe to every event of tasks, submit one, and print what happens until it ends."""
    server: Any = redis.asyncio.from_url(url)  # the library's types are incomplete here
    async with server, server.pubsub() as pubsub:
        await pubsub.psubscribe("events:task:*")
        task_id = await submit(client, "Write a Python function add(a, b) with tests")
        async for message in pubsub.listen():
            if message["type"] == "pmessage":
                event = json.loads(message["data"])
                print(event["event_type"], event["timestamp"], event["data"]["task_id"])
                ended = event["event_type"] in ("task.completed", "task.failed", "task.cancelled")
                if ended and event["data"]["task_id"] == task_id:
                    return


async def print_progress(task_id: str) -> None:
    """Watch a task until its last frame."""
    async with websocket_connect(f"ws{GATEWAY.removeprefix('http')}/ws/tasks/{task_id}", additional_headers=KEY) as ws:
        async for message in ws:
            update = json.loads(message)
            print(f"Task progress: {update['progress']}%")


async def main(name: str) -> int:
    """Run one of the clients."""
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS) as client:
        match name:
            case "execute":
                print(await execute_code_task(client, "Write a Python function add(a, b) with tests"))
            case "validate":
                print(await validate_code(client, "def add(a, b):\n    return a + b\n"))
            case "events":
                url = os.environ.get("OCTOLLM_REDIS_URL", "")
                if not url.startswith("redis"):
                    print("Start Redis, then `octollm up` and this with OCTOLLM_REDIS_URL=redis://localhost:6379")
                    return 2
                await handle_task_events(url, client)
            case "progress":
                await print_progress(await submit(client, "Write a Python function add(a, b) with tests"))
            case _:
                print(__doc__)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "")))
