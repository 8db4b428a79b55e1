"""A strict subset of JOSE: Ed25519 JWKs named by their thumbprint (RFC 8037, RFC 7638), and compact JWS (RFC 7515).

Nothing in a token chooses the algorithm, and a key that a token embeds counts only once its thumbprint is confirmed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Literal, NoReturn

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from octollm.capability.errors import CapabilityError

THUMBPRINT_CHARS = 43
"""Characters of a SHA-256 digest in base64url."""
_PUBLIC_MEMBERS = frozenset({"kty", "crv", "x", "kid", "use", "alg"})


def b64encode(data: bytes) -> str:
    """Return base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64decode(text: str) -> bytes:
    """Decode canonical base64url: no padding, no other characters, no stray bits.

    Raises ``CapabilityError`` (``base64_malformed``). Exactly one text is accepted for each byte string.
    """
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise CapabilityError("base64_malformed") from None
    # The standard library skips characters outside the alphabet; encoding again detects those and stray bits.
    if b64encode(data) != text:
        raise CapabilityError("base64_malformed")
    return data


def digest_of(text: str) -> str:
    """Return the SHA-256 of ASCII ``text`` in base64url, the form of the claims ``prf`` and ``gnt``."""
    return b64encode(hashlib.sha256(text.encode("ascii")).digest())


class PublicKey:
    """An Ed25519 public key; ``thumbprint`` is its RFC 7638 name."""

    __slots__ = ("_key", "_x", "thumbprint")

    def __init__(self, raw: bytes) -> None:
        try:
            self._key = Ed25519PublicKey.from_public_bytes(raw)
        except ValueError as exc:
            raise CapabilityError("key_malformed") from exc
        self._x = b64encode(raw)
        # RFC 8037 appendix A.3: the required members in lexicographic order, without white space.
        canonical = f'{{"crv":"Ed25519","kty":"OKP","x":"{self._x}"}}'
        self.thumbprint = digest_of(canonical)

    @classmethod
    def from_jwk(cls, jwk: Mapping[str, object]) -> PublicKey:
        """Parse a public JWK: OKP and Ed25519; ``kid``, ``use`` and ``alg`` must match if they are present.

        Raises ``CapabilityError`` (``key_malformed``) for anything else, a private key included.
        """
        key = cls(_public_bytes(jwk))
        is_consistent = (
            jwk.keys() <= _PUBLIC_MEMBERS
            and jwk.get("kid", key.thumbprint) == key.thumbprint
            and jwk.get("use", "sig") == "sig"
            and jwk.get("alg", "EdDSA") == "EdDSA"
        )
        if not is_consistent:
            raise CapabilityError("key_malformed")
        return key

    def to_jwk(self) -> dict[str, str]:
        """Return the JWK with only its three required members, the form of the ``jwk`` header."""
        return {"kty": "OKP", "crv": "Ed25519", "x": self._x}

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Return whether this key made ``signature`` over ``message`` (RFC 8032)."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self._x == other._x

    def __hash__(self) -> int:
        return hash(self._x)

    def __repr__(self) -> str:
        return f"PublicKey({self.thumbprint})"


