"""Services that speak for themselves, and the directory that says which keys are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from capability_forge import ALICE, NOW, OUTER_CODES, World, jwk_of, refused, sign

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
def directory(world: World) -> Directory:
    return {name: DirectoryEntry((world.jkt(name),)) for name in ("models", "judge")}


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(CapabilityError) as caught:
        call()
    assert caught.value.code in OUTER_CODES
    return caught.value.reason


def signer(world: World, name: str) -> ServiceTokenSigner:
    return ServiceTokenSigner(world.keys[name], name, world.clock, world.ids)


def test_a_service_is_known_by_its_key(world: World, directory: Directory) -> None:
    token = signer(world, "models").sign_token("orchestrator")
    assert verify_service_token(token, "orchestrator", directory, world.clock) == "models"
    both: Directory = {"models": DirectoryEntry((world.jkt("judge"), world.jkt("models")))}
    assert verify_service_token(token, "orchestrator", both, world.clock) == "models"


def test_only_its_own_name_and_only_while_listed(world: World, directory: Directory) -> None:
    token = signer(world, "models").sign_token("orchestrator")
    check = verify_service_token
    assert reason_of(lambda: check(token, "monitor", directory, world.clock)) == "audience_wrong"
    assert reason_of(lambda: check(token, "orchestrator", {}, world.clock)) == "service_unknown"
    gone: Directory = {"models": DirectoryEntry(())}
    assert reason_of(lambda: check(token, "orchestrator", gone, world.clock)) == "key_mismatch"
    posing = ServiceTokenSigner(world.keys["judge"], "models", world.clock, world.ids).sign_token("orchestrator")
    assert reason_of(lambda: check(posing, "orchestrator", directory, world.clock)) == "key_mismatch"


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
    world: World, directory: Directory, header: dict[str, Any], claims: dict[str, Any], reason: str
) -> None:
    key = world.keys["models"].private
    honest_header = {"alg": "EdDSA", "typ": "svc+jwt", "kid": world.jkt("models"), "jwk": jwk_of(key)}
    honest = {"iss": "models", "sub": "models", "aud": "orchestrator", "exp": NOW + 60, "iat": NOW, "jti": "1"}
    assert verify_service_token(sign(honest_header, honest, key), "orchestrator", directory, world.clock)
    token = sign({**honest_header, **header}, {**honest, **claims}, key)
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, world.clock)) == reason
    forged = sign(honest_header, honest, world.keys["mallory"].private)
    verdict = reason_of(lambda: verify_service_token(forged, "orchestrator", directory, world.clock))
    assert verdict == "signature_invalid"


def test_a_service_token_without_its_key_is_refused(world: World, directory: Directory) -> None:
    claims = {"iss": "models", "sub": "models", "aud": "orchestrator", "exp": NOW + 60, "iat": NOW, "jti": "1"}
    header = {"alg": "EdDSA", "typ": "svc+jwt", "kid": world.jkt("models")}
    token = sign(header, claims, world.keys["models"].private)
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, world.clock)) == "key_missing"


@pytest.mark.parametrize(
    ("token", "reason"),
    [(None, "bearer_missing"), ("", "bearer_missing"), ("x" * 5000, "bearer_too_large"), ("é.a.b", "base64_malformed")],
)
def test_no_service_token(world: World, directory: Directory, token: str | None, reason: str) -> None:
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, world.clock)) == reason


def test_a_service_token_is_no_capability_and_the_other_way_round(world: World, directory: Directory) -> None:
    service = signer(world, "models").sign_token("orchestrator")
    assert refused(world.verifier("orchestrator"), service) == "type_wrong"
    capability = world.minter.mint_access(ALICE, "orchestrator", "tasks:create")
    check = lambda: verify_service_token(capability, "orchestrator", directory, world.clock)  # noqa: E731
    assert reason_of(check) == "type_wrong"


def test_a_service_token_lives_a_minute_at_most(world: World, directory: Directory) -> None:
    with pytest.raises(CapabilityError):
        signer(world, "models").sign_token("orchestrator", 61)
    token = signer(world, "models").sign_token("orchestrator")
    world.clock.time = NOW + 89.9
    assert verify_service_token(token, "orchestrator", directory, world.clock)
    world.clock.time = NOW + 90
    assert reason_of(lambda: verify_service_token(token, "orchestrator", directory, world.clock)) == "expired"


def entries(world: World) -> dict[str, DirectoryEntry]:
    calls = {name: made for name, made in BUILT_IN_CALLS.items() if name.startswith("coder:")}
    return {"coder": DirectoryEntry((world.jkt("coder"),), calls), "models": DirectoryEntry((world.jkt("models"),))}


def test_a_service_token_is_reused_for_one_audience_with_half_of_its_life_left(
    world: World, directory: Directory
) -> None:
    models = signer(world, "models")
    first = models.sign_token("orchestrator")
    assert models.sign_token("monitor") != first
    world.clock.time = NOW + 30
    assert models.sign_token("orchestrator") == first
    world.clock.time = NOW + 30.001
    second = models.sign_token("orchestrator")
    assert second != first
    assert models.sign_token("orchestrator", 10) != second, "it would live longer than asked for"
    world.clock.time = NOW + 29
    assert models.sign_token("orchestrator") != second, "a clock that was set back"
    world.clock.time = NOW + 85
    assert verify_service_token(second, "orchestrator", directory, world.clock) == "models"


def test_a_new_key_signs_at_once(world: World) -> None:
    old, new = (DatedKey(world.keys["models"]), DatedKey(world.keys["judge"], NOW - OVERLAP_SECONDS + 10))
    models = ServiceTokenSigner(KeyRing([old, new]), "models", world.clock, world.ids)
    first = models.sign_token("orchestrator")
    world.clock.time = NOW + 10
    assert models.sign_token("orchestrator") != first


def test_a_known_service_token_is_verified_by_time_and_directory_each_time(
    world: World, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = ServiceTokenVerifier("orchestrator", world.clock)
    token = signer(world, "models").sign_token("orchestrator")
    assert verifier.verify(token, directory) == "models"

    def fail(*_: object) -> bool:
        raise AssertionError("the signature was verified again")

    monkeypatch.setattr(PublicKey, "verify", fail)
    assert verifier.verify(token, directory) == "models"
    assert reason_of(lambda: verifier.verify(token, {})) == "service_unknown"
    rotated: Directory = {"models": DirectoryEntry((world.jkt("judge"),))}
    assert reason_of(lambda: verifier.verify(token, rotated)) == "key_mismatch"
    world.clock.time = NOW + 90
    assert reason_of(lambda: verifier.verify(token, directory)) == "expired"
    world.clock.time = NOW - 31
    assert reason_of(lambda: verifier.verify(token, directory)) == "not_yet_valid"


def test_a_refused_service_token_is_not_remembered(world: World, directory: Directory) -> None:
    verifier = ServiceTokenVerifier("monitor", world.clock)
    token = signer(world, "models").sign_token("orchestrator")
    for _ in range(2):
        assert reason_of(lambda: verifier.verify(token, directory)) == "audience_wrong"


def test_the_directory_survives_the_round(world: World) -> None:
    token = world.minter.sign_directory(entries(world))
    directory, roots = verify_directory(token, world.roots, world.clock)
    assert directory == entries(world)
    assert roots == world.roots
    assert DeclaredCall("files:read", optional=True) in directory["coder"].calls["coder:execute"]
    service = signer(world, "models").sign_token("memory")
    assert verify_service_token(service, "memory", directory, world.clock) == "models"


def test_directory_attacks(world: World) -> None:
    token = world.minter.sign_directory(entries(world))
    other = SigningKey.generate("orchestrator")
    roots = {other.thumbprint: other.public}
    assert reason_of(lambda: verify_directory(token, roots, world.clock)) == "root_unknown"
    assert reason_of(lambda: verify_directory("", world.roots, world.clock)) == "bearer_missing"
    assert reason_of(lambda: verify_directory("x" * 2_000_000, world.roots, world.clock)) == "bearer_too_large"
    bearer = world.minter.mint_access(ALICE, "coder", "coder:execute")
    assert reason_of(lambda: verify_directory(bearer, world.roots, world.clock)) == "type_wrong"
    world.clock.time = NOW + 330
    assert reason_of(lambda: verify_directory(token, world.roots, world.clock)) == "expired"


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
    world: World, header: dict[str, Any], claims: dict[str, Any], reason: str
) -> None:
    honest_header = {"alg": "EdDSA", "typ": "dir+jwt", "kid": world.root.thumbprint}
    honest: dict[str, Any] = {"iss": "orchestrator", "exp": NOW + 300, "iat": NOW, "jti": "1", "services": {}}
    root = world.root.private
    assert verify_directory(sign(honest_header, honest, root), world.roots, world.clock) == ({}, {})
    token = sign({**honest_header, **header}, {**honest, **claims}, root)
    assert reason_of(lambda: verify_directory(token, world.roots, world.clock)) == reason


def test_a_malformed_directory_is_not_minted(world: World) -> None:
    for entry in (
        DirectoryEntry(("short",)),
        DirectoryEntry((), {"x": ()}),
        DirectoryEntry((), {"a:b": (DeclaredCall("c"),)}),
    ):
        with pytest.raises(CapabilityError):
            world.minter.sign_directory({"coder": entry})
