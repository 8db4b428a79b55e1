"""Fuzz the verifier, guided by coverage: nothing but honest bearer strings may be accepted, and nothing may crash it.

The attacker knows every public thing and has the keys of two services, executor's and a stranger's. Run it with
``make fuzz``; it needs the extra ``fuzz``.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["octollm.capability", "octollm.contracts"]):
    from capability_forge import TrustDomain, dumps, jwk_of, sign, unb64

    from octollm.capability import CapabilityError, verify_directory, verify_service_token
    from octollm.capability.audit_chain import verify_checkpoint
    from octollm.capability.inspection import inspect

import json

WORLD = TrustDomain()
HONEST = WORLD.case().parts()
PAIR = WORLD.root_pair().bearer().split("~")
ACCEPTED = {"~".join(HONEST), "~".join(PAIR)}
ATTACKERS = [WORLD.keys["executor"].private, WORLD.keys["mallory"].private]
CLAIMS = [
    "iss", "sub", "cred", "tenant", "aud", "exp", "nbf", "iat", "jti", "task", "step", "attempt", "run", "prf", "scope",
    "call", "gnt", "cnf", "may", "crit", "x",
]  # fmt: skip
HEADERS = ["alg", "typ", "kid", "jwk", "crit", "jku", "b64", "x5c"]
TEXTS = [
    "orchestrator", "executor", "executor:run", "executor:*", "files:read", "EdDSA", "none", "HS256", "cap+jwt",
    "cap-grant+jwt", "", "*", "a:b", "alice", "acme", WORLD.root.thumbprint, WORLD.jkt("executor"),
]  # fmt: skip
VERIFIER = WORLD.verifier()


def value(fuzz: Any, depth: int = 0) -> object:
    """Return some JSON."""
    kind = fuzz.ConsumeIntInRange(0, 8 if depth < 3 else 5)
    if kind == 0:
        return fuzz.PickValueInList(TEXTS)
    if kind == 1:
        return fuzz.ConsumeUnicodeNoSurrogates(20)
    if kind == 2:
        return fuzz.ConsumeInt(8)
    if kind == 3:
        return 1_800_000_000 + fuzz.ConsumeIntInRange(-5000, 5000) / 10
    if kind == 4:
        return fuzz.ConsumeBool()
    if kind == 5:
        return None
    if kind == 6:
        return jwk_of(fuzz.PickValueInList(ATTACKERS))
    if kind == 7:
        return [value(fuzz, depth + 1) for _ in range(fuzz.ConsumeIntInRange(0, 3))]
    return {str(fuzz.PickValueInList(TEXTS)): value(fuzz, depth + 1) for _ in range(fuzz.ConsumeIntInRange(0, 3))}


def forged(fuzz: Any, part: str) -> str:
    """Return a part with header or claims changed, signed by an attacker or with the signature that it had."""
    head, body, signature = part.split(".")
    header: dict[str, Any] = json.loads(unb64(head))
    claims: dict[str, Any] = json.loads(unb64(body))
    for _ in range(fuzz.ConsumeIntInRange(1, 4)):
        where, names = (header, HEADERS) if fuzz.ConsumeIntInRange(0, 3) == 0 else (claims, CLAIMS)
        name = fuzz.PickValueInList(names)
        if fuzz.ConsumeIntInRange(0, 4) == 0:
            where.pop(name, None)
        else:
            where[name] = value(fuzz)
    key = fuzz.PickValueInList(ATTACKERS)
    if fuzz.ConsumeBool():
        header["jwk"] = jwk_of(key)
    made = sign(dumps(header), dumps(claims), key)
    return made if fuzz.ConsumeBool() else made.rpartition(".")[0] + "." + signature


def bearer_of(fuzz: Any) -> str:
    """Return a bearer string: honest parts, changed ones, or plain text, in any order."""
    pool = [*HONEST, *PAIR]
    parts: list[str] = list(HONEST) if fuzz.ConsumeBool() else list(PAIR)
    for _ in range(fuzz.ConsumeIntInRange(0, 4)):
        what = fuzz.ConsumeIntInRange(0, 6)
        place = fuzz.ConsumeIntInRange(0, max(0, len(parts) - 1))
        if what == 0 and parts:
            parts[place] = forged(fuzz, fuzz.PickValueInList(pool))
        elif what == 1 and parts:
            del parts[place]
        elif what == 2:
            parts.insert(place, fuzz.PickValueInList(pool))
        elif what == 3 and parts:
            other = fuzz.ConsumeIntInRange(0, len(parts) - 1)
            parts[place], parts[other] = parts[other], parts[place]
        elif what == 4 and parts:
            at = fuzz.ConsumeIntInRange(0, len(parts[place]))
            text = fuzz.ConsumeUnicode(fuzz.ConsumeIntInRange(0, 4))
            parts[place] = parts[place][:at] + text + parts[place][at + fuzz.ConsumeIntInRange(0, 4) :]
        elif what == 5:
            parts.insert(place, fuzz.ConsumeUnicode(40))
        elif parts:
            parts[place] = forged(fuzz, parts[place]) if parts[place].count(".") == 2 and parts[place] in pool else ""
    return "~".join(parts)


def one_input(data: bytes) -> None:
    """Try one input in everything that reads tokens."""
    fuzz = atheris.FuzzedDataProvider(data)
    kind = fuzz.ConsumeIntInRange(0, 9)
    text = fuzz.ConsumeUnicode(2000) if kind == 0 else bearer_of(fuzz)
    for accepts in (
        lambda: VERIFIER.verify(text),
        lambda: WORLD.verifier().verify(text),
        lambda: verify_service_token(text, "executor", {}, WORLD.clock),
        lambda: verify_directory(text, WORLD.roots, WORLD.clock),
        lambda: verify_checkpoint(text, WORLD.roots),
    ):
        try:
            accepts()
        except CapabilityError:
            continue
        if text not in ACCEPTED:
            raise AssertionError(f"accepted: {text!r}")
    with contextlib.suppress(CapabilityError):
        inspect(text)


def main() -> None:
    """Fuzz until libFuzzer's options say that it is enough."""
    for bearer in ACCEPTED:
        assert VERIFIER.verify(bearer)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
