"""Minting at the root and under grants: every honest path works, and no other."""

from __future__ import annotations

from typing import Any

import pytest
from capability_forge import ALICE, NOW, WORK, TrustDomain
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.capability import (
    BUILT_IN_CALLS,
    CapabilityError,
    DelegationTree,
    Delegator,
    Principal,
    ScopeSet,
    SigningKey,
    TaskRef,
    VerifiedChain,
    attenuate,
    parse_delegation_tree,
    preset_scopes,
)


def enter(
    domain: TrustDomain, may: dict[str, Any] | DelegationTree, *, aud: str = "coder", scope: str = "coder:execute"
) -> VerifiedChain:
    """Return what ``aud`` sees of a bearer string that the root sent it."""
    tree = may if isinstance(may, DelegationTree) else parse_delegation_tree(may)
    bearer = domain.minter.mint_access(ALICE, aud, scope, task=WORK, delegation=tree, holder_jkt=domain.jkt(aud))
    return domain.verifier(aud).verify(bearer)


def test_a_root_pair(domain: TrustDomain) -> None:
    verified = enter(domain, {"judge:validate": {"executor:run": {}}})
    assert verified.principal == ALICE
    assert verified.task == WORK
    assert verified.issuer == "orchestrator"
    assert verified.expires == NOW + 60
    assert verified.grant is not None
    assert verified.grant.exp == NOW + 3_600
    assert verified.grant.cnf.jkt == domain.jkt("coder")


def test_without_anything_to_follow_there_is_no_grant(domain: TrustDomain) -> None:
    for may in (None, DelegationTree()):
        bearer = domain.minter.mint_access(ALICE, "orchestrator", "tasks:create files:*", 300, delegation=may)
        assert "~" not in bearer
        verified = domain.verifier("orchestrator").verify(bearer)
        assert verified.grant is None
        assert verified.task is None
        assert verified.expires == NOW + 300


def test_the_grant_ends_with_the_step(domain: TrustDomain) -> None:
    bearer = domain.minter.mint_access(
        ALICE,
        "coder",
        "coder:execute",
        delegation=parse_delegation_tree({"models:chat": {}}),
        holder_jkt=domain.jkt("coder"),
        grant_lifetime=120,
    )
    verified = domain.verifier("coder").verify(bearer)
    assert verified.grant is not None
    assert verified.grant.exp == NOW + 120
    domain.clock.time = NOW + 90
    child = domain.delegator("coder").delegate(verified, "models", "models:chat", None)
    assert domain.verifier("models").verify(child).expires == NOW + 120, "no child outlives its grant"
    domain.clock.time = NOW + 120
    with pytest.raises(CapabilityError) as caught:
        domain.delegator("coder").delegate(verified, "models", "models:chat", None)
    assert caught.value.code == "token_expired"


def test_authority_shrinks_hop_by_hop(domain: TrustDomain) -> None:
    may, missing = attenuate("coder:execute", BUILT_IN_CALLS, preset_scopes("user"))
    assert missing == []
    at_coder = enter(domain, may)
    to_judge = domain.delegator("coder").delegate(at_coder, "judge", "judge:validate", domain.jkt("judge"), call="c1")
    at_judge = domain.verifier("judge").verify(to_judge)
    assert at_judge.issuer == "coder"
    assert at_judge.call == "c1"
    assert at_judge.principal == ALICE
    assert at_judge.grant is not None
    assert at_judge.grant.may.to_dict() == {"executor:run": {"files:read": {}}}
    to_executor = domain.delegator("judge").delegate(at_judge, "executor", "executor:run", domain.jkt("executor"))
    at_executor = domain.verifier("executor").verify(to_executor)
    to_files = domain.delegator("executor").delegate(at_executor, "orchestrator", "files:read:0a1b", None)
    at_files = domain.verifier("orchestrator").verify(to_files)
    assert str(at_files.scopes) == "files:read:0a1b"
    assert at_files.grant is None
    assert [link.aud for link in at_files.links] == ["orchestrator", "coder", "judge", "executor"]


@pytest.mark.parametrize(
    ("aud", "scope"),
    [
        ("executor", "executor:run"),
        ("judge", "judge:*"),
        ("judge", "judge:accept"),
        ("models", "models:embeddings"),
        ("memory", "models:chat"),
        ("orchestrator", "files:read"),
        ("orchestrator", "files:read:0b"),
    ],
)
def test_what_may_does_not_allow_is_refused_before_anything_is_sent(domain: TrustDomain, aud: str, scope: str) -> None:
    may = {"judge:validate": {"executor:run": {}}, "models:chat": {}, "files:read:0a": {}}
    verified = enter(domain, may)
    with pytest.raises(CapabilityError) as caught:
        domain.delegator("coder").delegate(verified, aud, scope, domain.jkt("judge"))
    assert caught.value.code == "authority_missing"
    assert caught.value.reason == "not_in_may"
    assert scope in caught.value.detail
    assert domain.delegator("coder").delegate(verified, "orchestrator", "files:read:0a", None)
    assert domain.delegator("coder").delegate(verified, "orchestrator", "files:read:0a:x", None)


def test_without_a_grant_there_is_no_authority(domain: TrustDomain) -> None:
    bearer = domain.minter.mint_access(ALICE, "coder", "coder:execute", task=WORK)
    verified = domain.verifier("coder").verify(bearer)
    with pytest.raises(CapabilityError) as caught:
        domain.delegator("coder").delegate(verified, "models", "models:chat", None)
    assert (caught.value.reason, caught.value.code) == ("grant_absent", "authority_missing")
    assert "models:chat" in caught.value.detail


