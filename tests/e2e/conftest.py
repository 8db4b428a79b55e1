from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from gateway_client import GatewayClient
from scripts import ReplaceableScript

from octollm.testing.fake_model import ScriptedModel, scripted_model
from octollm.testing.system import installation


@pytest.fixture
def script() -> ReplaceableScript:
    return ReplaceableScript()


@pytest.fixture
async def model(script: ReplaceableScript) -> AsyncGenerator[ScriptedModel]:
    async with scripted_model(script) as found:
        yield found


@pytest.fixture
def environment() -> dict[str, str]:
    """Further settings; a test module may have its own."""
    return {}


@pytest.fixture
async def gateway(tmp_path: Path, model: ScriptedModel, environment: dict[str, str]) -> AsyncGenerator[GatewayClient]:
    settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url, **environment}
    async with (
        installation(tmp_path / "home", environment=settings) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=30) as client,
    ):
        yield GatewayClient(system, client)
