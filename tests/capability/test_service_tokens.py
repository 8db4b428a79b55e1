"""Services that speak for themselves, and the directory that says which keys are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from capability_forge import ALICE, NOW, OUTER_CODES, TrustDomain, jwk_of, refused, sign

from octollm.capability import (
    BUILT_IN_CALLS,
    CapabilityError,
    DeclaredCall,
    Directory,
    DirectoryEntry,
    PublicKey,
    ServiceTokenSigner,
    SigningKey,
    verify_directory,
    verify_service_token,
)
from octollm.capability.keyring import OVERLAP_SECONDS, DatedKey, KeyRing
from octollm.capability.service_tokens import ServiceTokenVerifier


@pytest.fixture
def directory(domain: TrustDomain) -> Directory:
    return {name: DirectoryEntry((domain.jkt(name),)) for name in ("models", "judge")}


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(CapabilityError) as caught:
        call()
    assert caught.value.code in OUTER_CODES
    return caught.value.reason


def signer(domain: TrustDomain, name: str) -> ServiceTokenSigner:
    return ServiceTokenSigner(domain.keys[name], name, domain.clock, domain.ids)


def test_a_service_is_known_by_its_key(domain: TrustDomain, directory: Directory) -> None:
    token = signer(domain, "models").sign_token("orchestrator")
    assert verify_service_token(token, "orchestrator", directory, domain.clock) == "models"
    both: Directory = {"models": DirectoryEntry((domain.jkt("judge"), domain.jkt("models")))}
    assert verify_service_token(token, "orchestrator", both, domain.clock) == "models"


def test_only_its_own_name_and_only_while_listed(domain: TrustDomain, directory: Directory) -> None:
    token = signer(domain, "models").sign_token("orchestrator")
    check = verify_service_token
    assert reason_of(lambda: check(token, "monitor", directory, domain.clock)) == "audience_wrong"
    assert reason_of(lambda: check(token, "orchestrator", {}, domain.clock)) == "service_unknown"
    gone: Directory = {"models": DirectoryEntry(())}
    assert reason_of(lambda: check(token, "orchestrator", gone, domain.clock)) == "key_mismatch"
    posing = ServiceTokenSigner(domain.keys["judge"], "models", domain.clock, domain.ids).sign_token("orchestrator")
    assert reason_of(lambda: check(posing, "orchestrator", directory, domain.clock)) == "key_mismatch"


@pytest.mark.parametrize(
    ("header", "claims", "reason"),
    [
        ({"alg": "none"}, {}, "algorithm_refused"),
        ({"typ": "cap+jwt"}, {}, "type_wrong"),
        ({"jwk": None}, {}, "json_malformed"),
        ({"kid": "A" * 43}, {}, "key_mismatch"),
        ({}, {"sub": "judge"}, "issuer_wrong"),
        ({}, {"iss": "judge"}, "issuer_wrong"),
        ({}, {"iss": "judge", "sub": "judge"}, "key_mismatch"),
        ({}, {"scope": "tasks:*"}, "claims_malformed"),
        ({}, {"exp": NOW + 61}, "lives_too_long"),
        ({}, {"exp": NOW - 30, "iat": NOW - 60}, "expired"),
        ({}, {"exp": NOW + 91, "iat": NOW + 31}, "not_yet_valid"),
    ],
)
def test_service_token_attacks(
    domain: TrustDomain, directory: Directory, header: dict[str, Any], claims: dict[str, Any], reason: str
) -> None:
    key = domain.keys["models"].private
    honest_header = {"alg": "EdDSA", "typ": "svc+jwt", "kid": domain.jkt("models"), "jwk": jwk_of(key)}
    honest = {"iss": "models", "sub": "models", "aud": "orchestrator", "exp": NOW + 60, "iat": NOW, "jti": "1"}
    assert verify_service_token(sign(honest_header, honest, key), "orchestrator", directory, domain.clock)
    token = sign({**honest_header, **header}, {**honest, **claims}, key)
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, domain.clock)) == reason
    forged = sign(honest_header, honest, domain.keys["mallory"].private)
    verdict = reason_of(lambda: verify_service_token(forged, "orchestrator", directory, domain.clock))
    assert verdict == "signature_invalid"


def test_a_service_token_without_its_key_is_refused(domain: TrustDomain, directory: Directory) -> None:
    claims = {"iss": "models", "sub": "models", "aud": "orchestrator", "exp": NOW + 60, "iat": NOW, "jti": "1"}
    header = {"alg": "EdDSA", "typ": "svc+jwt", "kid": domain.jkt("models")}
    token = sign(header, claims, domain.keys["models"].private)
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, domain.clock)) == "key_missing"


@pytest.mark.parametrize(
    ("token", "reason"),
    [(None, "bearer_missing"), ("", "bearer_missing"), ("x" * 5000, "bearer_too_large"), ("é.a.b", "base64_malformed")],
)
def test_no_service_token(domain: TrustDomain, directory: Directory, token: str | None, reason: str) -> None:
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, domain.clock)) == reason


def test_a_service_token_is_no_capability_and_the_other_way_round(domain: TrustDomain, directory: Directory) -> None:
    service = signer(domain, "models").sign_token("orchestrator")
    assert refused(domain.verifier("orchestrator"), service) == "type_wrong"
    capability = domain.minter.mint_access(ALICE, "orchestrator", "tasks:create")
    check = lambda: verify_service_token(capability, "orchestrator", directory, domain.clock)  # noqa: E731
    assert reason_of(check) == "type_wrong"


def test_a_service_token_lives_a_minute_at_most(domain: TrustDomain, directory: Directory) -> None:
    with pytest.raises(CapabilityError):
        signer(domain, "models").sign_token("orchestrator", 61)
    token = signer(domain, "models").sign_token("orchestrator")
    domain.clock.time = NOW + 89.9
    assert verify_service_token(token, "orchestrator", directory, domain.clock)
    domain.clock.time = NOW + 90
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, domain.clock)) == "expired"


def entries(domain: TrustDomain) -> dict[str, DirectoryEntry]:
    calls = {name: made for name, made in BUILT_IN_CALLS.items() if name.startswith("coder:")}
    return {"coder": DirectoryEntry((domain.jkt("coder"),), calls), "models": DirectoryEntry((domain.jkt("models"),))}


def test_a_service_token_is_reused_for_one_audience_with_half_of_its_life_left(
    domain: TrustDomain, directory: Directory
) -> None:
    models = signer(domain, "models")
    first = models.sign_token("orchestrator")
    assert models.sign_token("monitor") != first
    domain.clock.time = NOW + 30
    assert models.sign_token("orchestrator") == first
    domain.clock.time = NOW + 30.001
    second = models.sign_token("orchestrator")
    assert second != first
    assert models.sign_token("orchestrator", 10) != second, "it would live longer than asked for"
    domain.clock.time = NOW + 29
    assert models.sign_token("orchestrator") != second, "a clock that was set back"
    domain.clock.time = NOW + 85
    assert verify_service_token(second, "orchestrator", directory, domain.clock) == "models"


def test_a_new_key_signs_at_once(domain: TrustDomain) -> None:
    old, new = (DatedKey(domain.keys["models"]), DatedKey(domain.keys["judge"], NOW - OVERLAP_SECONDS + 10))
    models = ServiceTokenSigner(KeyRing([old, new]), "models", domain.clock, domain.ids)
    first = models.sign_token("orchestrator")
    domain.clock.time = NOW + 10
    assert models.sign_token("orchestrator") != first


def test_a_known_service_token_is_verified_by_time_and_directory_each_time(
    domain: TrustDomain, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = ServiceTokenVerifier("orchestrator", domain.clock)
    token = signer(domain, "models").sign_token("orchestrator")
    assert verifier.verify(token, directory) == "models"

    def fail(*_: object) -> bool:
        raise AssertionError("the signature was verified again")

    monkeypatch.setattr(PublicKey, "verify", fail)
    assert verifier.verify(token, directory) == "models"
    assert reason_of(lambda: verifier.verify(token, {})) == "service_unknown"
    rotated: Directory = {"models": DirectoryEntry((domain.jkt("judge"),))}
    assert reason_of(lambda: verifier.verify(token, rotated)) == "key_mismatch"
    domain.clock.time = NOW + 90
    assert reason_of(lambda: verifier.verify(token, directory)) == "expired"
    domain.clock.time = NOW - 31
    assert reason_of(lambda: verifier.verify(token, directory)) == "not_yet_valid"


def test_a_refused_service_token_is_not_remembered(domain: TrustDomain, directory: Directory) -> None:
    verifier = ServiceTokenVerifier("monitor", domain.clock)
    token = signer(domain, "models").sign_token("orchestrator")
    for _ in range(2):
        assert reason_of(lambda: verifier.verify(token, directory)) == "audience_wrong"


def test_the_directory_survives_the_round(domain: TrustDomain) -> None:
    token = domain.minter.sign_directory(entries(domain))
    directory, roots = verify_directory(token, domain.roots, domain.clock)
    assert directory == entries(domain)
    assert roots == domain.roots
    assert DeclaredCall("files:read", optional=True) in directory["coder"].calls["coder:execute"]
    service = signer(domain, "models").sign_token("memory")
    assert verify_service_token(service, "memory", directory, domain.clock) == "models"


def test_directory_attacks(domain: TrustDomain) -> None:
    token = domain.minter.sign_directory(entries(domain))
    other = SigningKey.generate("orchestrator")
    roots = {other.thumbprint: other.public}
    assert reason_of(lambda: verify_directory(token, roots, domain.clock)) == "root_unknown"
    assert reason_of(lambda: verify_directory("", domain.roots, domain.clock)) == "bearer_missing"
    assert reason_of(lambda: verify_directory("x" * 2_000_000, domain.roots, domain.clock)) == "bearer_too_large"
    bearer = domain.minter.mint_access(ALICE, "coder", "coder:execute")
    assert reason_of(lambda: verify_directory(bearer, domain.roots, domain.clock)) == "type_wrong"
    domain.clock.time = NOW + 330
    assert reason_of(lambda: verify_directory(token, domain.roots, domain.clock)) == "expired"


@pytest.mark.parametrize(
    ("header", "claims", "reason"),
    [
        ({"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}}, {}, "key_unexpected"),
        ({}, {"iss": "coder"}, "issuer_wrong"),
        ({}, {"exp": NOW + 301}, "lives_too_long"),
        ({}, {"services": {"Coder": {"jkts": []}}}, "claims_malformed"),
        ({}, {"services": {"coder": {"jkts": ["short"]}}}, "claims_malformed"),
        ({}, {"services": {"coder": {"jkts": ["A" * 43] * 17}}}, "claims_malformed"),
        ({}, {"services": {"coder": {"jkts": [], "calls": {"coder": []}}}}, "claims_malformed"),
        ({}, {"services": {"coder": {"jkts": [], "calls": {"coder:x": [{"scope": "*"}]}}}}, "claims_malformed"),
        ({}, {"services": {"coder": {"jkts": [], "url": "http://x"}}}, "claims_malformed"),
        ({}, {"roots": [{"kty": "OKP", "crv": "Ed25519", "x": "short"}]}, "claims_malformed"),
        ({}, {"roots": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43, "d": "A" * 43}]}, "claims_malformed"),
        ({}, {"roots": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}] * 17}, "claims_malformed"),
    ],
)
def test_directories_that_the_root_would_not_sign(
    domain: TrustDomain, header: dict[str, Any], claims: dict[str, Any], reason: str
) -> None:
    honest_header = {"alg": "EdDSA", "typ": "dir+jwt", "kid": domain.root.thumbprint}
    honest: dict[str, Any] = {"iss": "orchestrator", "exp": NOW + 300, "iat": NOW, "jti": "1", "services": {}}
    root = domain.root.private
    assert verify_directory(sign(honest_header, honest, root), domain.roots, domain.clock) == ({}, {})
    token = sign({**honest_header, **header}, {**honest, **claims}, root)
    assert reason_of(lambda: verify_directory(token, domain.roots, domain.clock)) == reason


def test_a_malformed_directory_is_not_minted(domain: TrustDomain) -> None:
    for entry in (
        DirectoryEntry(("short",)),
        DirectoryEntry((), {"x": ()}),
        DirectoryEntry((), {"a:b": (DeclaredCall("c"),)}),
    ):
        with pytest.raises(CapabilityError):
            domain.minter.sign_directory({"coder": entry})
