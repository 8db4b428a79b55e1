from __future__ import annotations

import pytest
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
