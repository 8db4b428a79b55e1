"""One world a test."""

from __future__ import annotations

import pytest
from capability_forge import TrustDomain


@pytest.fixture
def domain() -> TrustDomain:
    return TrustDomain()
