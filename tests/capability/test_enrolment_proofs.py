"""Enrolment tokens, their proofs and nonces: what fits is accepted, and nothing else is."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octollm.capability import SigningKey
from octollm.capability.enrolment import (
    MAX_CALLS,
    NONCE_SECONDS,
    EnrolmentClaim,
    EnrolmentTerms,
    EnrolmentToken,
    EnrolmentTokenIssuer,
    arm_proof,
    check_arm_name,
    check_operation_name,
    is_enrolment_id,
    parse_declared_calls,
    proofs_match,
    root_proof,
    rotation_message,
    scopes_of,
)
from octollm.capability.jose import b64decode, b64encode
from octollm.contracts.services import ORCHESTRATOR_FAMILIES, SERVICES
from octollm.errors import OctoError

ROOT = SigningKey.generate("root")
OTHER = SigningKey.generate("root")
NOW = 1_800_000_000.0

ids = st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}")
words = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
calls = st.lists(words, max_size=4).map(lambda names: tuple(sorted({f"{name}x:do" for name in names})))
terms = st.builds(EnrolmentTerms, ids, words, calls, st.integers(1, 2**40))
texts = st.text(max_size=20)
claims = st.builds(EnrolmentClaim, texts, texts, texts, st.lists(texts, max_size=4).map(tuple))


@given(terms)
def test_both_sides_have_the_same_secret(wanted: EnrolmentTerms) -> None:
    root = EnrolmentTokenIssuer(ROOT)
    secret = EnrolmentToken.parse(root.derive_token(wanted, NOW))
    assert (secret.id, secret.key) == (wanted.id, root.derive_keys(wanted, NOW)[0])
    assert EnrolmentTokenIssuer(ROOT).derive_keys(wanted, NOW) == [secret.key]


@given(terms, terms)
def test_other_terms_or_another_root_have_another_secret(one: EnrolmentTerms, other: EnrolmentTerms) -> None:
    assume(one != other)
    assert EnrolmentTokenIssuer(ROOT).derive_keys(one, NOW) != EnrolmentTokenIssuer(ROOT).derive_keys(other, NOW)
    assert EnrolmentTokenIssuer(ROOT).derive_keys(one, NOW) != EnrolmentTokenIssuer(OTHER).derive_keys(one, NOW)


def test_a_widened_row_fits_no_secret() -> None:
    narrow = EnrolmentTerms("0" * 32, "translator", ("models:chat",), 1_900_000_000)
    key = EnrolmentTokenIssuer(ROOT).derive_keys(narrow, NOW)
    for changed in (
        dataclasses.replace(narrow, calls=("executor:run", "models:chat")),
        dataclasses.replace(narrow, expires=1_900_000_001),
        dataclasses.replace(narrow, name="translators"),
        dataclasses.replace(narrow, id="0" * 31 + "1"),
    ):
        assert EnrolmentTokenIssuer(ROOT).derive_keys(changed, NOW) != key


@given(st.text(max_size=120))
def test_a_text_that_is_no_secret_is_refused(text: str) -> None:
    with pytest.raises(OctoError) as caught:
        EnrolmentToken.parse(text)
    assert caught.value.code == "join_refused"
    assert text not in caught.value.detail or len(text) < 3


def test_a_secret_is_shown_nowhere() -> None:
    text = EnrolmentTokenIssuer(ROOT).derive_token(EnrolmentTerms("a" * 32, "translator", (), 1), NOW)
    secret = EnrolmentToken.parse(text)
    hidden = text.rsplit("_", 1)[1]
    assert hidden not in f"{secret} {secret!r}"


@given(claims, claims)
def test_a_proof_is_of_one_claim(one: EnrolmentClaim, other: EnrolmentClaim) -> None:
    assume(one != other)
    assert not proofs_match(arm_proof(b"k" * 32, one), arm_proof(b"k" * 32, other))
    assert not proofs_match(root_proof(b"k" * 32, one, ["r"]), root_proof(b"k" * 32, other, ["r"]))
    assert not proofs_match(arm_proof(b"k" * 32, one), arm_proof(b"l" * 32, one))


@given(claims, st.lists(texts, max_size=3, unique=True))
def test_an_arms_proof_never_is_the_roots(claim: EnrolmentClaim, roots: list[str]) -> None:
    assert not proofs_match(arm_proof(b"k" * 32, claim), root_proof(b"k" * 32, claim, roots))


@given(claims, texts)
def test_a_call_is_not_taken_for_a_root(claim: EnrolmentClaim, moved: str) -> None:
    more = dataclasses.replace(claim, calls=(*claim.calls, moved))
    assert root_proof(b"k" * 32, more, []) != root_proof(b"k" * 32, claim, [moved])


@given(claims, st.lists(texts, min_size=1, max_size=4, unique=True))
def test_the_order_of_the_roots_does_not_matter(claim: EnrolmentClaim, roots: list[str]) -> None:
    assert root_proof(b"k" * 32, claim, roots) == root_proof(b"k" * 32, claim, roots[::-1])
    assert root_proof(b"k" * 32, claim, roots) != root_proof(b"k" * 32, claim, roots[1:])


@given(ids, st.floats(0, 1e10), st.floats(-1e4, 1e4))
def test_a_nonce_is_good_for_its_time(unique: str, made: float, later: float) -> None:
    root = EnrolmentTokenIssuer(ROOT)
    nonce = root.create_nonce(unique, made)
    assert root.is_valid_nonce(nonce, made + NONCE_SECONDS / 2)
    if not -0.01 < later < NONCE_SECONDS + 0.01:
        assert not root.is_valid_nonce(nonce, made + later)
    assert not EnrolmentTokenIssuer(OTHER).is_valid_nonce(nonce, made)


@given(ids, st.integers(0, 319))
def test_a_changed_nonce_is_refused(unique: str, bit: int) -> None:
    root = EnrolmentTokenIssuer(ROOT)
    raw = bytearray(b64decode(root.create_nonce(unique, NOW)))
    raw[bit // 8] ^= 1 << bit % 8
    assert not root.is_valid_nonce(b64encode(bytes(raw)), NOW)


@given(st.text(max_size=80))
def test_any_text_is_no_nonce(text: str) -> None:
    assert not EnrolmentTokenIssuer(ROOT).is_valid_nonce(text, NOW)


@pytest.mark.parametrize("name", [*SERVICES, *sorted(ORCHESTRATOR_FAMILIES), "coder-arm", "octollm"])
def test_names_of_the_installation_are_refused(name: str) -> None:
    with pytest.raises(OctoError, match="belongs to the installation"):
        check_arm_name(name)


@pytest.mark.parametrize("name", ["", "a:b", "A", "*", "ü", "a b", "x" * 65, "-a", "1a", "a\n", "a/b", ".."])
def test_names_that_are_no_segment_are_refused(name: str) -> None:
    with pytest.raises(OctoError, match="begins with a letter"):
        check_arm_name(name)


def test_good_names_are_taken() -> None:
    for name in ("translator", "sql_analyst", "a", "weather-2", "x.y"):
        check_arm_name(name)
        check_operation_name(name)
    with pytest.raises(OctoError):
        check_operation_name("a:b")


@pytest.mark.parametrize(
    "call",
    [
        "tasks:approve", "tasks:steer", "tasks:create:x", "tasks:*", "tasks:list", "keys:write", "arms:write",
        "audit:read", "webhooks:read", "events:read", "orchestrator:x",
        "reflex:x", "models:*", "models", "models:chat:x", "*:*", "Models:chat", "", "?", "??models:chat",
        "models:chat ", "files:read:0a",
    ],
)  # fmt: skip
def test_calls_that_no_arm_is_lent(call: str) -> None:
    with pytest.raises(OctoError) as caught:
        parse_declared_calls([call])
    assert caught.value.code == "invalid_body"


def test_calls_are_read_sorted_once_and_some_are_optional() -> None:
    found = parse_declared_calls(
        ["retriever:search", "?models:chat", "retriever:search", "weather:today", "files:read"]
    )
    assert scopes_of(found) == ("files:read", "models:chat", "retriever:search", "weather:today")
    assert [call.optional for call in found] == [False, True, False, False]
    for_sub_tasks = ("tasks:cancel", "tasks:create", "tasks:read")
    assert scopes_of(parse_declared_calls(for_sub_tasks)) == for_sub_tasks
    with pytest.raises(OctoError):
        parse_declared_calls([f"a{number}:b" for number in range(MAX_CALLS + 1)])


def test_ids_and_rotations() -> None:
    assert is_enrolment_id("0" * 32)
    assert not is_enrolment_id("0" * 31)
    assert not is_enrolment_id("0" * 32 + "\n")
    assert rotation_message("a", "bc") != rotation_message("ab", "c")
