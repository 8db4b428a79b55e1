from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from databases import BACKENDS, SERVER_URL, Backend, PostgresServer, copy_migrated_files
from hypothesis import HealthCheck, settings
from wires import CURRENT, DIRECT, PROXIED

# The tests start hundreds of processes: without bytecode files each of them would compile the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# How fast a busy machine makes examples, and runs them, says nothing of what is tested.
settings.register_profile("octollm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("octollm")


HERE = Path(__file__).parent
UNIT = ("capability", "contracts", "live", "resilience", "tasks", "text", "test_config.py")
"""Tests of pure rules, and of parts with fakes below them."""
E2E = ("bench", "chaos", "cli", "deploy", "docs", "e2e")
"""Tests that start processes or whole installations. Longest first: a long file at the end leaves a core idle."""
SERVERS = {"backend", "every_wire", "postgres", "postgres_server"}
"""Fixtures that make a test need a server or sockets."""


def pytest_configure() -> None:
    """Before any test module imports the function that this replaces."""
    copy_migrated_files()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit` import only the files that can have unit tests, and no `conftest.py` of the other folders."""
    if config.option.markexpr == "unit" and collection_path not in (HERE, *HERE.parents):
        inside = collection_path.is_relative_to(HERE)
        return None if inside and collection_path.relative_to(HERE).parts[0] in UNIT else True
    return None


def pytest_collection_finish() -> None:
    """Exclude modules and test items from garbage collection: each full collection would visit them and free none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test as ``unit``, ``integration`` or ``e2e`` by its folder, and run the long ones first."""
    for item in items:
        parts = item.path.relative_to(HERE).parts if item.path.is_relative_to(HERE) else ("e2e",)
        needs_server = SERVERS & set(getattr(item, "fixturenames", ())) or any(
            item.get_closest_marker(name) for name in ("browser", "model", "postgres", "redis", "sandbox")
        )
        if parts[0] in E2E:
            item.add_marker(pytest.mark.e2e)
        elif parts[0] in UNIT and not needs_server:
            item.add_marker(pytest.mark.unit)
        else:
            item.add_marker(pytest.mark.integration)
    items.sort(key=_rank)


LONGEST = (
    "test_docs_examples.py",
    "test_fuzzed_services.py",
    "test_dockerfile.py",
    "test_two_of_each.py",
    "test_process_usage.py",
    "test_process_goals.py",
    "test_each_process_killed.py",
    "test_tasks_cancelled.py",
    "test_tasks_faults.py",
)
"""The longest files, in the order in which they start."""


def _rank(item: pytest.Item) -> int:
    if item.path.name in LONGEST:
        return LONGEST.index(item.path.name)
    return len(LONGEST) + (item.get_closest_marker("e2e") is None)


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


@pytest.fixture(params=[*DIRECT, *PROXIED])
def every_wire(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a test's services called in one way after the other: HTTP/1.1 and HTTP/2, in plain text and in TLS.

    A test of what a client sees of an instance that is away has ``parametrize("every_wire", DIRECT, indirect=True)``.
    """
    with CURRENT.use(request.param):
        yield
