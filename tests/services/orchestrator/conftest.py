from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from orchestra import Orchestra, Script, orchestra


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def orch(tmp_path: Path, script: Script) -> AsyncGenerator[Orchestra]:
    async with orchestra(tmp_path, script) as found:
        yield found
