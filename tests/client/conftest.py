from __future__ import annotations

import pytest
from client_kit import AsyncAdapter, ClientKit, running_kit
from scripts import default_reply

import octollm


@pytest.fixture(scope="module")
def installation_kit(tmp_path_factory):
    with running_kit(tmp_path_factory.mktemp("client") / "home") as kit:
        yield kit


@pytest.fixture
def kit(installation_kit: ClientKit):
    """Yield the module's installation, with a model that answers as a good one would."""
    yield installation_kit
    installation_kit.answer = default_reply


@pytest.fixture(params=["async", "sync"])
async def octo(request, kit):
    """Yield a client of each kind."""
    if request.param == "async":
        async with octollm.connect(kit.url) as client:
            yield client
    else:
        async with AsyncAdapter(octollm.connect_sync(kit.url)) as client:
            yield client
