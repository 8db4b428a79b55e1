"""Checking and passing on authority opens no connection and no file: whoever is cut off can still refuse."""

from __future__ import annotations

import builtins
import socket

import pytest
from capability_forge import TrustDomain

from octollm.capability.inspection import inspect


def test_a_chain_is_verified_and_delegated_without_a_socket_or_a_file(
    domain: TrustDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a capability asks nobody")

    case = domain.case()
    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(builtins, "open", forbidden)
    verifier = domain.verifier()
    for _ in range(2):
        verified = verifier.verify(case.bearer())
    onward = domain.delegator("executor").delegate(verified, "orchestrator", "files:read:0a", None)
    assert domain.verifier("orchestrator").verify(onward).issuer == "executor"
    assert inspect(onward).audience == "orchestrator"
