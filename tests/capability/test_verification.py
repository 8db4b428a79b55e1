"""The verifier's cache: it makes things quick and changes no answer."""

from __future__ import annotations

import jwt
import pytest
from capability_forge import ALICE, NOW, WORK, TrustDomain, refused

from octollm.capability import CapabilityError, Principal, PublicKey, Revocations, SigningKey, Verifier


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the signatures that are checked."""
    seen: list[int] = []
    honest = PublicKey.verify

    def counting(self: PublicKey, signature: bytes, message: bytes) -> bool:
        seen.append(1)
        return honest(self, signature, message)

    monkeypatch.setattr(PublicKey, "verify", counting)
    return seen


def test_what_was_verified_says_so(domain: TrustDomain) -> None:
    verified = domain.verifier().verify(domain.case().bearer())
    assert verified.principal == ALICE
    assert verified.task == WORK
    assert verified.issuer == "judge"
    assert verified.call is None
    verified.require("executor:run")
    verified.require("executor:run:x")
    with pytest.raises(CapabilityError) as caught:
        verified.require("executor:http")
    assert caught.value.code == "scope_missing"
    assert "executor:http" in caught.value.detail


def test_a_second_look_checks_no_signature(domain: TrustDomain, checks: list[int]) -> None:
    verifier, bearer = domain.verifier(), domain.case().bearer()
    first = verifier.verify(bearer)
    assert len(checks) == 4
    assert verifier.verify(bearer) is first
    assert len(checks) == 4


def test_known_grants_are_not_checked_again(domain: TrustDomain, checks: list[int]) -> None:
    verifier, case = domain.verifier(), domain.case()
    verifier.verify(case.bearer())
    case.access.claims["jti"] = "a-second"
    verifier.verify(case.bearer())
    assert len(checks) == 5, "the access token alone is new"


def test_a_known_grant_is_judged_anew_in_each_chain(domain: TrustDomain) -> None:
    """Only its signature is remembered: not its place, its time, nor that its root was pinned."""
    verifier, case = domain.verifier(), domain.case()
    verifier.verify(case.bearer())
    known = case.parts()

    other = domain.case()
    other.coder.claims["may"] = {"judge:validate": {}}
    other.shuffle = lambda parts: [parts[0], parts[1], *known[2:]]
    assert refused(verifier, other.bearer()) == "grant_mismatch"

    case.access.claims["jti"] = "a-second"
    fresh = case.bearer()
    root = domain.roots.pop(domain.root.thumbprint)
    assert refused(verifier, fresh) == "root_unknown"
    domain.roots[domain.root.thumbprint] = root
    assert verifier.verify(fresh)

    case.access.claims.update(jti="a-third", iat=NOW + 430, nbf=NOW + 430, exp=NOW + 490)
    late = case.bearer()
    domain.clock.time = NOW + 429
    assert verifier.verify(late)
    case.access.claims["jti"] = "a-fourth"
    later = case.bearer()
    domain.clock.time = NOW + 430
    assert refused(verifier, later) == "expired", "the executor's own grant, within the life of the access token"


def test_a_refused_bearer_leaves_nothing_behind(domain: TrustDomain, checks: list[int]) -> None:
    verifier, case = domain.verifier(), domain.case()
    case.access.claims["scope"] = "executor:http"
    assert refused(verifier, case.bearer()) == "scope_exceeds_parent"
    assert len(checks) == 4
    assert refused(verifier, case.bearer()) == "scope_exceeds_parent"
    assert len(checks) == 8


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("moved", "reason"),
    [(89.999, None), (90.0, "expired"), (-30.0, None), (-30.001, "not_yet_valid")],
)
def test_expiry_and_skew(domain: TrustDomain, warm: bool, moved: float, reason: str | None) -> None:
    verifier, bearer = domain.verifier(), domain.case().bearer()
    if warm:
        verifier.verify(bearer)
    domain.clock.time = NOW + moved
    if reason is None:
        assert verifier.verify(bearer)
    else:
        assert refused(verifier, bearer) == reason


@pytest.mark.parametrize("part", ["coder", "judge", "own"])
def test_the_first_link_to_expire_ends_it(domain: TrustDomain, part: str) -> None:
    case = domain.case()
    soon = NOW + 10
    for token in (case.access, case.own, case.judge, case.coder):
        assert token is not None
        token.claims["exp"] = min(token.claims["exp"], NOW + 60)
    order = ["coder", "judge", "own"]
    for name in order[order.index(part) :]:
        getattr(case, name).claims["exp"] = soon
    if part != "own":
        case.access.claims["exp"] = soon
    verifier, bearer = domain.verifier(), case.bearer()
    assert verifier.verify(bearer).expires == soon
    domain.clock.time = soon + 30
    assert refused(verifier, bearer) == "expired"
    assert refused(domain.verifier(), bearer) == "expired"


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("jti", "a-executor"),
        ("jti", "g-coder"),
        ("jti", "g-judge"),
        ("jti", "g-executor"),
        ("task", WORK.task),
        ("sub", ALICE.sub),
        ("cred", ALICE.cred),
    ],
)
def test_revocation_of_any_link(domain: TrustDomain, warm: bool, kind: str, value: str) -> None:
    revocations = Revocations()
    verifier, bearer = domain.verifier(revocations=revocations), domain.case().bearer()
    if warm:
        verifier.verify(bearer)
    revocations.add("cred", "another", NOW, "acme")
    assert verifier.verify(bearer)
    revocations.add(kind, value, NOW, "acme")  # type: ignore[arg-type]
    assert refused(verifier, bearer) == "revoked"
    assert refused(verifier, bearer) == "revoked"


def test_tokens_made_after_a_revocation_are_accepted(domain: TrustDomain) -> None:
    revocations = Revocations()
    revocations.add("sub", ALICE.sub, NOW - 0.001, ALICE.tenant)
    verifier, bearer = domain.verifier(revocations=revocations), domain.case().bearer()
    assert verifier.verify(bearer)
    revocations.add("sub", ALICE.sub, NOW, ALICE.tenant)
    assert refused(verifier, bearer) == "revoked"


def test_a_root_that_is_taken_out_counts_no_more(domain: TrustDomain) -> None:
    verifier, bearer = domain.verifier(), domain.case().bearer()
    assert verifier.verify(bearer)
    new = SigningKey.generate("orchestrator")
    domain.roots[new.thumbprint] = new.public
    assert verifier.verify(bearer), "roots rotate with overlap"
    old = domain.roots.pop(domain.root.thumbprint)
    assert refused(verifier, bearer) == "root_unknown"
    domain.roots[domain.root.thumbprint] = new.public
    assert refused(verifier, bearer) == "root_unknown", "a root listed under another's name is none"
    domain.roots[domain.root.thumbprint] = old
    assert verifier.verify(bearer)


def test_a_new_root_mints(domain: TrustDomain) -> None:
    new = SigningKey.generate("orchestrator")
    pair = domain.root_pair()
    for token in (pair.access, pair.own):
        assert token is not None
        token.key = new.private
        token.header["kid"] = new.thumbprint
    assert refused(domain.verifier(), pair.bearer()) == "root_unknown"
    domain.roots[new.thumbprint] = new.public
    assert domain.verifier().verify(pair.bearer())


def test_the_cache_is_bounded(domain: TrustDomain, checks: list[int]) -> None:
    verifier = Verifier("executor", domain.roots, domain.clock, cache_size=2)
    bearers: list[str] = []
    for number in range(3):
        case = domain.root_pair()
        case.own = None
        case.shuffle = lambda parts: parts[:1]
        del case.access.claims["gnt"]
        case.access.claims["jti"] = f"a-{number}"
        bearers.append(case.bearer())
    for number in (0, 1, 0, 2):
        verifier.verify(bearers[number])
    assert len(checks) == 3
    verifier.verify(bearers[0])
    verifier.verify(bearers[2])
    assert len(checks) == 3
    verifier.verify(bearers[1])
    assert len(checks) == 4, "the one that was not used for longest was let go"


def test_verifiers_share_nothing(domain: TrustDomain) -> None:
    bearer = domain.case().bearer()
    assert domain.verifier().verify(bearer)
    assert Verifier("executor", {}, domain.clock)
    assert refused(Verifier("executor", {}, domain.clock), bearer) == "root_unknown"


def test_a_stock_library_reads_our_tokens(domain: TrustDomain) -> None:
    """PyJWT, with nothing of ours, finds the same claims and the same signature."""
    bearer = domain.minter.mint_access(Principal("a", "b", "c"), "coder", "coder:execute")
    world_now = int(NOW)
    claims = jwt.decode(
        bearer,
        domain.root.private.public_key(),
        algorithms=["EdDSA"],
        audience="coder",
        issuer="orchestrator",
        options={"verify_exp": False, "verify_nbf": False, "verify_iat": False},
    )
    assert claims["scope"] == "coder:execute"
    assert claims["exp"] == world_now + 60
    assert jwt.get_unverified_header(bearer) == {
        "alg": "EdDSA",
        "typ": "cap+jwt",
        "kid": domain.root.thumbprint,
    }


def test_our_verifier_reads_a_stock_librarys_tokens(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    claims = {name: value for name, value in pair.access.claims.items() if name != "gnt"}
    token = jwt.encode(claims, domain.root.private, algorithm="EdDSA", headers=pair.access.header)
    assert domain.verifier().verify(token)
