"""The verifier's cache: it makes things quick and changes no answer."""

from __future__ import annotations

import jwt
import pytest
from capability_forge import ALICE, NOW, WORK, World, refused

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


def test_what_was_verified_says_so(world: World) -> None:
    verified = world.verifier().verify(world.case().bearer())
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


def test_a_second_look_checks_no_signature(world: World, checks: list[int]) -> None:
    verifier, bearer = world.verifier(), world.case().bearer()
    first = verifier.verify(bearer)
    assert len(checks) == 4
    assert verifier.verify(bearer) is first
    assert len(checks) == 4


def test_known_grants_are_not_checked_again(world: World, checks: list[int]) -> None:
    verifier, case = world.verifier(), world.case()
    verifier.verify(case.bearer())
    case.access.claims["jti"] = "a-second"
    verifier.verify(case.bearer())
    assert len(checks) == 5, "the access token alone is new"


def test_a_known_grant_is_judged_anew_in_each_chain(world: World) -> None:
    """Only its signature is remembered: not its place, its time, nor that its root was pinned."""
    verifier, case = world.verifier(), world.case()
    verifier.verify(case.bearer())
    known = case.parts()

    other = world.case()
    other.coder.claims["may"] = {"judge:validate": {}}
    other.shuffle = lambda parts: [parts[0], parts[1], *known[2:]]
    assert refused(verifier, other.bearer()) == "grant_mismatch"

    case.access.claims["jti"] = "a-second"
    fresh = case.bearer()
    root = world.roots.pop(world.root.thumbprint)
    assert refused(verifier, fresh) == "root_unknown"
    world.roots[world.root.thumbprint] = root
    assert verifier.verify(fresh)

    case.access.claims.update(jti="a-third", iat=NOW + 430, nbf=NOW + 430, exp=NOW + 490)
    late = case.bearer()
    world.clock.time = NOW + 429
    assert verifier.verify(late)
    case.access.claims["jti"] = "a-fourth"
    later = case.bearer()
    world.clock.time = NOW + 430
    assert refused(verifier, later) == "expired", "the executor's own grant, within the life of the access token"


def test_a_refused_bearer_leaves_nothing_behind(world: World, checks: list[int]) -> None:
    verifier, case = world.verifier(), world.case()
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
def test_expiry_and_skew(world: World, warm: bool, moved: float, reason: str | None) -> None:
    verifier, bearer = world.verifier(), world.case().bearer()
    if warm:
        verifier.verify(bearer)
    world.clock.time = NOW + moved
    if reason is None:
        assert verifier.verify(bearer)
    else:
        assert refused(verifier, bearer) == reason


@pytest.mark.parametrize("part", ["coder", "judge", "own"])
def test_the_first_link_to_expire_ends_it(world: World, part: str) -> None:
    case = world.case()
    soon = NOW + 10
    for token in (case.access, case.own, case.judge, case.coder):
        assert token is not None
        token.claims["exp"] = min(token.claims["exp"], NOW + 60)
    order = ["coder", "judge", "own"]
    for name in order[order.index(part) :]:
        getattr(case, name).claims["exp"] = soon
    if part != "own":
        case.access.claims["exp"] = soon
    verifier, bearer = world.verifier(), case.bearer()
    assert verifier.verify(bearer).expires == soon
    world.clock.time = soon + 30
    assert refused(verifier, bearer) == "expired"
    assert refused(world.verifier(), bearer) == "expired"


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
def test_revocation_of_any_link(world: World, warm: bool, kind: str, value: str) -> None:
    revocations = Revocations()
    verifier, bearer = world.verifier(revocations=revocations), world.case().bearer()
    if warm:
        verifier.verify(bearer)
    revocations.add("cred", "another", NOW, "acme")
    assert verifier.verify(bearer)
    revocations.add(kind, value, NOW, "acme")  # type: ignore[arg-type]
    assert refused(verifier, bearer) == "revoked"
    assert refused(verifier, bearer) == "revoked"


def test_tokens_made_after_a_revocation_are_accepted(world: World) -> None:
    revocations = Revocations()
    revocations.add("sub", ALICE.sub, NOW - 0.001, ALICE.tenant)
    verifier, bearer = world.verifier(revocations=revocations), world.case().bearer()
    assert verifier.verify(bearer)
    revocations.add("sub", ALICE.sub, NOW, ALICE.tenant)
    assert refused(verifier, bearer) == "revoked"


def test_a_root_that_is_taken_out_counts_no_more(world: World) -> None:
    verifier, bearer = world.verifier(), world.case().bearer()
    assert verifier.verify(bearer)
    new = SigningKey.generate("orchestrator")
    world.roots[new.thumbprint] = new.public
    assert verifier.verify(bearer), "roots rotate with overlap"
    old = world.roots.pop(world.root.thumbprint)
    assert refused(verifier, bearer) == "root_unknown"
    world.roots[world.root.thumbprint] = new.public
    assert refused(verifier, bearer) == "root_unknown", "a root listed under another's name is none"
    world.roots[world.root.thumbprint] = old
    assert verifier.verify(bearer)


def test_a_new_root_mints(world: World) -> None:
    new = SigningKey.generate("orchestrator")
    pair = world.root_pair()
    for token in (pair.access, pair.own):
        assert token is not None
        token.key = new.private
        token.header["kid"] = new.thumbprint
    assert refused(world.verifier(), pair.bearer()) == "root_unknown"
    world.roots[new.thumbprint] = new.public
    assert world.verifier().verify(pair.bearer())


def test_the_cache_is_bounded(world: World, checks: list[int]) -> None:
    verifier = Verifier("executor", world.roots, world.clock, cache_size=2)
    bearers: list[str] = []
    for number in range(3):
        case = world.root_pair()
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


def test_verifiers_share_nothing(world: World) -> None:
    bearer = world.case().bearer()
    assert world.verifier().verify(bearer)
    assert Verifier("executor", {}, world.clock)
    assert refused(Verifier("executor", {}, world.clock), bearer) == "root_unknown"


def test_a_stock_library_reads_our_tokens(world: World) -> None:
    """PyJWT, with nothing of ours, finds the same claims and the same signature."""
    bearer = world.minter.mint_access(Principal("a", "b", "c"), "coder", "coder:execute")
    world_now = int(NOW)
    claims = jwt.decode(
        bearer,
        world.root.private.public_key(),
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
        "kid": world.root.thumbprint,
    }


def test_our_verifier_reads_a_stock_librarys_tokens(world: World) -> None:
    pair = world.root_pair()
    claims = {name: value for name, value in pair.access.claims.items() if name != "gnt"}
    token = jwt.encode(claims, world.root.private, algorithm="EdDSA", headers=pair.access.header)
    assert world.verifier().verify(token)
