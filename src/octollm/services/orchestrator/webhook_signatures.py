"""Signatures of webhooks: secrets, verification of deliveries that come in, and signing of those that go out.

Standard Webhooks is the scheme of our own deliveries, by the library of that standard. Others are verified as their
senders document them. Signatures are compared in constant time, and a refusal has no reason in it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from standardwebhooks import Webhook

from octollm.contracts.hooks import HmacSignature, SignatureScheme
from octollm.errors import FieldError, OctoError
from octollm.services.orchestrator.hook_template import read_pointer

STANDARD_PREFIX = "whsec_"
MAX_SIGNATURES = 16
"""Signatures that one delivery may carry: a sender sends several while it rotates its secret."""
MAX_SENDER_ID = 256

_TIME = re.compile(r"[0-9]{1,12}")
_ID = re.compile(rf"[!-~]{{1,{MAX_SENDER_ID}}}")
_STRIPE_ELEMENT = re.compile(r"(t|v[0-9])=([0-9A-Za-z]{1,256})")


@dataclass(frozen=True, slots=True)
class VerifiedDelivery:
    """A delivery with a valid signature. ``keys`` identify it: a repeat has one of them in common."""

    keys: tuple[str, ...]


class SignatureError(Exception):
    """A delivery is not what its sender signed. The text is for the log of the service, never for the sender."""


def generate_secret(scheme: SignatureScheme) -> str:
    """Return a new secret of 256 random bits, in the form of the scheme."""
    if scheme == "standard":
        return STANDARD_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_urlsafe(32)


def check_secret(scheme: SignatureScheme, secret: str) -> None:
    """Raise ``invalid_body`` for a secret that the scheme cannot use."""
    if scheme != "standard":
        return
    try:
        size = len(base64.b64decode(secret.removeprefix(STANDARD_PREFIX), validate=True))
    except binascii.Error:
        size = 0
    if not secret.startswith(STANDARD_PREFIX) or not 24 <= size <= 64:
        detail = "A secret of Standard Webhooks is `whsec_` and the base64 of 24 to 64 bytes."
        raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/secret", detail),))


def sign_standard(secrets_: Sequence[str], message_id: str, at: float, body: str) -> dict[str, str]:
    """Return the headers of Standard Webhooks 1.0, with a signature by each of ``secrets_``.

    ``at`` is the time of the attempt in epoch seconds, ``message_id`` the same for every attempt.
    """
    time = datetime.fromtimestamp(int(at), UTC)
    signatures = [Webhook(secret).sign(message_id, time, body) for secret in secrets_]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": " ".join(signatures),
    }


def verify_delivery(
    scheme: SignatureScheme,
    options: HmacSignature,
    secrets_: Sequence[str],
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float,
    tolerance: float,
) -> VerifiedDelivery:
    """Return what identifies a delivery whose signature is valid under one of ``secrets_``.

    ``headers`` have names in lower case. Raises :class:`SignatureError`.
    """
    match scheme:
        case "standard":
            return _verify_standard(secrets_, headers, body, now, tolerance)
        case "github":
            sent = _header(headers, "x-hub-signature-256").removeprefix("sha256=")
            _require_match([sent], [_hmac_hex(secret, body) for secret in secrets_])
            # GitHub signs neither the id nor a time, so the body itself identifies the delivery as well.
            return VerifiedDelivery((_id_key(_header(headers, "x-github-delivery")), _body_key(body)))
        case "stripe":
            return _verify_stripe(secrets_, headers, body, now, tolerance)
        case "hmac":
            return _verify_hmac(options, secrets_, headers, body, now, tolerance)


def _verify_standard(
    secrets_: Sequence[str], headers: Mapping[str, str], body: bytes, now: float, tolerance: float
) -> VerifiedDelivery:
    message_id, sent_at = _header(headers, "webhook-id"), _header(headers, "webhook-timestamp")
    time = _check_time(sent_at, now, tolerance)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise SignatureError("the body is not UTF-8") from error
    at = datetime.fromtimestamp(time, UTC)
    expected = [Webhook(secret).sign(message_id, at, text) for secret in secrets_]
    _require_match(_header(headers, "webhook-signature").split(" "), expected)
    return VerifiedDelivery((_id_key(message_id),))


def _verify_stripe(
    secrets_: Sequence[str], headers: Mapping[str, str], body: bytes, now: float, tolerance: float
) -> VerifiedDelivery:
    sent_at, signatures = "", list[str]()
    for element in _header(headers, "stripe-signature").split(",")[: 2 * MAX_SIGNATURES]:
        match = _STRIPE_ELEMENT.fullmatch(element.strip())
        if match is None:
            raise SignatureError("Stripe-Signature is malformed")
        if match[1] == "t" and not sent_at:
            sent_at = match[2]
        # Schemes other than v1 are not valid signatures: v0 is for tests.
        if match[1] == "v1":
            signatures.append(match[2])
    _check_time(sent_at, now, tolerance)
    signed = sent_at.encode() + b"." + body
    _require_match(signatures, [_hmac_hex(secret, signed) for secret in secrets_])
    return VerifiedDelivery((_id_in_body(body, "/id"),))


def _verify_hmac(
    options: HmacSignature,
    secrets_: Sequence[str],
    headers: Mapping[str, str],
    body: bytes,
    now: float,
    tolerance: float,
) -> VerifiedDelivery:
    signed = body
    if options.timestamp_header:
        sent_at = _header(headers, options.timestamp_header.lower())
        _check_time(sent_at, now, tolerance)
        signed = sent_at.encode() + b"." + body
    sent = _header(headers, options.header.lower())
    if not sent.startswith(options.prefix):
        raise SignatureError("the signature lacks its prefix")
    digests = [hmac.new(secret.encode(), signed, options.algorithm).digest() for secret in secrets_]
    is_hex = options.encoding == "hex"
    expected = [digest.hex() if is_hex else base64.b64encode(digest).decode() for digest in digests]
    _require_match([sent.removeprefix(options.prefix)], expected)
    if options.id_pointer:
        return VerifiedDelivery((_id_in_body(body, options.id_pointer),))
    if options.id_header:
        # The id in a header is not signed: whoever replays a delivery can change it, but not the signed bytes.
        return VerifiedDelivery((_id_key(_header(headers, options.id_header.lower())), _body_key(signed)))
    return VerifiedDelivery((_body_key(signed),))


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "")
    if not value:
        raise SignatureError(f"the header {name} is missing")
    return value


def _check_time(text: str, now: float, tolerance: float) -> int:
    if _TIME.fullmatch(text) is None or abs(now - int(text)) > tolerance:
        raise SignatureError("the time is missing, or too far from ours")
    return int(text)


def _require_match(sent: Sequence[str], expected: Sequence[str]) -> None:
    """Raise unless one of ``sent`` is one of ``expected``; how long it takes does not say which, or how nearly."""
    matches = 0
    for signature in sent[:MAX_SIGNATURES]:
        for own in expected:
            matches += hmac.compare_digest(signature.encode(), own.encode())
    if not matches:
        raise SignatureError("no signature matches")


def _hmac_hex(secret: str, signed: bytes) -> str:
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def _id_key(sender_id: str) -> str:
    if _ID.fullmatch(sender_id) is None:
        raise SignatureError("the sender's id is missing or malformed")
    return "id:" + hashlib.sha256(sender_id.encode()).hexdigest()


def _body_key(signed: bytes) -> str:
    return "body:" + hashlib.sha256(signed).hexdigest()


def _id_in_body(body: bytes, pointer: str) -> str:
    try:
        found, value = read_pointer(msgspec.json.decode(body), pointer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureError("the body is not JSON") from error
    if not found or not isinstance(value, str | int) or isinstance(value, bool):
        raise SignatureError("the sender's id is missing")
    return _id_key(str(value))
