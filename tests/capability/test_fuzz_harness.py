"""The fuzzer's harness does what it says: without a fuzzer it is driven by plain random bytes for a moment."""

from __future__ import annotations

import importlib
import random
import sys
import types
from pathlib import Path

import pytest


class SeededDataProvider:
    """What atheris offers to read a value from bytes, by a seeded generator."""

    def __init__(self, data: bytes) -> None:
        self._random = random.Random(data)

    def ConsumeIntInRange(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def ConsumeInt(self, size: int) -> int:
        return self._random.getrandbits(8 * size) - (1 << (8 * size - 1))

    def ConsumeBool(self) -> bool:
        return self._random.random() < 0.5

    def ConsumeUnicode(self, count: int) -> str:
        return "".join(chr(self._random.randrange(0xD800)) for _ in range(self._random.randint(0, count)))

    ConsumeUnicodeNoSurrogates = ConsumeUnicode

    def PickValueInList(self, values: list[object]) -> object:
        return self._random.choice(values)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    fake = types.ModuleType("atheris")
    fake.FuzzedDataProvider = SeededDataProvider  # type: ignore[attr-defined]

    class NoInstrumentation:
        def __init__(self, **_options: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_error: object) -> None: ...

    fake.instrument_imports = NoInstrumentation  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "atheris", fake)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fuzz"))
    monkeypatch.delitem(sys.modules, "fuzz_verifier", raising=False)
    return importlib.import_module("fuzz_verifier")


def test_nothing_but_what_is_honest_is_accepted(harness: types.ModuleType) -> None:
    for seed in range(1500):
        harness.one_input(seed.to_bytes(4))


def test_an_acceptance_would_be_noticed(harness: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ACCEPTED", set())
    with pytest.raises(AssertionError, match="accepted"):
        for seed in range(5000):
            harness.one_input(seed.to_bytes(4))
