"""One world a test."""

from __future__ import annotations

import pytest
from capability_forge import World


@pytest.fixture
def world() -> World:
    return World()
