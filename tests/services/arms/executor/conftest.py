"""Real sandboxes for the tests: a missing one is skipped on a laptop and fails in CI."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.sandbox import Sandbox
from octollm.services.arms.executor.wasi import Wasi


@pytest.fixture(scope="session")
def tool_cache() -> Path:
    return Path(os.environ.get("OCTOLLM_TOOL_CACHE") or Path.home() / ".cache" / "octollm" / "tools")


@pytest.fixture(scope="session")
def wasi(tool_cache: Path) -> Wasi:
    try:
        return asyncio.run(Wasi.open(tool_cache, fetch=False))
    except OctoError as error:
        if os.environ.get("CI"):
            pytest.fail(f"no WASI sandbox: {error.detail}")
        pytest.skip(f"no WASI sandbox: {error.detail}")


@pytest.fixture(params=["bubblewrap", "wasi"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    yield request.getfixturevalue(request.param)


def command_lines() -> list[str]:
    """Return the command lines of all processes of this machine."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue
    return found


@pytest.fixture
def running() -> Iterator[object]:
    """Tell whether some process has a word in its command line."""
    yield lambda word: any(word in line for line in command_lines())
