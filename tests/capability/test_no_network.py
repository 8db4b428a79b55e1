"""Checking and passing on authority opens no connection and no file: whoever is cut off can still refuse."""

from __future__ import annotations

import builtins
import socket

import pytest
from capability_forge import World

from octollm.capability.inspection import inspect


def test_a_chain_is_verified_and_delegated_without_a_socket_or_a_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a capability asks nobody")

    case = world.case()
    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(builtins, "open", forbidden)
    verifier = world.verifier()
    for _ in range(2):
        verified = verifier.verify(case.bearer())
    onward = world.delegator("executor").delegate(verified, "orchestrator", "files:read:0a", None)
    assert world.verifier("orchestrator").verify(onward).issuer == "executor"
    assert inspect(onward).audience == "orchestrator"
