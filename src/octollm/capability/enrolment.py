"""Enrolment of an arm: mutual proof by HMAC (RFC 2104) over a nonce.

The enrolment token is derived from the root key (HKDF, RFC 5869). It is never sent, and the orchestrator never stores
it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from octollm.capability.errors import CapabilityError
from octollm.capability.grants import DeclaredCall
from octollm.capability.jose import SigningKey, b64decode, b64encode
from octollm.capability.keyring import KeyRing
from octollm.capability.scopes import Scope
from octollm.contracts.declarations import OPTIONAL_MARK
from octollm.contracts.services import ORCHESTRATOR_FAMILIES, SERVICES
from octollm.errors import OctoError

ENROLMENT_TOKEN_PREFIX = "octojoin_"  # noqa: S105  a prefix, no secret
"""The prefix of an enrolment token."""
NONCE_SECONDS = 60.0
"""How long a nonce may be used, once."""
MAX_CALLS = 32
"""Most direct calls that an arm may declare."""

_SEGMENT = re.compile(r"[a-z0-9._-]{1,64}")
_TOKEN_PATTERN = re.compile(rf"{ENROLMENT_TOKEN_PREFIX}([0-9a-f]{{32}})_([A-Za-z0-9_-]{{43}})")
_ID = re.compile(r"[0-9a-f]{32}")
_RESERVED = frozenset(SERVICES) | {info.host for info in SERVICES.values()} | ORCHESTRATOR_FAMILIES | {"octollm"}
_CALLABLE_SERVICES = (frozenset(SERVICES) | {"files"}) - {"orchestrator", "reflex"}
_SUBTASK_CALLS = frozenset({"tasks:create", "tasks:read", "tasks:cancel"})
"""What an arm may call for its sub-tasks. To approve or steer tasks is left to people."""
_MAC_BYTES = 16
_STAMP_BYTES = 8


@dataclass(frozen=True, slots=True)
class EnrolmentTerms:
    """What an enrolment token admits: one name, at most these calls, until ``expires`` (whole epoch seconds)."""

    id: str
    name: str
    calls: tuple[str, ...]
    expires: int


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """An enrolment token as the arm holds it."""

    id: str
    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Parse an enrolment token; raise ``join_refused`` for any other text."""
        match = _TOKEN_PATTERN.fullmatch(text)
        if match is None:
            raise OctoError(
                "That is not an enrolment token; create one with `octollm keys enrol`.", code="join_refused"
            )
        try:
            return cls(match[1], b64decode(match[2]))
        except CapabilityError:
            raise OctoError(
                "The enrolment token is damaged or incomplete; copy all of it.", code="join_refused"
            ) from None

    def __str__(self) -> str:
        return f"{ENROLMENT_TOKEN_PREFIX}{self.id}_***"


@dataclass(frozen=True, slots=True)
class EnrolmentClaim:
    """The terms of one enrolment, which both proofs cover."""

    nonce: str
    name: str
    thumbprint: str
    """RFC 7638 name of the arm's key."""
    calls: tuple[str, ...]


def arm_proof(key: bytes, claim: EnrolmentClaim) -> str:
    """Return the arm's proof that it knows the token and means ``claim``."""
    return _mac(key, "octollm join proof v1", _claim_parts(claim))


def root_proof(key: bytes, claim: EnrolmentClaim, roots: Iterable[str]) -> str:
    """Return the orchestrator's proof that it knows the token and that ``roots`` (thumbprints) are its root keys."""
    return _mac(key, "octollm join answer v1", [*_claim_parts(claim), *sorted(roots)])


def rotation_message(name: str, thumbprint: str) -> bytes:
    """Return the message that a new key of the arm ``name`` signs to prove possession of its private half."""
    return _encoded(["octollm key rotation v1", name, thumbprint])


def proofs_match(one: str, other: str) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


class EnrolmentTokenIssuer:
    """Derives enrolment tokens and creates nonces. Replicas with the same root keys agree without storing either.

    During a rotation of root keys, the tokens of an older key are valid for as long as that key is trusted.
    """

    def __init__(self, root: SigningKey | KeyRing) -> None:
        self._ring = KeyRing.of(root)

    def derive_token(self, terms: EnrolmentTerms, now: float) -> str:
        """Return the text of the enrolment token for ``terms``."""
        return f"{ENROLMENT_TOKEN_PREFIX}{terms.id}_{b64encode(_secret_of(self._ring.signing_key(now), terms))}"

    def derive_keys(self, terms: EnrolmentTerms, now: float) -> list[bytes]:
        """Return the 32-byte keys that the token may have, one per trusted root key."""
        return [_secret_of(root, terms) for root in self._roots(now)]

    def create_nonce(self, unique: str, now: float) -> str:
        """Return a nonce that is valid until :data:`NONCE_SECONDS` after ``now``; ``unique`` is an id, in hex."""
        body = bytes.fromhex(unique) + int((now + NONCE_SECONDS) * 1000).to_bytes(_STAMP_BYTES)
        return b64encode(body + _nonce_mac(self._ring.signing_key(now), body))

    def is_valid_nonce(self, nonce: str, now: float) -> bool:
        """Return whether this installation made the nonce and it has not expired; the caller checks for reuse."""
        try:
            raw = b64decode(nonce)
        except CapabilityError:
            return False
        body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if len(body) != _MAC_BYTES + _STAMP_BYTES:
            return False
        # Any trusted root counts, so that a nonce outlives the rotation of the root key.
        if not any(hmac.compare_digest(mac, _nonce_mac(root, body)) for root in self._roots(now)):
            return False
        remaining = int.from_bytes(body[-_STAMP_BYTES:]) / 1000 - now
        return 0 < remaining <= NONCE_SECONDS

    def _roots(self, now: float) -> list[SigningKey]:
        keys = (self._ring.find(thumbprint) for thumbprint in self._ring.trusted_keys(now))
        return [key for key in keys if key is not None]


