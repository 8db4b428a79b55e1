"""What the tests of the models share."""

from __future__ import annotations

import pytest

from octollm.llm.cache import ModelCache


@pytest.fixture
def cache(tmp_path) -> ModelCache:
    """An empty cache."""
    return ModelCache(tmp_path / "models")


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A folder that pip takes for the only index there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder
