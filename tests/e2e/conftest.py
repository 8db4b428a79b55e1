from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from gateway_client import GatewayClient
from scripts import ReplaceableScript, default_reply

from octollm.installation.embedded import Installation
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


@dataclass(frozen=True)
class SharedInstallation:
    """An installation of a whole module, and the script of its model."""

    system: Installation
    script: ReplaceableScript


@pytest.fixture(scope="module")
def shared_installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedInstallation]:
    """Run one installation for a module, whose tests leave it as it was.

    It has the event loop of a thread, for it must answer while no test's loop runs.
    """
    script = ReplaceableScript()
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(scripted_model(script)) as model:
        settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
        home = tmp_path_factory.mktemp("shared") / "home"
        with portal.wrap_async_context_manager(installation(home, environment=settings)) as system:
            yield SharedInstallation(system, script)


@pytest.fixture
async def shared_gateway(shared_installation: SharedInstallation) -> AsyncGenerator[GatewayClient]:
    """Give a test the module's installation, whose model has the default script again."""
    shared_installation.script.reply = default_reply
    async with httpx.AsyncClient(base_url=shared_installation.system.gateway_url, timeout=30) as client:
        yield GatewayClient(shared_installation.system, client)
