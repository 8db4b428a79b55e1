"""The benchmark of events runs to its end, in small, and judges what it measured."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import PostgresServer

REDIS = os.environ.get("OCTOLLM_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name == "events" or name.startswith("events.")]:
        del sys.modules[name]


@pytest.mark.redis
@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("nats-server") is None, reason="nats-server is not installed")
async def test_every_measure_runs_and_is_judged(
    postgres_server: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    from events.__main__ import measure, report_targets  # noqa: PLC0415  found on the path that the fixture sets

    rows = await measure(postgres_server.url, REDIS, count=10, rounds=1, subscribers=(2,), lease=1.0)
    table = rows.table()
    assert all(isinstance(row["value"], float) and row["value"] >= 0 for row in table)
    assert len(table) > 40
    report_targets(rows)
    printed = capsys.readouterr().out
    assert printed.count("met") + printed.count("MISSED") == 6
