"""Forged tokens, made from plain dictionaries, with no code of the package but its keys.

``TrustDomain.case()`` is an honest chain (root → coder → judge → executor) as editable parts. A test changes one thing,
has everything signed again with whatever keys the attacker has, and expects one reason.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from octollm.capability import (
    CapabilityError,
    Delegator,
    Principal,
    PublicKey,
    Revocations,
    RootMinter,
    SigningKey,
    TaskRef,
    Verifier,
)
from octollm.testing import ManualClock

NOW = 1_800_000_000.0
ALICE = Principal("alice", "key-1", "acme")
WORK = TaskRef("task-" + "0" * 31 + "1", "s1", 0, 3)
AUTO = object()
"""Stands for a claim or header that is filled in when it is signed."""

OUTER_CODES = {"token_missing", "token_malformed", "token_expired", "token_invalid", "token_revoked"}


class CountingIds:
    """Identifiers 1, 2, 3, … in hexadecimal."""

    def __init__(self) -> None:
        self._last = 0

    def hex(self) -> str:
        self._last += 1
        return f"{self._last:032x}"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def sha(text: str) -> str:
    return b64(hashlib.sha256(text.encode()).digest())


def jwk_of(key: Ed25519PrivateKey) -> dict[str, str]:
    return {"kty": "OKP", "crv": "Ed25519", "x": b64(key.public_key().public_bytes_raw())}


def thumbprint_of(key: Ed25519PrivateKey) -> str:
    return sha(json.dumps(jwk_of(key), sort_keys=True, separators=(",", ":")))


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def sign(header: dict[str, Any] | bytes, claims: dict[str, Any] | bytes, key: Ed25519PrivateKey) -> str:
    head = header if isinstance(header, bytes) else dumps(header)
    body = claims if isinstance(claims, bytes) else dumps(claims)
    signing_input = f"{b64(head)}.{b64(body)}"
    return f"{signing_input}.{b64(key.sign(signing_input.encode()))}"


@dataclass
class Token:
    """A token to be signed. ``header`` and ``claims`` may be edited; ``raw`` replaces the text of it whole."""

    claims: dict[str, Any]
    header: dict[str, Any]
    key: Ed25519PrivateKey
    raw: Callable[[Token], str] | None = None

    def render(self) -> str:
        return sign(self.header, self.claims, self.key) if self.raw is None else self.raw(self)


@dataclass
class Case:
    """The bearer string that judge sends to executor, part by part."""

    access: Token
    coder: Token
    judge: Token
    own: Token | None
    shuffle: Callable[[list[str]], list[str]] = field(default=lambda parts: parts)

    def parts(self) -> list[str]:
        """Sign from the root down, filling in what is ``AUTO``."""
        coder = self.coder.render()
        self._fill(self.judge, "prf", coder)
        judge = self.judge.render()
        texts = [coder, judge]
        if self.own is not None:
            self._fill(self.own, "prf", judge)
            texts.append(self.own.render())
        self._fill(self.access, "prf", judge)
        self._fill(self.access, "gnt", texts[-1])
        return [self.access.render(), *texts]

    def bearer(self) -> str:
        return "~".join(self.shuffle(self.parts()))

    @staticmethod
    def _fill(token: Token, claim: str, text: str) -> None:
        if token.claims.get(claim) is AUTO:
            token.claims[claim] = sha(text)


class TrustDomain:
    """A root, the keys of some services, and a clock."""

    services = ("coder", "judge", "executor", "models", "memory", "orchestrator", "mallory")

    def __init__(self) -> None:
        self.clock = ManualClock(NOW)
        self.ids = CountingIds()
        self.root = SigningKey.generate("orchestrator")
        self.keys = {name: SigningKey.generate(name) for name in self.services}
        self.roots: dict[str, PublicKey] = {self.root.thumbprint: self.root.public}
        self.remint()

    def remint(self) -> None:
        """Mint by the root key that is here now."""
        self.minter = RootMinter(self.root, self.clock, self.ids)

    def verifier(self, audience: str = "executor", revocations: Revocations | None = None) -> Verifier:
        return Verifier(audience, self.roots, self.clock, revocations=revocations)

    def delegator(self, name: str) -> Delegator:
        return Delegator(self.keys[name], name, self.clock, self.ids)

    def jkt(self, name: str) -> str:
        return self.keys[name].thumbprint

    def claims(self, iss: str, aud: str, life: float, jti: str) -> dict[str, Any]:
        return {
            "iss": iss,
            "sub": ALICE.sub,
            "cred": ALICE.cred,
            "tenant": ALICE.tenant,
            "aud": aud,
            "exp": NOW + life,
            "nbf": NOW,
            "iat": NOW,
            "jti": jti,
            "task": WORK.task,
            "step": WORK.step,
            "attempt": WORK.attempt,
            "run": WORK.run,
        }

    def case(self) -> Case:
        """Return the honest chain. coder may ask judge, which may have executor run code, which may read files."""
        root, coder, judge = (key.private for key in (self.root, self.keys["coder"], self.keys["judge"]))
        below: dict[str, Any] = {"executor:run": {"files:read": {}}}
        return Case(
            coder=Token(
                {
                    **self.claims("orchestrator", "coder", 600, "g-coder"),
                    "cnf": {"jkt": self.jkt("coder")},
                    "may": {"judge:validate": copy.deepcopy(below), "models:chat": {}},
                },
                {"alg": "EdDSA", "typ": "cap-grant+jwt", "kid": self.root.thumbprint},
                root,
            ),
            judge=Token(
                {
                    **self.claims("coder", "judge", 500, "g-judge"),
                    "prf": AUTO,
                    "cnf": {"jkt": self.jkt("judge")},
                    "may": copy.deepcopy(below),
                },
                {"alg": "EdDSA", "typ": "cap-grant+jwt", "jwk": jwk_of(coder)},
                coder,
            ),
            own=Token(
                {
                    **self.claims("judge", "executor", 400, "g-executor"),
                    "prf": AUTO,
                    "cnf": {"jkt": self.jkt("executor")},
                    "may": {"files:read": {}},
                },
                {"alg": "EdDSA", "typ": "cap-grant+jwt", "jwk": jwk_of(judge)},
                judge,
            ),
            access=Token(
                {
                    **self.claims("judge", "executor", 60, "a-executor"),
                    "scope": "executor:run",
                    "prf": AUTO,
                    "gnt": AUTO,
                },
                {"alg": "EdDSA", "typ": "cap+jwt", "jwk": jwk_of(judge)},
                judge,
            ),
        )

    def root_pair(self) -> Case:
        """Return an honest bearer string without proofs as a case: root → executor, with a grant."""
        case = self.case()
        root = self.root.private
        for token, typ in ((case.access, "cap+jwt"), (case.own, "cap-grant+jwt")):
            assert token is not None
            token.claims["iss"] = "orchestrator"
            del token.claims["prf"]
            token.header = {"alg": "EdDSA", "typ": typ, "kid": self.root.thumbprint}
            token.key = root
        case.shuffle = lambda parts: [parts[0], parts[3]]
        return case


def refused(verifier: Verifier, bearer: str | None) -> str:
    """Return the reason for which ``bearer`` is refused; fail the test if it is not."""
    with pytest.raises(CapabilityError) as caught:
        verifier.verify(bearer)
    assert caught.value.code in OUTER_CODES
    return caught.value.reason
