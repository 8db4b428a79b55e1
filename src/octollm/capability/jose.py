"""Strict compact JWS (RFC 7515), the little of it that is used here.

Nothing in a token chooses an algorithm or fetches a key. The header has exactly the members that its place asks
for: ``crit``, ``jku``, ``x5c``, ``b64`` and whatever else there may be are refused, as are duplicate members, null,
base64url that is not canonical, and text that is not UTF-8. Sizes are bounded by the caller before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal, NoReturn

import msgspec
from jwt.api_jws import PyJWS
from msgspec import Meta

from octollm.capability.keys import THUMBPRINT_CHARS, PublicKey, SigningKey, b64decode
from octollm.capability.problems import CapabilityError

TokenType = Literal["cap+jwt", "cap-grant+jwt", "svc+jwt", "dir+jwt", "audit+jwt"]
"""The ``typ`` header (RFC 8725 section 3.11): what a token is, so that none is taken for another."""

ALGORITHM = "EdDSA"

MAX_HEADER_CHARS = 512
"""Characters of an encoded header; the longest that is made here has some 260."""
_MAX_BRACKETS = 512
"""Arrays and objects of a bearer's token, which bounds how deep its JSON can be."""
_SIGNER = PyJWS(algorithms=[ALGORITHM])

Thumbprint = Annotated[str, Meta(pattern=rf"\A[A-Za-z0-9_-]{{{THUMBPRINT_CHARS}}}\Z")]
"""A SHA-256 digest in base64url."""


class Jwk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``jwk`` header: the three members that the thumbprint is made of, and no other."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: Thumbprint


class JwsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A protected header. Which of ``kid`` and ``jwk`` must be there depends on the token."""

    alg: str
    typ: str
    kid: Thumbprint | None = None
    jwk: Jwk | None = None


class Jws(msgspec.Struct, frozen=True):
    """A token that was read, and whose signature nobody has checked yet."""

    header: JwsHeader
    claims: object
    signing_input: bytes
    signature: bytes

    def embedded_key(self) -> PublicKey:
        """Return the key of the ``jwk`` header; it is worth nothing before its thumbprint was found right."""
        if self.header.jwk is None:
            raise CapabilityError("key_missing")
        return PublicKey(b64decode(self.header.jwk.x))

    def check_signature(self, key: PublicKey) -> None:
        """Raise ``CapabilityError`` (``signature_invalid``) unless the signature is that of ``key``."""
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
    if root is None or root.thumbprint != header.kid:
        raise CapabilityError("root_unknown")
    return root


def decode_jws(token: str, typ: TokenType, *, max_brackets: int = _MAX_BRACKETS) -> Jws:
    """Read a token whose length is already bounded; its claims are plain JSON values.

    Raises ``CapabilityError`` with a reason among those of a malformed token.
    """
    signing_input, _, signature_text = token.rpartition(".")
    header_text, dot, payload_text = signing_input.partition(".")
    if not dot or "." in payload_text or len(header_text) > MAX_HEADER_CHARS:
        raise CapabilityError("bearer_malformed")
    try:
        header = msgspec.convert(_parse_json(b64decode(header_text), max_brackets), JwsHeader)
    except msgspec.ValidationError:
        raise CapabilityError("header_malformed") from None
    if header.alg != ALGORITHM:
        raise CapabilityError("algorithm_refused")
    if header.typ != typ:
        raise CapabilityError("type_wrong")
    claims = _parse_json(b64decode(payload_text), max_brackets)
    return Jws(header, claims, signing_input.encode("ascii"), b64decode(signature_text))


def encode_jws(
    payload: bytes, typ: TokenType, key: SigningKey, *, with_kid: bool = False, with_jwk: bool = False
) -> str:
    """Sign ``payload`` (JSON text) with ``key``, naming it by ``kid``, bringing its public half as ``jwk``, or both."""
    headers: dict[str, object] = {"typ": typ}
    if with_kid:
        headers["kid"] = key.thumbprint
    if with_jwk:
        headers["jwk"] = key.public.to_jwk()
    return _SIGNER.encode(payload, key.private, algorithm=ALGORITHM, headers=headers)


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    # RFC 7519 section 4 lets a parser take the last of two equal names; two parsers could then disagree.
    if len(members) != len(pairs) or None in members.values():
        raise CapabilityError("json_malformed")
    return members


def _refuse_constant(_: str) -> NoReturn:
    raise CapabilityError("json_malformed")


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_refuse_constant)


def _parse_json(data: bytes, max_brackets: int) -> object:
    if data.count(b"{") + data.count(b"[") > max_brackets:
        raise CapabilityError("json_malformed")
    try:
        return _JSON_DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CapabilityError("json_malformed") from None
