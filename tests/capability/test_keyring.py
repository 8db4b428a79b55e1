"""Keys that change: which one signs, which are believed, and that no honest token is lost on the way."""

from __future__ import annotations

import pytest
from capability_forge import ALICE, NOW, TrustDomain, refused
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import CapabilityError, Delegator, RootMinter, SigningKey, Verifier, parse_delegation_tree
from octollm.capability.enrolment import EnrolmentTerms, EnrolmentTokenIssuer
from octollm.capability.keyring import (
    MAX_KEYS,
    OVERLAP_SECONDS,
    TRUST_SECONDS,
    DatedKey,
    KeyRing,
    PublicKeyRing,
    TrustedRoots,
    signing_index,
    trusted_indices,
)

OLD, NEW = SigningKey.generate("root"), SigningKey.generate("root")
RING = KeyRing([DatedKey(OLD), DatedKey(NEW, NOW)])


def test_a_new_key_signs_after_the_overlap_and_the_old_is_believed_until_its_tokens_are_over() -> None:
    assert RING.signing_key(NOW) is OLD
    assert RING.signing_key(NOW + OVERLAP_SECONDS - 1) is OLD
    assert RING.signing_key(NOW + OVERLAP_SECONDS) is NEW
    assert list(RING.trusted_keys(NOW)) == [OLD.thumbprint, NEW.thumbprint], "the one to come is believed already"
    late = NOW + OVERLAP_SECONDS + TRUST_SECONDS
    assert list(RING.trusted_keys(late - 1)) == [NEW.thumbprint, OLD.thumbprint]
    assert list(RING.trusted_keys(late)) == [NEW.thumbprint]
    assert RING.find(OLD.thumbprint) is OLD
    assert RING.find("other") is None
    assert list(RING.public.trusted_keys(NOW)) == list(RING.trusted_keys(NOW))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(sorted), st.floats(0, 2e6))
def test_who_signs_is_believed_by_whoever_knows_the_ring_and_for_as_long_as_its_tokens_live(
    made: list[float], now: float
) -> None:
    signer = signing_index(made, now)
    assert signer in trusted_indices(made, now)
    # Whoever read the ring when a key was made believes it before and after it signs.
    for later in (now + 1, now + TRUST_SECONDS - 1):
        assert signer in trusted_indices(made, later) or any(
            at + OVERLAP_SECONDS + TRUST_SECONDS <= later for at in made[signer + 1 : signer + 2]
        )
    assert len(made) - 1 in trusted_indices(made, now)


def test_a_token_of_the_last_moment_is_good_for_its_whole_life(domain: TrustDomain) -> None:
    change = NOW + OVERLAP_SECONDS
    domain.clock.time = change - 1
    bearer = RootMinter(RING, domain.clock, domain.ids).mint_access(ALICE, "coder", "coder:execute", 86_400)
    for at in (change - 1, change, change + 43_000, change + 86_398):
        domain.clock.time = at
        assert Verifier("coder", RING.trusted_keys(at), domain.clock).verify(bearer)
        fresh = RootMinter(RING, domain.clock, domain.ids).mint_access(ALICE, "coder", "coder:execute")
        assert Verifier("coder", RING.trusted_keys(at), domain.clock).verify(fresh)


def test_a_key_that_was_replaced_at_once_is_believed_no_more(domain: TrustDomain) -> None:
    ring = KeyRing([DatedKey(NEW, NOW - OVERLAP_SECONDS - TRUST_SECONDS)])
    assert ring.signing_key(NOW) is NEW
    roots = TrustedRoots({OLD.thumbprint: OLD.public})
    verifier = Verifier("coder", roots, domain.clock)
    bearer = RootMinter(OLD, domain.clock, domain.ids).mint_access(ALICE, "coder", "coder:execute")
    assert verifier.verify(bearer)
    assert roots.replace(ring.trusted_keys(NOW))
    assert refused(verifier, bearer) == "root_unknown", "the verdict that was kept counts no more"


def test_what_was_lent_to_an_old_key_may_still_be_used(domain: TrustDomain) -> None:
    fresh = SigningKey.generate("coder")
    ring = KeyRing([DatedKey(domain.keys["coder"]), DatedKey(fresh, NOW - OVERLAP_SECONDS)])
    assert ring.signing_key(NOW) is fresh
    for holder in (domain.keys["coder"], fresh):
        bearer = domain.minter.mint_access(
            ALICE,
            "coder",
            "coder:execute",
            delegation=parse_delegation_tree({"judge:validate": {}}),
            holder_jkt=holder.thumbprint,
        )
        verified = domain.verifier("coder").verify(bearer)
        onward = Delegator(ring, "coder", domain.clock, domain.ids).delegate(verified, "judge", "judge:validate", None)
        assert domain.verifier("judge").verify(onward)


def test_a_join_secret_of_the_old_root_is_good_while_that_is_believed() -> None:
    terms = EnrolmentTerms("a" * 32, "translator", (), 1_900_000_000)
    before, root = EnrolmentTokenIssuer(OLD).derive_keys(terms, NOW)[0], EnrolmentTokenIssuer(RING)
    nonce = EnrolmentTokenIssuer(OLD).create_nonce("b" * 32, NOW + OVERLAP_SECONDS)
    assert before in root.derive_keys(terms, NOW + OVERLAP_SECONDS)
    assert root.is_valid_nonce(nonce, NOW + OVERLAP_SECONDS)
    late = NOW + OVERLAP_SECONDS + TRUST_SECONDS
    assert before not in root.derive_keys(terms, late)


def test_roots_tell_of_a_change_and_never_believe_nobody() -> None:
    told: list[set[str]] = []
    roots = TrustedRoots({OLD.thumbprint: OLD.public}, lambda now: told.append(set(now)))
    assert not roots.replace({})
    assert not roots.replace({OLD.thumbprint: OLD.public})
    assert told == []
    assert roots.replace(RING.trusted_keys(NOW))
    assert told == [{OLD.thumbprint, NEW.thumbprint}]
    assert dict(roots) == RING.trusted_keys(NOW)
    assert roots[NEW.thumbprint] == NEW.public
    assert len(roots) == 2


@pytest.mark.parametrize("count", [0, MAX_KEYS + 1])
def test_a_ring_has_a_bounded_number_of_keys(count: int) -> None:
    keys = [DatedKey(OLD, float(number)) for number in range(count)]
    with pytest.raises(CapabilityError):
        KeyRing(keys)
    with pytest.raises(CapabilityError):
        PublicKeyRing([(each.key.public, each.created_at) for each in keys])