class SigningKey:
    """An Ed25519 key pair of the service ``name``. Its repr does not show the private half."""

    __slots__ = ("_headers", "_key", "name", "public")

    def __init__(self, key: Ed25519PrivateKey, name: str = "") -> None:
        self._key = key
        self._headers: dict[tuple[str, bool, bool], str] = {}
        """Encoded protected headers by ``typ``, ``kid`` and ``jwk``: every token of one kind has the same."""
        self.name = name
        self.public = PublicKey(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, name: str = "") -> SigningKey:
        """Return a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate(), name)

    @classmethod
    def from_jwk(cls, jwk: Mapping[str, object], name: str = "") -> SigningKey:
        """Parse a private JWK; raises ``CapabilityError`` (``key_malformed``) unless both halves belong together."""
        key = cls(Ed25519PrivateKey.from_private_bytes(_member_bytes(jwk, "d")), name)
        public = PublicKey.from_jwk({member: value for member, value in jwk.items() if member != "d"})
        if public != key.public:
            raise CapabilityError("key_malformed")
        return key

    @property
    def thumbprint(self) -> str:
        """The RFC 7638 thumbprint of the public half."""
        return self.public.thumbprint

    @property
    def private(self) -> Ed25519PrivateKey:
        """The private key, for the signing library."""
        return self._key

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature over ``message`` (RFC 8032)."""
        return self._key.sign(message)

    def encoded_header(self, typ: TokenType, *, with_kid: bool, with_jwk: bool) -> str:
        """Return the protected header of a token by this key, in base64url."""
        kind = (typ, with_kid, with_jwk)
        encoded = self._headers.get(kind)
        if encoded is None:
            kid = self.thumbprint if with_kid else None
            jwk = msgspec.convert(self.public.to_jwk(), Jwk) if with_jwk else None
            encoded = self._headers[kind] = b64encode(msgspec.json.encode(JwsHeader(ALGORITHM, typ, kid, jwk)))
        return encoded

    def to_jwk(self, *, private: bool) -> dict[str, str]:
        """Return the JWK with its ``kid``; with ``private`` it contains the secret ``d``."""
        jwk = {**self.public.to_jwk(), "kid": self.thumbprint}
        return {**jwk, "d": b64encode(self._key.private_bytes_raw())} if private else jwk

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r}, {self.thumbprint})"


def to_jwks(keys: Mapping[str, PublicKey]) -> dict[str, list[dict[str, str]]]:
    """Return the JWK Set (RFC 7517 section 5) of public ``keys``, each with ``kid``, ``use`` and ``alg``."""
    return {"keys": [to_published_jwk(key) for key in keys.values()]}


def to_published_jwk(key: PublicKey) -> dict[str, str]:
    """Return a public key as a member of a JWK Set, with ``kid``, ``use`` and ``alg``."""
    return {**key.to_jwk(), "kid": key.thumbprint, "use": "sig", "alg": "EdDSA"}


def _public_bytes(jwk: Mapping[str, object]) -> bytes:
    if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
        raise CapabilityError("key_malformed")
    return _member_bytes(jwk, "x")


def _member_bytes(jwk: Mapping[str, object], member: str) -> bytes:
    text = jwk.get(member)
    if not isinstance(text, str) or len(text) != THUMBPRINT_CHARS:
        raise CapabilityError("key_malformed")
    try:
        return b64decode(text)  # 43 canonical characters are 32 bytes
    except CapabilityError:
        raise CapabilityError("key_malformed") from None


TokenType = Literal["cap+jwt", "cap-grant+jwt", "svc+jwt", "dir+jwt", "audit+jwt"]
"""The ``typ`` header (RFC 8725 section 3.11), by which no kind of token is accepted as another."""

ALGORITHM = "EdDSA"

MAX_HEADER_CHARS = 512
"""Most characters of an encoded header; the longest that is minted here has some 260."""
_MAX_BRACKETS = 512
"""Most arrays and objects of a token, which bounds the depth of its JSON."""
_CACHED_HEADERS = 1024
"""Headers and embedded keys whose parsed form is kept: a service's tokens of one kind all have the same."""

Thumbprint = Annotated[str, Meta(pattern=rf"\A[A-Za-z0-9_-]{{{THUMBPRINT_CHARS}}}\Z")]
"""A SHA-256 digest in base64url."""


class Jwk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``jwk`` header: the three members that the thumbprint covers, and no other."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: Thumbprint


class JwsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A protected header. Whether it needs ``kid`` or ``jwk`` depends on the kind of token."""

    alg: str
    typ: str
    kid: Thumbprint | None = None
    jwk: Jwk | None = None


class Jws(msgspec.Struct, frozen=True):
    """A parsed token whose signature is not verified yet."""

    header: JwsHeader
    claims: object
    signing_input: bytes
    signature: bytes

    def embedded_key(self) -> PublicKey:
        """Return the key of the ``jwk`` header; it proves nothing until its thumbprint is confirmed."""
        if self.header.jwk is None:
            raise CapabilityError("key_missing")
        return _embedded_key(self.header.jwk.x)

    def check_signature(self, key: PublicKey) -> None:
        """Raise ``CapabilityError`` (``signature_invalid``) unless ``key`` made the signature."""
        if not key.verify(self.signature, self.signing_input):
            raise CapabilityError("signature_invalid")


def pinned_root(header: JwsHeader, roots: Mapping[str, PublicKey]) -> PublicKey:
    """Return the pinned root that ``kid`` names; a ``jwk`` beside it is refused.

    Raises ``CapabilityError``: ``key_unexpected``, ``key_missing`` or ``root_unknown``.
    """
    if header.jwk is not None:
        raise CapabilityError("key_unexpected")
    if header.kid is None:
        raise CapabilityError("key_missing")
    root = roots.get(header.kid)
    # The name in the mapping is not proof: the key itself has to have that thumbprint.
    if root is None or root.thumbprint != header.kid:
        raise CapabilityError("root_unknown")
    return root


@lru_cache(_CACHED_HEADERS)
def _embedded_key(x: str) -> PublicKey:
    return PublicKey(b64decode(x))


@lru_cache(_CACHED_HEADERS)
def _parse_header(text: str) -> JwsHeader:
    """Return the header of an encoded text. A pure function of its text, so that a cached result is as good as new."""
    try:
        return msgspec.convert(_parse_json(b64decode(text), _MAX_BRACKETS), JwsHeader)
    except msgspec.ValidationError:
        raise CapabilityError("header_malformed") from None


def decode_jws(
    token: str,
    typ: TokenType,
    *,
    max_brackets: int = _MAX_BRACKETS,
    parse_canonical: Callable[[bytes], object] | None = None,
) -> Jws:
    """Parse a token whose length is already bounded; its claims are plain JSON values.

    ``parse_canonical`` may return the claims of a payload in one pass, or ``None`` to have it parsed strictly here.
    Raises ``CapabilityError`` with a reason of a malformed token.
    """
    signing_input, _, signature_text = token.rpartition(".")
    header_text, dot, payload_text = signing_input.partition(".")
    if not dot or "." in payload_text or len(header_text) > MAX_HEADER_CHARS:
        raise CapabilityError("bearer_malformed")
    header = _parse_header(header_text)
    # Before the payload: a token of another algorithm or kind is refused without parsing its claims.
    if header.alg != ALGORITHM:
        raise CapabilityError("algorithm_refused")
    if header.typ != typ:
        raise CapabilityError("type_wrong")
    payload = b64decode(payload_text)
    claims = None if parse_canonical is None else parse_canonical(payload)
    if claims is None:
        claims = _parse_json(payload, max_brackets)
    return Jws(header, claims, signing_input.encode("ascii"), b64decode(signature_text))


def encode_jws(
    payload: bytes, typ: TokenType, key: SigningKey, *, with_kid: bool = False, with_jwk: bool = False
) -> str:
    """Sign ``payload`` (JSON) with ``key``; the header names the key by ``kid``, embeds it as ``jwk``, or both."""
    header = key.encoded_header(typ, with_kid=with_kid, with_jwk=with_jwk)
    signing_input = f"{header}.{b64encode(payload)}"
    return f"{signing_input}.{b64encode(key.sign(signing_input.encode('ascii')))}"


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    # RFC 7519 section 4 lets a parser take the last of two members with one name: two parsers could then disagree.
    if len(members) != len(pairs) or None in members.values():
        raise CapabilityError("json_malformed")
    return members


def _refuse_constant(_: str) -> NoReturn:
    raise CapabilityError("json_malformed")


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_refuse_constant)


def _parse_json(data: bytes, max_brackets: int) -> object:
    # Counted first, since a deep nesting costs the parser more than the count.
    if data.count(b"{") + data.count(b"[") > max_brackets:
        raise CapabilityError("json_malformed")
    try:
        return _JSON_DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CapabilityError("json_malformed") from None
