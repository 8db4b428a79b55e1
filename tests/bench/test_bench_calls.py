"""What the benchmark of service calls measures: that its calls are real ones, and that its figures add up."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from octollm.testing import wait_until


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    # The collector of the tests' own process stays as it is.
    monkeypatch.setattr("octollm.installation.service_host.tune_garbage_collector", lambda: None)
    yield
    for name in [name for name in sys.modules if name == "calls" or name.startswith("calls.")]:
        del sys.modules[name]


@pytest.mark.parametrize("kept", [False, True])
async def test_calls_are_made_and_counted(tmp_path: Path, kept: bool) -> None:
    from calls import measuring, octo  # noqa: PLC0415  found on the path that the fixture sets

    port = free_port()
    keys = octo.Keys.make()
    serving = asyncio.create_task(octo.serve(port, keys, f"sqlite:///{tmp_path}/keys.db" if kept else None))
    try:

        async def answers() -> bool:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return True
            return False

        await wait_until(answers, description="the server listens")
        async with octo.calling(port, keys, 1000, keyed=kept, minted=not kept) as call:
            assert await call() == octo.Body("x" * 1000)
            found = await measuring.in_flight(call, 4, 0.2)
            assert found.rate > 0
            assert 0 < found.p50 <= found.p99
            steady = await measuring.at_rate(call, 50, 0.2)
            assert 0 < steady.rate < 60
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