def is_enrolment_id(text: str) -> bool:
    """Return whether ``text`` has the form of an enrolment token's id."""
    return _ID.fullmatch(text) is not None


def check_arm_name(name: str) -> None:
    """Raise ``invalid_body``, with the rule, unless a custom arm may have this name."""
    if _SEGMENT.fullmatch(name) is None or not name[0].isalpha():
        raise OctoError(
            "An arm's name begins with a letter and has up to 64 characters of a-z, 0-9, '.', '_' and '-'.",
            code="invalid_body",
        )
    if name in _RESERVED:
        raise OctoError(f"The name {name} belongs to the installation itself; choose another.", code="invalid_body")


def check_operation_name(name: str) -> None:
    """Raise ``invalid_body`` unless ``name`` is one segment of a scope."""
    if _SEGMENT.fullmatch(name) is None:
        raise OctoError(
            f"An operation's name has only a-z, 0-9, '.', '_' and '-'; {name!r} does not.", code="invalid_body"
        )


def parse_declared_calls(calls: Sequence[str]) -> tuple[DeclaredCall, ...]:
    """Parse the direct calls that an arm declares; one that begins with ``?`` is optional.

    A call is a plain ``<service>:<operation>`` of a working service or of another arm: never of the orchestrator's
    administration (tasks, keys, arms, audit…), and never a wildcard. Raises ``invalid_body``.
    """
    if len(calls) > MAX_CALLS:
        raise OctoError(f"An arm has at most {MAX_CALLS} direct calls.", code="invalid_body")
    declared: dict[str, DeclaredCall] = {}
    for text in calls:
        scope = text.removeprefix(OPTIONAL_MARK)
        _check_call(scope)
        declared.setdefault(scope, DeclaredCall(scope, optional=text.startswith(OPTIONAL_MARK)))
    # Sorted, because the proofs of both sides cover the calls and need them in one order.
    return tuple(declared[scope] for scope in sorted(declared))


def scopes_of(calls: Iterable[DeclaredCall]) -> tuple[str, ...]:
    """Return the scopes of calls, the form that terms and proofs use."""
    return tuple(call.scope for call in calls)


def _check_call(text: str) -> None:
    try:
        scope = Scope(text)
    except CapabilityError:
        scope = None
    if scope is None or scope.text.count(":") != 1 or scope.text.endswith("*"):
        raise OctoError(
            f"A call is one operation of one service, like retriever:search; {text[:80]!r} is not.", code="invalid_body"
        )
    if scope.family in _RESERVED and scope.family not in _CALLABLE_SERVICES and text not in _SUBTASK_CALLS:
        allowed = ", ".join(sorted(_CALLABLE_SERVICES | _SUBTASK_CALLS))
        raise OctoError(
            f"{text} is not for arms: they may call {allowed}, and other custom arms.",
            code="invalid_body",
        )


def _claim_parts(claim: EnrolmentClaim) -> list[str]:
    # The number of calls separates them from what follows, so that no two claims have the same encoding.
    return [claim.nonce, claim.name, claim.thumbprint, str(len(claim.calls)), *claim.calls]


def _mac(key: bytes, purpose: str, parts: Sequence[str]) -> str:
    return b64encode(hmac.digest(key, _encoded([purpose, *parts]), hashlib.sha256))


def _encoded(parts: Sequence[str]) -> bytes:
    """Return ``parts`` with length prefixes, so that no two lists have the same encoding."""
    raw = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(4) + part for part in raw)


def _secret_of(root: SigningKey, terms: EnrolmentTerms) -> bytes:
    secrets = _derive_key(root.private.private_bytes_raw(), b"octollm join secrets v1")
    parts = [terms.id, terms.name, str(terms.expires), *terms.calls]
    return hmac.digest(secrets, _encoded(parts), hashlib.sha256)


def _nonce_mac(root: SigningKey, body: bytes) -> bytes:
    nonces = _derive_key(root.private.private_bytes_raw(), b"octollm join nonces v1")
    return hmac.digest(nonces, body, hashlib.sha256)[:_MAC_BYTES]


def _derive_key(seed: bytes, purpose: bytes) -> bytes:
    # RFC 5869 section 3.1: no salt is needed, since the seed is 32 uniform bytes; ``purpose`` separates the keys.
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(seed)