def test_a_callee_whose_key_is_not_known_may_not_call_on(domain: TrustDomain) -> None:
    verified = enter(domain, {"judge:validate": {"executor:run": {}}})
    child = domain.delegator("coder").delegate(verified, "judge", "judge:validate", None)
    at_judge = domain.verifier("judge").verify(child)
    assert at_judge.grant is None
    with pytest.raises(CapabilityError):
        domain.delegator("judge").delegate(at_judge, "executor", "executor:run", None)


def test_a_grant_is_used_with_its_own_key_only(domain: TrustDomain) -> None:
    verified = enter(domain, {"models:chat": {}})
    stranger = Delegator(SigningKey.generate("coder"), "coder", domain.clock, domain.ids)
    with pytest.raises(CapabilityError) as caught:
        stranger.delegate(verified, "models", "models:chat", None)
    assert caught.value.reason == "holder_unknown"
    other_name = Delegator(domain.keys["coder"], "judge", domain.clock, domain.ids)
    with pytest.raises(CapabilityError):
        other_name.delegate(verified, "models", "models:chat", None)


def test_a_service_delegates_with_any_of_its_keys(domain: TrustDomain) -> None:
    verified = enter(domain, {"models:chat": {}})
    rotating = Delegator([SigningKey.generate("coder"), domain.keys["coder"]], "coder", domain.clock, domain.ids)
    assert domain.verifier("models").verify(rotating.delegate(verified, "models", "models:chat", None))


@pytest.mark.parametrize(
    "change",
    [
        {"scopes": ""},
        {"scopes": "judge:validate"},
        {"scopes": "coder:execute judge:validate"},
        {"lifetime": 0},
        {"lifetime": -1},
        {"lifetime": float("nan")},
        {"lifetime": 86_401},
        {"principal": Principal("", "b", "c")},
        {"principal": Principal("a b", "b", "c")},
        {"principal": Principal("a", "b\n", "c")},
        {"principal": Principal("a", "b", "c" * 256)},
        {"task": TaskRef("")},
        {"task": TaskRef("t", None, 1)},
        {"task": TaskRef("t", "s", -1)},
        {"task": TaskRef("t", "s", 0, 2**60)},
        {"call": "with space"},
        {"delegation": parse_delegation_tree({"models:chat": {}}), "holder_jkt": "short"},
        {"delegation": parse_delegation_tree({"models:chat": {}}), "holder_jkt": "A" * 43, "grant_lifetime": 3_601},
    ],
)
def test_the_root_mints_nothing_that_would_be_refused(domain: TrustDomain, change: dict[str, Any]) -> None:
    honest: dict[str, Any] = {"principal": ALICE, "aud": "coder", "scopes": "coder:execute", "task": WORK}
    assert domain.minter.mint_access(**honest)
    with pytest.raises(CapabilityError) as caught:
        domain.minter.mint_access(**{**honest, **change})
    assert caught.value.reason == "misuse"


def test_the_root_needs_to_know_who_holds_a_grant(domain: TrustDomain) -> None:
    with pytest.raises(CapabilityError) as caught:
        domain.minter.mint_access(
            ALICE, "coder", "coder:execute", delegation=parse_delegation_tree({"models:chat": {}})
        )
    assert (caught.value.reason, caught.value.code) == ("holder_unknown", "authority_missing")


def test_what_does_not_fit_is_said_where_it_is_made(domain: TrustDomain) -> None:
    many = parse_delegation_tree({f"files:read:{n:064x}": {} for n in range(200)})
    with pytest.raises(CapabilityError) as caught:
        enter(domain, many)
    assert caught.value.reason == "does_not_fit"


def test_every_token_has_an_id_of_its_own(domain: TrustDomain) -> None:
    verified = enter(domain, {"judge:validate": {"executor:run": {}}})
    child = domain.delegator("coder").delegate(verified, "judge", "judge:validate", domain.jkt("judge"))
    ids = [link.jti for link in domain.verifier("judge").verify(child).links]
    assert len(set(ids)) == len(ids) == 3


_SERVICES = ("coder", "judge", "executor")
_OPERATIONS = [f"{name}:run" for name in _SERVICES] + ["coder:*"]


def _level(below: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(_OPERATIONS), below, max_size=3)


_empty: dict[str, Any] = {}
_trees = _level(_level(_level(st.just(_empty))))


def _allowed(tree: dict[str, Any], path: list[str]) -> bool:
    """Say whether ``tree`` allows ``path``, by trying every entry."""
    if not path:
        return True
    service = path[0].split(":")[0]
    return any(_allowed(under, path[1:]) for entry, under in tree.items() if entry in {path[0], f"{service}:*"})


@settings(max_examples=60, deadline=None)
@given(_trees, st.lists(st.sampled_from([f"{name}:run" for name in _SERVICES]), min_size=1, max_size=4))
def test_exactly_the_paths_of_the_tree_can_be_walked(tree: dict[str, Any], path: list[str]) -> None:
    """Delegate along ``path``: it works to its end if, and only if, the root's tree allows the path."""
    domain = TrustDomain()
    walked = True
    try:
        at = enter(domain, tree)
        holder = "coder"
        for scope in path:
            callee = scope.split(":")[0]
            bearer = domain.delegator(holder).delegate(at, callee, scope, domain.jkt(callee))
            at = domain.verifier(callee).verify(bearer)
            assert at.scopes == ScopeSet.parse(scope)
            assert at.principal == ALICE
            holder = callee
    except CapabilityError as error:
        assert error.code == "authority_missing"
        walked = False
    assert walked == _allowed(tree, path)
