"""What the benchmark of capabilities measures: real chains, whose raw operations are those that are in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name == "capabilities" or name.startswith("capabilities.")]:
        del sys.modules[name]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_chain_is_as_deep_as_it_says(depth: int) -> None:
    from capabilities.chains import HOPS, chain_of  # noqa: PLC0415  found on the path that the fixture sets

    chain, minter = chain_of(depth)
    verified = chain.verifier().verify(chain.bearer)
    assert len(verified.links) == depth + 1 == len(chain.signed)
    assert (chain.audience, verified.issuer) == (
        HOPS[depth - 1][0],
        "orchestrator" if depth == 1 else HOPS[depth - 2][0],
    )
    assert all(key.verify(signature, message) for key, signature, message in chain.signed)
    assert chain.verifier().verify(minter.mint()).scopes == verified.scopes


def test_every_measure_does_its_work() -> None:
    from capabilities.__main__ import benchmarks, measure_microseconds, rejection_of_a_megabyte  # noqa: PLC0415
    from capabilities.chains import chain_of  # noqa: PLC0415

    for work in (*benchmarks({depth: chain_of(depth) for depth in (1, 3)}).values(), rejection_of_a_megabyte()):
        assert measure_microseconds(work, 0) > 0


def test_a_third_hop_fits_its_bound() -> None:
    from capabilities.chains import chain_of  # noqa: PLC0415

    assert len(chain_of(3)[0].bearer) <= 3500
