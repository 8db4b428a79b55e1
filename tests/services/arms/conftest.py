from __future__ import annotations

import asyncio
import os

import pytest

from octollm.errors import OctoError
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.selection import probe_sandbox


@pytest.fixture(scope="session")
def bubblewrap() -> Bubblewrap:
    """Return the real sandbox; without it a test is skipped, and fails in CI."""
    try:
        sandbox = Bubblewrap.open()
        asyncio.run(probe_sandbox(sandbox))
    except OctoError as error:
        if os.environ.get("CI"):
            pytest.fail(f"bubblewrap is needed in CI: {error.detail}")
        pytest.skip(f"bubblewrap does not work here: {error.detail}")
    return sandbox
