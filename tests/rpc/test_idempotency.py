"""The rules of idempotency keys: which key is well formed, which bodies are the same call, how a secret is stored."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import SigningKey
from octollm.capability.keyring import KeyRing
from octollm.errors import OctoError
from octollm.rpc.idempotency import (
    MAX_KEY,
    IdempotencyKey,
    ResponseCipher,
    StoredResponse,
    body_digest,
    canonical_json,
    check_key,
)

KEY = IdempotencyKey("acme", "user-1", "orchestrator", "keys.create", "k-1")
RESPONSE = StoredResponse(201, b'{"secret": "octo_x"}', {"content-type": "application/json"})

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, random: Any) -> Any:
    """Return an equal value whose members stand in another order."""
    if isinstance(value, dict):
        items = [(name, shuffled(inner, random)) for name, inner in value.items()]
        random.shuffle(items)
        return dict(items)
    return [shuffled(inner, random) for inner in value] if isinstance(value, list) else value


def digest(body: bytes) -> str:
    return body_digest("POST", "/keys", "", body, is_json=True)


@given(json_values, st.randoms(), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_the_same_json_in_any_spelling_is_the_same_call(value: Any, random: Any, escaped: bool, indent: Any) -> None:
    respelled = json.dumps(shuffled(value, random), ensure_ascii=escaped, indent=indent).encode(
        "utf-8", "surrogatepass"
    )
    try:
        plain = msgspec.json.encode(value)
    except UnicodeEncodeError:  # a lone surrogate has no form in UTF-8
        return
    assert digest(respelled) == digest(plain)
    # The same call, where the body has been parsed for its type already.
    assert body_digest("POST", "/keys", "", b"", is_json=True, document=msgspec.json.decode(plain)) == digest(plain)


@given(json_values, json_values)
def test_other_json_is_another_call(one: Any, other: Any) -> None:
    try:
        bodies = msgspec.json.encode(one), msgspec.json.encode(other)
    except UnicodeEncodeError:
        return
    same = canonical_json(bodies[0]) == canonical_json(bodies[1])
    assert (digest(bodies[0]) == digest(bodies[1])) is same
    assert msgspec.json.decode(canonical_json(bodies[0])) == msgspec.json.decode(bodies[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [(b'{"a":1}', b'{"a":2}'), (b'{"a":1}', b'{"b":1}'), (b"[1,2]", b"[2,1]"), (b'{"a":1}', b'{"a":"1"}')],
)
def test_a_value_a_name_an_order_of_a_list_or_a_type_make_another_call(one: bytes, other: bytes) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize("body", [b"", b"no JSON", b'"\xff"', b"[" * 100_000, b"1e999"])
def test_what_is_not_json_is_digested_by_its_bytes(body: bytes) -> None:
    assert canonical_json(body) == body


def test_a_file_is_digested_by_its_bytes_and_every_call_by_its_target() -> None:
    assert body_digest("POST", "/files", "", b'{"a": 1}') != body_digest("POST", "/files", "", b'{"a":1}')
    targets = [("POST", "/a", ""), ("DELETE", "/a", ""), ("POST", "/b", ""), ("POST", "/a", "x=1")]
    assert len({body_digest(*target, b"{}", is_json=True) for target in targets}) == len(targets)


@pytest.mark.parametrize("key", ["k", "k" * (MAX_KEY - 1), "k" * MAX_KEY, "a b:c-~"])
def test_a_key_has_1_to_200_printable_ascii_characters(key: str) -> None:
    assert MAX_KEY == 200
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY + 1), "schlüssel", "k\x7f", "k\n", "\u2028"])
def test_another_key_is_refused_with_a_stable_code(key: str) -> None:
    with pytest.raises(OctoError, match="1 to 200") as caught:
        check_key(key)
    assert caught.value.code == "invalid_header"


def test_a_response_is_decrypted_by_any_trusted_key_and_under_its_own_key_alone() -> None:
    old, new = b"1" * 32, b"2" * 32
    sealed = ResponseCipher(lambda: [old]).encrypt(KEY, RESPONSE)
    assert b"octo_x" not in sealed.body
    assert sealed.headers == RESPONSE.headers
    assert ResponseCipher(lambda: [new, old]).decrypt(KEY, sealed) == RESPONSE
    assert ResponseCipher(lambda: [old]).encrypt(KEY, RESPONSE).body != sealed.body
    moved = msgspec.structs.replace(KEY, key="k-2")
    for cipher, key, stored in (
        (ResponseCipher(lambda: [new]), KEY, sealed),
        (ResponseCipher(lambda: [old]), moved, sealed),
        (ResponseCipher(lambda: [old]), KEY, msgspec.structs.replace(sealed, body=sealed.body[:-1])),
        (ResponseCipher(lambda: [old]), KEY, msgspec.structs.replace(sealed, body=b"")),
    ):
        with pytest.raises(OctoError) as failure:
            cipher.decrypt(key, stored)
        assert failure.value.code == "outcome_unknown"


def test_derived_keys_differ_by_purpose_and_by_root() -> None:
    root, other = SigningKey.generate("root"), SigningKey.generate("root")
    [key] = KeyRing.of(root).derive_keys("one", 0.0)
    assert len(key) == 32
    assert KeyRing.of(root).derive_keys("one", 5.0) == [key]
    assert KeyRing.of(root).derive_keys("two", 0.0) != [key]
    assert KeyRing.of(other).derive_keys("one", 0.0) != [key]
    assert KeyRing.of([root, other]).derive_keys("one", 1e9)[0] == key
