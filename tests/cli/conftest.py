from __future__ import annotations

import pytest
from anyio.from_thread import start_blocking_portal
from cli_support import Place
from scripts import ReplaceableScript, default_reply

from octollm.testing.fake_model import scripted_model


@pytest.fixture
def script():
    return ReplaceableScript()


@pytest.fixture
async def place(tmp_path, script):
    """Yield a place whose model is scripted."""
    async with scripted_model(script) as model:
        place = Place(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url})
        place.model = model
        yield place


@pytest.fixture
async def up(place):
    """Run `octollm up`; interrupt it at the end, unless the test did."""
    process = await place.up()
    try:
        yield process
    finally:
        if process.returncode is None:
            await place.interrupt(process)


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """Run one `octollm up` for a module: yield its place, for tests that leave it as it was.

    The scripted model is served by a thread, for it must answer while no test's event loop runs.
    """
    with start_blocking_portal() as portal:
        script = ReplaceableScript()
        with portal.wrap_async_context_manager(scripted_model(script)) as model:
            settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
            place = Place(tmp_path_factory.mktemp("installation"), settings)
            place.model, place.script = model, script
            process = portal.call(place.up)
            try:
                yield place
            finally:
                portal.call(place.interrupt, process)


@pytest.fixture
def shared_place(tmp_path, installation):
    """Yield a place whose commands talk to the module's installation."""
    installation.script.reply = default_reply
    place = Place(tmp_path, dict(installation.settings), installation)
    place.model, place.script = installation.model, installation.script
    return place
