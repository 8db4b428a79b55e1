"""What a set of revocations refuses."""

from __future__ import annotations

import pytest
from capability_forge import NOW, TrustDomain
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import AccessClaims, CapabilityError, RevocationKind, Revocations, ScopeSet, run_value


def link(iat: float = NOW, run: int | None = None, **claims: str) -> AccessClaims:
    common = {"sub": "alice", "cred": "key-1", "jti": "j1", "task": "t1", "tenant": "acme", **claims}
    return AccessClaims(
        iss="orchestrator",
        aud="coder",
        exp=iat + 60,
        nbf=iat,
        iat=iat,
        scope=ScopeSet.parse("coder:execute"),
        run=run,
        **common,
    )


@pytest.mark.parametrize(("kind", "value"), [("sub", "alice"), ("cred", "key-1"), ("aud", "coder")])
def test_what_was_issued_by_then_is_refused(kind: RevocationKind, value: str) -> None:
    revocations = Revocations()
    revocations.add(kind, value, NOW, "acme")
    assert revocations.is_revoked([link(NOW)])
    assert revocations.is_revoked([link(NOW - 1)])
    assert not revocations.is_revoked([link(NOW + 0.001)])
    assert revocations.is_revoked([link(NOW + 1), link(NOW)]), "any link of a chain"
    assert not revocations.is_revoked([])


@pytest.mark.parametrize(("kind", "value"), [("jti", "j1"), ("task", "t1"), ("run", run_value("t1", 3))])
def test_what_never_comes_back_is_refused_whatever_its_issuers_clock_said(kind: RevocationKind, value: str) -> None:
    revocations = Revocations()
    revocations.add(kind, value, NOW, "acme")
    assert revocations.is_revoked([link(NOW + 20, run=3)])
    assert not revocations.is_revoked([link(NOW, jti="j2", task="t2", run=3)])


def test_a_take_over_refuses_what_the_last_holder_was_lent_and_nothing_else() -> None:
    revocations = Revocations()
    revocations.add("run", run_value("t1", 3), NOW, "acme")
    assert revocations.is_revoked([link(NOW, run=3)])
    assert not revocations.is_revoked([link(NOW, run=4)])
    assert not revocations.is_revoked([link(NOW, run=30)])
    assert not revocations.is_revoked([link(NOW)])


def test_another_tenants_are_not_ones_own() -> None:
    revocations = Revocations()
    for kind, value in (("jti", "j1"), ("task", "t1"), ("sub", "alice"), ("cred", "key-1"), ("aud", "coder")):
        revocations.add(kind, value, NOW, "other")  # type: ignore[arg-type]
    assert not revocations.is_revoked([link(NOW)])
    assert revocations.is_revoked([link(NOW, tenant="other")])


def test_a_revocation_that_is_told_again_changes_nothing() -> None:
    revocations = Revocations()
    revocations.add("sub", "alice", NOW, "acme")
    version = revocations.version
    revocations.add("sub", "alice", NOW, "acme")
    assert revocations.version == version


def test_kinds_do_not_mix() -> None:
    revocations = Revocations()
    revocations.add("task", "alice", NOW, "acme")
    revocations.add("sub", "t1", NOW, "acme")
    assert not revocations.is_revoked([link()])
    with pytest.raises(CapabilityError):
        revocations.add("tenant", "acme", NOW, "acme")  # type: ignore[arg-type]


def test_an_older_time_does_not_undo_a_newer_one() -> None:
    revocations = Revocations()
    revocations.add("sub", "alice", NOW, "acme")
    revocations.add("sub", "alice", NOW - 100, "acme")
    assert revocations.is_revoked([link(NOW)])
    assert len(revocations) == 1


def test_what_can_no_longer_matter_is_forgotten() -> None:
    revocations = Revocations()
    revocations.add("sub", "alice", NOW, "acme")
    revocations.prune(NOW + 86_400)
    assert len(revocations) == 1, "a token of a day may still be accepted within the skew"
    revocations.prune(NOW + 86_400 + 61)
    assert len(revocations) == 0


LINKS = [link(iat, sub=f"s{name}") for name in range(21) for iat in range(52)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), max_size=30), st.integers(1, 5))
def test_a_full_set_never_refuses_too_little(added: list[tuple[int, int]], room: int) -> None:
    small, large = Revocations(max_entries=room), Revocations()
    for name, at in added:
        small.add("sub", f"s{name}", float(at), "acme")
        large.add("sub", f"s{name}", float(at), "acme")
    assert len(small) <= room
    for each in LINKS:
        if large.is_revoked([each]):
            assert small.is_revoked([each])
    if len(large) <= room:
        assert not small.is_revoked([link(51)])


def test_a_full_set_still_accepts_what_is_new(domain: TrustDomain) -> None:
    revocations = Revocations(max_entries=1)
    revocations.add("sub", "bob", NOW - 10, "acme")
    revocations.add("sub", "carol", NOW - 5, "acme")
    assert domain.verifier(revocations=revocations).verify(domain.case().bearer())
