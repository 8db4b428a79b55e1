from __future__ import annotations

import pytest
from client_world import Awaited, World, running_world
from scripts import default_reply

import octollm


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    with running_world(tmp_path_factory.mktemp("client") / "home") as world:
        yield world


@pytest.fixture
def world(installed: World):
    """Yield the module's installation, with a model that answers as a good one would."""
    yield installed
    installed.answer = default_reply


@pytest.fixture(params=["async", "sync"])
async def octo(request, world):
    """Yield a client of each kind."""
    if request.param == "async":
        async with octollm.connect(world.url) as client:
            yield client
    else:
        async with Awaited(octollm.connect_sync(world.url)) as client:
            yield client
