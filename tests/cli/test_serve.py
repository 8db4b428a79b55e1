"""`octollm serve`: wrong settings are refused, what is missing is waited for, a signal drains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncGenerator

import httpx
import pytest
from command_line import CommandLine

from octollm.contracts.services import SERVICES
from octollm.testing import wait_until


@pytest.fixture
def command_line(tmp_path) -> CommandLine:
    return CommandLine(tmp_path, {"OCTOLLM_STARTUP_TIMEOUT": "1", "OCTOLLM_SHUTDOWN_GRACE": "1"})


async def test_an_unknown_service_is_refused_with_those_that_there_are(command_line):
    ended = await command_line.run("serve", "oracle")
    assert ended.code == 2
    assert "oracle" in ended.err
    assert all(name in ended.err for name in SERVICES)


@pytest.mark.parametrize("name", ["orchestrator", "monitor", "reflex"])
async def test_a_redis_inside_the_process_is_no_use_between_processes(command_line, name):
    ended = await command_line.run("serve", name)
    assert ended.code == 2
    assert "OCTOLLM_REDIS_URL" in ended.err


async def test_keys_of_another_service_are_refused(command_line):
    keys = command_line.root / "keys"
    assert (await command_line.run("keys", "provision", str(keys))).code == 0
    command_line.settings["OCTOLLM_KEYS"] = str(keys / "coder")
    ended = await command_line.run("serve", "judge")
    assert ended.code == 2
    assert "judge.jwk" in ended.err
    assert "octollm keys provision" in ended.err


async def test_a_service_before_its_dependencies_says_what_it_waits_for_and_gives_up(command_line):
    ended = await command_line.run("serve", "judge")
    assert ended.code == 1
    assert "Waiting for orchestrator" in ended.err
    assert "Gave up after 1 s" in ended.err
    command_line.settings["OCTOLLM_REDIS_URL"] = "redis://127.0.0.1:1/0"
    ended = await command_line.run("serve", "orchestrator")
    assert ended.code == 1
    assert "Waiting for redis" in ended.err


@contextlib.asynccontextmanager
async def _serve_orchestrator(command_line: CommandLine) -> AsyncGenerator[None]:
    """Something that answers at the orchestrator's address, for a service that needs no more of it to start."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", SERVICES["orchestrator"].port + command_line.shift)
    async with server:
        yield


async def test_it_serves_says_so_and_ends_well_when_it_is_told_to_stop(command_line):
    url = f"http://127.0.0.1:{SERVICES['memory'].port + command_line.shift}"
    async with _serve_orchestrator(command_line), httpx.AsyncClient() as client:
        process = await command_line.start("serve", "memory")

        async def answers() -> bool:
            assert process.returncode is None, (await process.communicate())[1].decode()
            with contextlib.suppress(httpx.TransportError):
                return (await client.get(f"{url}/health")).status_code == 200
            return False

        await wait_until(answers, description="memory answers", timeout=30)
        # What stands there tells nothing of what is revoked, so that nothing may be done here yet.
        told = await client.get(f"{url}/ready")
        assert (told.status_code, told.json()["dependencies"]["revocations"]["ok"]) == (503, False)
        assert (await client.get(f"{url}/documents")).json()["code"] == "token_missing"
        ended = await command_line.interrupt(process, signal.SIGTERM)
    assert ended.code == 0
    assert "Ready memory on 127.0.0.1:" in ended.err
    events = [json.loads(line)["event"] for line in ended.err.splitlines() if line.startswith("{")]
    assert events[0] == "service.started"
    assert "service.draining" in events


async def test_a_taken_port_is_named(command_line):
    port = SERVICES["memory"].port + command_line.shift
    async with _serve_orchestrator(command_line):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            ended = await command_line.run("serve", "memory")
    assert ended.code == 1
    assert str(port) in ended.err
    assert "port_taken" in ended.err


async def test_provisioning_prints_what_it_wrote_and_never_a_secret(command_line):
    keys = command_line.root / "keys"
    first = await command_line.run("keys", "provision", str(keys), "--json")
    written = json.loads(first.out)["written"]
    assert len(written) == 2 * len(SERVICES) + 3
    secrets = [json.loads((keys / name / f"{name}.jwk").read_text())["d"] for name in SERVICES]
    assert not any(secret in first.out + first.err for secret in secrets)
    again = await command_line.run("keys", "provision", str(keys))
    assert again.out == ""
    assert "already" in again.err
