from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from databases import Backend
from task_kit import TaskKit, open_task_kit


@pytest.fixture
async def kit() -> AsyncGenerator[TaskKit]:
    async with open_task_kit() as opened:
        yield opened


@pytest.fixture
async def each_kit(backend: Backend) -> AsyncGenerator[TaskKit]:
    """Give one test after another both databases."""
    async with open_task_kit(backend=backend) as opened:
        yield opened
