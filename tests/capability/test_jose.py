"""Keys as JWKs: the RFC's own examples, and what is not a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.capability import CapabilityError, PublicKey, SigningKey, to_jwks
from octollm.capability.jose import b64decode, b64encode

# RFC 8037 appendix A.
RFC_X = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
RFC_D = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
RFC_THUMBPRINT = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
RFC_INPUT = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
RFC_SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"


def rfc_jwk() -> dict[str, object]:
    return {"kty": "OKP", "crv": "Ed25519", "x": RFC_X}


def test_the_example_of_the_rfc() -> None:
    key = SigningKey.from_jwk({**rfc_jwk(), "d": RFC_D})
    assert key.thumbprint == RFC_THUMBPRINT
    assert b64encode(key.sign(RFC_INPUT)) == RFC_SIGNATURE
    public = PublicKey.from_jwk(rfc_jwk())
    assert public == key.public
    assert public.verify(b64decode(RFC_SIGNATURE), RFC_INPUT)
    assert not public.verify(b64decode(RFC_SIGNATURE), RFC_INPUT + b" ")
    assert not public.verify(b"", RFC_INPUT)


def test_jwks_survive_the_round() -> None:
    key = SigningKey.generate("coder")
    assert SigningKey.from_jwk(key.to_jwk(private=True), "coder").thumbprint == key.thumbprint
    assert PublicKey.from_jwk(key.to_jwk(private=False)) == key.public
    assert "d" not in key.to_jwk(private=False)
    (entry,) = to_jwks({key.thumbprint: key.public})["keys"]
    assert entry == {**key.public.to_jwk(), "kid": key.thumbprint, "use": "sig", "alg": "EdDSA"}
    assert PublicKey.from_jwk(entry) == key.public


def test_no_repr_shows_the_private_half() -> None:
    key = SigningKey.generate("coder")
    secret = key.to_jwk(private=True)["d"]
    assert secret not in repr(key)
    assert secret not in str(key)


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "EC"},
        {"kty": None},
        {"crv": "X25519"},
        {"crv": "Ed448"},
        {"x": RFC_X[:-1]},
        {"x": RFC_X + "="},
        {"x": RFC_X + "A"},
        {"x": RFC_X[:-1] + "p"},  # the same bytes, with bits left over
        {"x": RFC_X[:-1] + "!"},
        {"x": RFC_X[:-1] + "é"},
        {"x": " " + RFC_X[1:]},
        {"x": 1},
        {"x": None},
        {"d": RFC_D},
        {"kid": "another"},
        {"use": "enc"},
        {"alg": "HS256"},
        {"k": "c2VjcmV0"},
        {"x5u": "https://example.org/key"},
    ],
)
def test_what_is_not_a_public_key_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CapabilityError) as caught:
        PublicKey.from_jwk({**rfc_jwk(), **change})
    assert caught.value.reason == "key_malformed"


def test_halves_that_do_not_belong_together_are_refused() -> None:
    other = SigningKey.generate().to_jwk(private=True)["d"]
    for secret in (other, RFC_D[:-1], 1, None):
        with pytest.raises(CapabilityError):
            SigningKey.from_jwk({**rfc_jwk(), "d": secret})


@given(st.binary(max_size=70))
def test_each_byte_string_has_one_text(data: bytes) -> None:
    assert b64decode(b64encode(data)) == data


@given(st.text(max_size=12) | st.text(alphabet="AQgw-_+/=\n ", max_size=8))
def test_no_other_text_is_accepted(text: str) -> None:
    try:
        data = b64decode(text)
    except CapabilityError as error:
        assert error.reason == "base64_malformed"
    else:
        assert b64encode(data) == text
