from __future__ import annotations

import pytest
from anyio.from_thread import start_blocking_portal
from cli_support import Place, answers

from octollm.testing.fake_model import scripted_model


class Mind:
    """What the scripted model says; a test may put another answer in."""

    def __init__(self) -> None:
        self.answer = answers

    def __call__(self, asked):
        return self.answer(asked)


@pytest.fixture
def mind():
    return Mind()


@pytest.fixture
async def place(tmp_path, mind):
    """Yield a place whose model is scripted."""
    async with scripted_model(mind) as model:
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
        mind = Mind()
        with portal.wrap_async_context_manager(scripted_model(mind)) as model:
            settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
            place = Place(tmp_path_factory.mktemp("installation"), settings)
            place.model, place.mind = model, mind
            process = portal.call(place.up)
            try:
                yield place
            finally:
                portal.call(place.interrupt, process)


@pytest.fixture
def shared_place(tmp_path, installation):
    """Yield a place whose commands talk to the module's installation."""
    installation.mind.answer = answers
    place = Place(tmp_path, dict(installation.settings), installation)
    place.model, place.mind = installation.model, installation.mind
    return place
