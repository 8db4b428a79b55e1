"""The tables: declared calls, presets, reasons, and what the package exports."""

from __future__ import annotations

from pathlib import Path

import pytest

import octollm.capability
from octollm.capability import BUILT_IN_CALLS, PRESETS, REASONS, ScopeSet, attenuate, parse_scope, preset_scopes
from octollm.capability import scopes as principals
from octollm.capability.errors import CapabilityError
from octollm.contracts.problems import ERROR_KINDS
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES, service_of


def test_every_declared_call_is_to_an_operation_of_a_service() -> None:
    for operation, calls in BUILT_IN_CALLS.items():
        assert service_of(parse_scope(operation).family) in SERVICES
        for call in calls:
            assert call.scope in BUILT_IN_CALLS


@pytest.mark.parametrize("operation", list(BUILT_IN_CALLS))
def test_a_user_may_have_every_built_in_operation_done(operation: str) -> None:
    may, missing = attenuate(operation, BUILT_IN_CALLS, preset_scopes("user"))
    assert missing == []
    assert may.depth <= 4


def test_the_tree_of_the_coder() -> None:
    may, _ = attenuate("coder:execute", BUILT_IN_CALLS, preset_scopes("user"))
    assert may.to_dict() == {
        "models:chat": {},
        "judge:validate": {"executor:run": {"files:read": {}}},
        "executor:run": {"files:read": {}},
        "files:read": {},
        "files:write": {},
    }


def test_presets() -> None:
    user, admin = preset_scopes("user"), preset_scopes("admin")
    assert user.is_subset(admin)
    assert not admin.is_subset(user)
    for scope in ("tasks:create", "files:read:0a", "memory:write", "models:chat", "events:read"):
        assert user.allows(scope)
    for scope in ("webhooks:create", "keys:create", "audit:read", "arms:admit", "monitor:read"):
        assert admin.allows(scope)
        assert not user.allows(scope)
    assert not admin.allows("audit:write")
    assert not admin.allows("events:write")
    assert all(user.allows(f"{arm}:execute") for arm in BUILT_IN_ARMS)


def test_a_preset_covers_the_arms_that_are_admitted() -> None:
    assert preset_scopes("user", ["translator"]).allows("translator:execute")
    assert not preset_scopes("user", ["translator"]).allows("coder:execute")
    with pytest.raises(CapabilityError):
        preset_scopes("root")
    with pytest.raises(CapabilityError):
        preset_scopes("user", ["*"])


def test_presets_are_well_formed_and_documented() -> None:
    table = Path(principals.__file__).read_text(encoding="utf-8")
    for scopes in PRESETS.values():
        assert ScopeSet.parse(" ".join(scopes))
        assert all(f"| ``{scope}`` |" in table for scope in scopes)


def test_every_reason_has_a_code_of_the_catalogue() -> None:
    assert set(REASONS.values()) <= set(ERROR_KINDS)


def test_all_reasons_of_a_code_read_alike() -> None:
    texts: dict[str, set[str]] = {}
    for reason, code in REASONS.items():
        texts.setdefault(code, set()).add(str(CapabilityError(reason)))
    assert all(len(alike) == 1 for alike in texts.values())


def test_the_public_names_are_these() -> None:
    exported = octollm.capability.__all__
    assert len(exported) == len(set(exported))
    assert all(hasattr(octollm.capability, name) for name in exported)
    assert sorted(exported) == sorted(EXPORTS.split())


EXPORTS = """
AccessClaims BUILT_IN_CALLS CallTokens CapabilityError Declarations DeclaredCall DelegationTree Delegator Directory
DirectoryEntry GrantClaims PRESETS Principal PublicKey REASONS RevocationKind Revocations RootMinter Scope ScopeSet
ServiceTokenSigner SigningKey TaskRef VerifiedChain Verifier attenuate contains digest_of intersect
parse_delegation_tree parse_scope preset_scopes run_value to_jwks union verify_directory verify_service_token
"""
