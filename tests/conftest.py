from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from databases import BACKENDS, SERVER_URL, Backend, PostgresServer


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer(SERVER_URL)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Give one test after another both databases."""
    if request.param == "sqlite":
        yield Backend(None)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    async with server.database() as url:
        yield Backend(url)


@pytest.fixture
async def postgres(postgres_server: PostgresServer) -> AsyncIterator[Backend]:
    """Give a test of what only PostgreSQL has a database there."""
    async with postgres_server.database() as url:
        yield Backend(url)
