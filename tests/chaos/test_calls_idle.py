"""Thousands of connections that say nothing: the service goes on answering, and lets them go in time."""

from __future__ import annotations

import asyncio
import resource
import socket

import httpx
import pytest
from call_kit import Realm

CONNECTIONS = 5000


@pytest.fixture
def many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine lets a process have {hard} files")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def test_five_thousand_idle_connections_keep_nobody_from_being_served(
    many_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del many_files
    monkeypatch.setattr("octollm.rpc.http1_server.HEADER_SECONDS", 3.0)
    realm = Realm.make()
    idle: list[socket.socket] = []
    loop = asyncio.get_running_loop()
    async with realm.replica([]) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        try:
            for _ in range(CONNECTIONS):
                one = socket.socket()
                one.setblocking(False)
                await loop.sock_connect(one, address)
                idle.append(one)
            for _ in range(20):
                assert (await client.get("/health")).status_code == 200
            # Each is closed without a word: it never sent a request.
            async with asyncio.timeout(60):
                for one in idle:
                    assert await loop.sock_recv(one, 1) == b""
            assert (await client.get("/health")).status_code == 200
        finally:
            for one in idle:
                one.close()
