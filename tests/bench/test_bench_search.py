"""The benchmark of search runs to its end, in small and with vectors of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name == "search" or name.startswith("search.")]:
        del sys.modules[name]


async def test_every_measure_runs_and_finds_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from search import __main__ as program  # noqa: PLC0415  found on the path that the fixture sets
    from search import corpus  # noqa: PLC0415

    few = corpus.FACTS[::20]
    for module in (program, corpus):
        monkeypatch.setattr(module, "FACTS", few)

    async def embed() -> corpus.Vectors:
        random = np.random.default_rng(7).normal(size=(len(few), 64)).astype(np.float32)
        vectors = random / np.linalg.norm(random, axis=1, keepdims=True)
        return corpus.Vectors(vectors, vectors)

    monkeypatch.setattr(program, "embed_facts", embed)
    rows = {str(row["name"]): row["value"] for row in await program.measure(len(few) + 20, "")}
    assert rows["recall@5 en, vectors alone"] == 1.0, "a question has the vector of its passage"
    assert rows["recall@5 en, hybrid"] == 1.0
    timed = [value for name, value in rows.items() if "p50" in name and "CPU" not in name]
    assert len(timed) == 3
