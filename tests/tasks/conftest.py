from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from task_kit import TaskKit, open_task_kit


@pytest.fixture
async def kit() -> AsyncGenerator[TaskKit]:
    async with open_task_kit() as opened:
        yield opened
