from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from orchestrator_kit import OrchestratorHarness, Script, orchestrator_kit


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def orch(tmp_path: Path, script: Script) -> AsyncGenerator[OrchestratorHarness]:
    async with orchestrator_kit(tmp_path, script) as found:
        yield found
