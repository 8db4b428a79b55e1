from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import httpx
import pytest
from whole import Door, answers

from octollm.testing.fake_model import ScriptedModel, ScriptedReply, ScriptedRequest, scripted_model
from octollm.testing.system import installation


class Mind:
    """What the scripted model says; a test may put another answer in."""

    def __init__(self) -> None:
        self.answer: Callable[[ScriptedRequest], str | ScriptedReply] = answers

    def __call__(self, asked: ScriptedRequest) -> str | ScriptedReply:
        return self.answer(asked)


@pytest.fixture
def mind() -> Mind:
    return Mind()


@pytest.fixture
async def model(mind: Mind) -> AsyncGenerator[ScriptedModel]:
    async with scripted_model(mind) as found:
        yield found


@pytest.fixture
def environment() -> dict[str, str]:
    """Further settings; a test module may have its own."""
    return {}


@pytest.fixture
async def door(tmp_path: Path, model: ScriptedModel, environment: dict[str, str]) -> AsyncGenerator[Door]:
    settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url, **environment}
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        yield Door(system, client)
