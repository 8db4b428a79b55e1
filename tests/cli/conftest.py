from __future__ import annotations

import pytest
from anyio.from_thread import start_blocking_portal
from command_line import CommandLine
from scripts import ReplaceableScript, default_reply

from octollm.testing.fake_model import scripted_model


@pytest.fixture
def script():
    return ReplaceableScript()


@pytest.fixture
async def command_line(tmp_path, script):
    """Yield a place whose model is scripted."""
    async with scripted_model(script) as model:
        command_line = CommandLine(tmp_path, {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url})
        command_line.model = model
        yield command_line


@pytest.fixture
async def up(command_line):
    """Run `octollm up`; interrupt it at the end, unless the test did."""
    process = await command_line.up()
    try:
        yield process
    finally:
        if process.returncode is None:
            await command_line.interrupt(process)


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """Run one `octollm up` for a module: yield its place, for tests that leave it as it was.

    The scripted model is served by a thread, for it must answer while no test's event loop runs.
    """
    with start_blocking_portal() as portal:
        script = ReplaceableScript()
        with portal.wrap_async_context_manager(scripted_model(script)) as model:
            settings = {"OCTOLLM_MODEL": "openai:scripted", "OCTOLLM_MODEL_URL": model.url}
            command_line = CommandLine(tmp_path_factory.mktemp("installation"), settings)
            command_line.model, command_line.script = model, script
            process = portal.call(command_line.up)
            try:
                yield command_line
            finally:
                portal.call(command_line.interrupt, process)


@pytest.fixture
def shared_command_line(tmp_path, installation):
    """Yield a place whose commands talk to the module's installation."""
    installation.script.reply = default_reply
    command_line = CommandLine(tmp_path, dict(installation.settings), installation)
    command_line.model, command_line.script = installation.model, installation.script
    return command_line
