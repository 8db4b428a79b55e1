from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator

import pytest
from databases import BACKENDS, SERVER_URL, Backend, PostgresServer
from hypothesis import HealthCheck, settings
from wires import CURRENT, NAMES, wire_named

from octollm.rpc.transport import PLAINTEXT

# How fast a busy machine makes examples, and runs them, says nothing of what is tested.
settings.register_profile("octollm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("octollm")


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Let what tests start hear Ctrl-C: pytest-xdist's workers ignore it, and their children would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(params=NAMES)
def every_wire(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a test's services talk in one way after the other."""
    CURRENT.wire = wire_named(request.param)
    yield
    CURRENT.wire = PLAINTEXT
