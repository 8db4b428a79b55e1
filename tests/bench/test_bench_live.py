"""The benchmark of live updates: both servers serve every watcher, and each row of ours stands beside its peer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for folder in (TESTS.parent / "bench", TESTS / "services" / "reflex"):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [name for name in sys.modules if name == "live" or name.startswith("live.")]:
        del sys.modules[name]


def test_every_watcher_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from live import __main__ as bench  # noqa: PLC0415  found on the path that the fixture sets

    monkeypatch.setattr(bench, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(bench, "SECONDS_AT_RATE", 1)
    rows = bench.run([20], 1, 200)
    assert {row["server"] for row in rows} == {"gateway", "bare websockets"}
    assert [row["value"] for row in rows if row["name"].endswith("closed or not served")] == [0, 0]
    assert all(row["value"] > 0 for row in rows if row["name"].endswith("frames a second"))
