"""Every way we know to widen, bend or borrow authority, each beside its honest twin."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from capability_forge import (
    NOW,
    OUTER_CODES,
    Token,
    TrustDomain,
    b64,
    dumps,
    jwk_of,
    refused,
    sha,
    sign,
    thumbprint_of,
    unb64,
)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from token_edits import EDITS, NARROWINGS, SHUFFLES, Edit, root_by_mallory

from octollm.capability import CapabilityError, PublicKey
from octollm.capability.tokens import MAX_BEARER_CHARS


def test_the_honest_chain_is_accepted(domain: TrustDomain) -> None:
    verified = domain.verifier().verify(domain.case().bearer())
    assert str(verified.scopes) == "executor:run"
    assert [link.aud for link in verified.links] == ["executor", "coder", "judge", "executor"]
    assert verified.grant is not None
    assert verified.grant.may.to_dict() == {"files:read": {}}
    assert len(verified.grants) == 3
    assert verified.expires == NOW + 60


def test_the_honest_pair_is_accepted(domain: TrustDomain) -> None:
    verified = domain.verifier().verify(domain.root_pair().bearer())
    assert verified.issuer == "orchestrator"
    assert len(verified.grants) == 1


def test_without_a_grant_of_its_own_it_is_accepted(domain: TrustDomain) -> None:
    case = domain.case()
    case.own = None
    del case.access.claims["gnt"]
    verified = domain.verifier().verify(case.bearer())
    assert verified.grant is None
    assert verified.grants == ()


@pytest.mark.parametrize(("edit", "reason"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS])
def test_edits_are_refused(domain: TrustDomain, edit: Edit, reason: str) -> None:
    case = domain.case()
    edit(domain, case)
    verifier = domain.verifier()
    assert refused(verifier, case.bearer()) == reason
    assert refused(verifier, case.bearer()) == reason, "a refusal must not depend on what was seen before"
    verifier.verify(domain.case().bearer())
    assert refused(verifier, case.bearer()) == reason, "nor on what was accepted in between"


@pytest.mark.parametrize("edit", [row[1] for row in NARROWINGS], ids=[row[0] for row in NARROWINGS])
def test_narrowings_are_accepted(domain: TrustDomain, edit: Edit) -> None:
    case = domain.case()
    edit(domain, case)
    assert domain.verifier().verify(case.bearer()).subject == "alice"


@pytest.mark.parametrize(("shuffle", "reasons"), [row[1:] for row in SHUFFLES], ids=[row[0] for row in SHUFFLES])
def test_links_order_and_length_are_fixed(
    domain: TrustDomain, shuffle: Callable[[list[str]], list[str]], reasons: set[str]
) -> None:
    case = domain.case()
    verifier = domain.verifier()
    verifier.verify(case.bearer())
    case.shuffle = shuffle
    assert refused(verifier, case.bearer()) in reasons


def test_an_unused_grant_beside_a_root_pair_is_refused(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    access, own = pair.bearer().split("~")
    other = domain.case().parts()[1]
    assert refused(domain.verifier(), f"{access}~{other}~{own}") == "part_unused"
    assert refused(domain.verifier(), f"{access}~{own}~{other}") == "grant_mismatch"


def test_a_root_pair_does_not_take_another_grant(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    access, own = pair.bearer().split("~")
    wider = domain.root_pair()
    assert wider.own is not None
    wider.own.claims["may"] = {"files:*": {}}
    _, wider_own = wider.bearer().split("~")
    assert domain.verifier().verify(f"{access}~{own}")
    assert refused(domain.verifier(), f"{access}~{wider_own}") == "grant_mismatch"
    assert refused(domain.verifier(), access) == "grant_mismatch"


def test_a_root_access_token_may_carry_several_scopes_of_its_service_only(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    pair.access.claims["scope"] = "executor:run executor:http"
    assert domain.verifier().verify(pair.bearer())
    pair = domain.root_pair()
    pair.access.claims["scope"] = "executor:run models:chat"
    assert refused(domain.verifier(), pair.bearer()) == "scope_foreign"


def test_a_root_token_lives_a_day_at_most(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    pair.access.claims["exp"] = NOW + 86_400
    assert domain.verifier().verify(pair.bearer())
    pair = domain.root_pair()
    pair.access.claims["exp"] = NOW + 86_401
    assert refused(domain.verifier(), pair.bearer()) == "lives_too_long"


# Splicing two honest chains.


def test_parts_of_two_chains_do_not_mix(domain: TrustDomain) -> None:
    first, second = domain.case(), domain.case()
    for token in (second.access, second.coder, second.judge, second.own):
        assert token is not None
        token.claims["task"] = "task-" + "f" * 32
    left, right = first.parts(), second.parts()
    verifier = domain.verifier()
    assert verifier.verify("~".join(left))
    assert verifier.verify("~".join(right))
    for mask in range(1, 15):
        mixed = [right[n] if mask >> n & 1 else left[n] for n in range(4)]
        assert refused(verifier, "~".join(mixed)) in {"grant_mismatch", "proof_mismatch"}


# What a callee can do with what it was sent.


def test_a_callee_cannot_send_it_on(domain: TrustDomain) -> None:
    bearer = domain.case().bearer()
    for name in ("coder", "judge", "models", "orchestrator"):
        assert refused(domain.verifier(name), bearer) == "audience_wrong"


def test_a_callee_cannot_use_its_callers_grants(domain: TrustDomain) -> None:
    """The executor holds every grant of the chain, and may only mint under its own."""
    _, coder, judge, own = domain.case().parts()
    key = domain.keys["executor"].private
    targets = {
        "coder": (coder, "models", "models:chat", [coder]),
        "judge": (judge, "executor", "executor:run", [coder, judge]),
    }
    for issuer, (parent, aud, scope, proofs) in targets.items():
        claims = {**domain.claims(issuer, aud, 60, "stolen"), "scope": scope, "prf": sha(parent)}
        forged = sign({"alg": "EdDSA", "typ": "cap+jwt", "jwk": jwk_of(key)}, claims, key)
        assert refused(domain.verifier(aud), "~".join([forged, *proofs])) == "key_mismatch"
    claims = {
        **domain.claims("executor", "orchestrator", 60, "honest"),
        "scope": "files:read:0a",
        "prf": sha(own),
    }
    honest = sign({"alg": "EdDSA", "typ": "cap+jwt", "jwk": jwk_of(key)}, claims, key)
    assert domain.verifier("orchestrator").verify("~".join([honest, coder, judge, own]))


def test_a_callee_cannot_skip_its_own_grant(domain: TrustDomain) -> None:
    """Under its own grant it gets no more than stands in it, whatever its callers had."""
    _, coder, judge, own = domain.case().parts()
    key = domain.keys["executor"].private
    for aud, scope in (("models", "models:chat"), ("orchestrator", "files:write"), ("executor", "executor:run")):
        claims = {**domain.claims("executor", aud, 60, "forged"), "scope": scope, "prf": sha(own)}
        forged = sign({"alg": "EdDSA", "typ": "cap+jwt", "jwk": jwk_of(key)}, claims, key)
        assert refused(domain.verifier(aud), "~".join([forged, coder, judge, own])) == "scope_exceeds_parent"


def test_a_grant_without_its_key_is_worth_nothing(domain: TrustDomain) -> None:
    thief = Ed25519PrivateKey.generate()
    _, coder, judge, own = domain.case().parts()
    claims = {
        **domain.claims("executor", "orchestrator", 60, "forged"),
        "scope": "files:read",
        "prf": sha(own),
    }
    stolen = [coder, judge, own]
    for jwk in (jwk_of(thief), jwk_of(domain.keys["executor"].private)):
        forged = sign({"alg": "EdDSA", "typ": "cap+jwt", "jwk": jwk}, claims, thief)
        reason = refused(domain.verifier("orchestrator"), "~".join([forged, *stolen]))
        assert reason in {"key_mismatch", "signature_invalid"}


def test_a_grant_is_no_access_token(domain: TrustDomain) -> None:
    _, coder, judge, own = domain.case().parts()
    for parts in ([own], [coder, coder], [judge, coder], [own, coder, judge]):
        assert refused(domain.verifier(), "~".join(parts)) == "type_wrong"


# Forms.


def test_a_signature_by_the_public_key_as_a_secret_is_refused(domain: TrustDomain) -> None:
    """The classic confusion: HMAC with the bytes of the public key."""
    raw = domain.root.public.to_jwk()["x"]
    pem = domain.root.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for alg in ("HS256", "EdDSA"):
        for secret in (unb64(raw), raw.encode(), pem):

            def by_hmac(token: Token, alg: str = alg, secret: bytes = secret) -> str:
                text = f"{b64(dumps({**token.header, 'alg': alg}))}.{b64(dumps(token.claims))}"
                return f"{text}.{b64(hmac.new(secret, text.encode(), hashlib.sha512).digest())}"

            pair = domain.root_pair()
            pair.access.raw = by_hmac
            assert refused(domain.verifier(), pair.bearer()) in {"algorithm_refused", "signature_invalid"}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (lambda c: dumps(c)[:-1] + b',"aud":"executor"}', "json_malformed"),
        (lambda c: dumps(c)[:-1] + b',"\\u0061ud":"executor"}', "json_malformed"),
        (lambda c: b'{"sub":"bob",' + dumps(c)[1:], "json_malformed"),
        (lambda c: dumps(c)[:-1] + b',"x":{"a":1,"a":2}}', "json_malformed"),
        (lambda c: dumps(c)[:-1] + b',"x":NaN}', "json_malformed"),
        (lambda c: dumps(c)[:-1] + b',"x":Infinity}', "json_malformed"),
        (lambda c: dumps(c) + b"{}", "json_malformed"),
        (lambda c: dumps(c)[:-1], "json_malformed"),
        (lambda c: dumps(c).replace(b"alice", b"al\xffce"), "json_malformed"),
        (lambda c: b"\xef\xbb\xbf" + dumps(c), "json_malformed"),
        (lambda c: json.dumps(c).encode("utf-16"), "json_malformed"),
        (lambda c: b"[" * 600 + b"]" * 600, "json_malformed"),
        (lambda c: b'{"exp":' + b"9" * 5_000 + b"}", "json_malformed"),
        (lambda c: b"", "json_malformed"),
        (lambda c: b"[]", "claims_malformed"),
        (lambda c: b'"text"', "claims_malformed"),
        (lambda c: b"null", "claims_malformed"),
        (lambda c: b"1", "claims_malformed"),
    ],
)
def test_payloads_are_plain_unambiguous_json(
    domain: TrustDomain, payload: Callable[[dict[str, Any]], bytes], reason: str
) -> None:
    pair = domain.root_pair()
    pair.access.raw = lambda token: sign(token.header, payload(token.claims), token.key)
    assert refused(domain.verifier(), pair.bearer()) == reason


def test_white_space_and_order_in_json_are_free(domain: TrustDomain) -> None:
    """Another implementation may write the same claims otherwise."""
    pair = domain.root_pair()
    pair.access.raw = lambda token: sign(
        json.dumps(dict(reversed(token.header.items()))).encode(),
        json.dumps(dict(reversed(token.claims.items())), indent=1).encode(),
        token.key,
    )
    assert domain.verifier().verify(pair.bearer())


@pytest.mark.parametrize(
    "header",
    [
        lambda h: dumps(h)[:-1] + b',"alg":"EdDSA"}',
        lambda h: b'{"alg":"none",' + dumps(h)[1:],
        lambda h: dumps(h)[:-1] + b',"typ":"JWT"}',
    ],
)
def test_headers_have_no_member_twice(domain: TrustDomain, header: Callable[[dict[str, Any]], bytes]) -> None:
    pair = domain.root_pair()
    pair.access.raw = lambda token: sign(header(token.header), token.claims, token.key)
    assert refused(domain.verifier(), pair.bearer()) == "json_malformed"


def test_a_long_header_is_refused(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    pair.access.raw = lambda token: sign(dumps(token.header) + b" " * 400, token.claims, token.key)
    assert refused(domain.verifier(), pair.bearer()) == "bearer_malformed"


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def test_base64_has_one_form(domain: TrustDomain) -> None:
    bearer = domain.root_pair().bearer()
    access, own = bearer.split("~")
    head, body, signature = access.split(".")
    loose = signature[:-1] + _ALPHABET[_ALPHABET.index(signature[-1]) + 1]
    assert unb64(loose) == unb64(signature), "the same bytes, with bits left over"
    standard = base64.b64encode(unb64(signature)).decode().rstrip("=")
    variants = [
        f"{head}.{body}.{loose}",
        f"{head}.{body}.{signature}==",
        f"{head}.{body}.{signature}\n",
        f"{head}.{body}. {signature}",
        f"{head}=.{body}.{signature}",
        f"{head}\n.{body}.{signature}",
        f"{head}.{body[:9]}!{body[9:]}.{signature}",
        f"{head}.{body}A.{signature}" if len(body) % 4 == 0 else f"{head}.{body}=.{signature}",
    ]
    if standard != signature:
        variants.append(f"{head}.{body}.{standard}")
    verifier = domain.verifier()
    for variant in variants:
        reason = refused(verifier, f"{variant}~{own}")
        assert reason in {"base64_malformed", "signature_invalid", "json_malformed"}
    assert verifier.verify(bearer)


@pytest.mark.parametrize(
    "text", ["a", "a.b", "a.b.c.d", ".", "..", "...", "~", "~~", "Bearer a.b.c", "a b", "é", "\ud800"]
)
def test_what_is_no_token_is_refused(domain: TrustDomain, text: str) -> None:
    assert refused(domain.verifier(), text) in {
        "bearer_malformed",
        "base64_malformed",
        "json_malformed",
    }


@pytest.mark.parametrize("text", [None, ""])
def test_nothing_is_refused(domain: TrustDomain, text: str | None) -> None:
    assert refused(domain.verifier(), text) == "bearer_missing"


def test_signatures_have_their_length(domain: TrustDomain) -> None:
    pair = domain.root_pair()
    access, own = pair.bearer().split("~")
    head, body, signature = access.split(".")
    for text in ("", b64(unb64(signature)[:-1]), b64(unb64(signature) + b"\0"), b64(bytes(64))):
        assert refused(domain.verifier(), f"{head}.{body}.{text}~{own}") in {
            "signature_invalid",
            "base64_malformed",
        }


def test_what_is_too_large_is_refused_before_any_cryptography(
    domain: TrustDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    honest = PublicKey.verify

    def counting(self: PublicKey, signature: bytes, message: bytes) -> bool:
        checks.append(len(message))
        return honest(self, signature, message)

    monkeypatch.setattr(PublicKey, "verify", counting)
    case = domain.case()
    bearer = case.bearer()
    assert refused(domain.verifier(), bearer + "A" * (MAX_BEARER_CHARS + 1 - len(bearer))) == "bearer_too_large"
    assert refused(domain.verifier(), "~".join([bearer] * 3)) == "too_many_parts"
    assert refused(domain.verifier(), "~".join(case.parts()[:3])) == "grant_mismatch"
    assert checks == []
    forged = domain.case()
    root_by_mallory(domain, forged)
    assert refused(domain.verifier(), forged.bearer()) == "signature_invalid"
    assert len(checks) == 1, "whoever has no root's signature costs one check"
    assert domain.verifier().verify(bearer)
    assert len(checks) == 5


def test_no_other_character_anywhere(domain: TrustDomain) -> None:
    """Every one-character change of an honest bearer string is refused."""
    bearer = domain.root_pair().bearer()
    verifier = domain.verifier()
    for position, old in enumerate(bearer):
        if old in "~.":
            continue
        new = _ALPHABET[(_ALPHABET.index(old) + 1) % 64]
        with pytest.raises(CapabilityError) as caught:
            verifier.verify(bearer[:position] + new + bearer[position + 1 :])
        assert caught.value.code in OUTER_CODES
    assert verifier.verify(bearer)


ANY_DOMAIN = TrustDomain()


@settings(max_examples=200)
@given(st.text(max_size=60) | st.lists(st.text(alphabet="eyJ0.~A-_= ", max_size=20), max_size=10).map("~".join))
def test_any_text_gets_a_refusal_and_nothing_else(text: str) -> None:
    assert refused(ANY_DOMAIN.verifier(), text)


def test_details_tell_a_prober_nothing(domain: TrustDomain) -> None:
    details: dict[str, set[str]] = {}
    for _, edit, _ in EDITS:
        case = domain.case()
        edit(domain, case)
        with pytest.raises(CapabilityError) as caught:
            domain.verifier().verify(case.bearer())
        details.setdefault(caught.value.code, set()).add(caught.value.detail)
    assert all(len(texts) == 1 for texts in details.values())


def test_the_bench_agrees_on_thumbprints(domain: TrustDomain) -> None:
    assert thumbprint_of(domain.root.private) == domain.root.thumbprint
