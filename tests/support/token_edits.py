"""What an attacker may do to a bearer string: one change at a time, and the reason for which it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from capability_forge import NOW, Case, TrustDomain, b64, jwk_of

Edit = Callable[[TrustDomain, Case], None]

# Each edit makes one thing wrong; the attacker signs again with the keys that the part's minter has.


def _set(part: str, **claims: Any) -> Edit:
    def edit(_: TrustDomain, case: Case) -> None:
        getattr(case, part).claims.update(claims)

    return edit


def _drop(part: str, claim: str) -> Edit:
    def edit(_: TrustDomain, case: Case) -> None:
        del getattr(case, part).claims[claim]

    return edit


def _header(part: str, **members: Any) -> Edit:
    def edit(_: TrustDomain, case: Case) -> None:
        getattr(case, part).header.update(members)

    return edit


def _kid_for_jwk(part: str) -> Edit:
    def edit(domain: TrustDomain, case: Case) -> None:
        token = getattr(case, part)
        del token.header["jwk"]
        token.header["kid"] = domain.root.thumbprint

    return edit


def _bare_header(part: str) -> Edit:
    def edit(_: TrustDomain, case: Case) -> None:
        getattr(case, part).header.pop("jwk", None)
        getattr(case, part).header.pop("kid", None)

    return edit


def _signed_by(part: str, name: str, *, own_jwk: bool) -> Edit:
    def edit(domain: TrustDomain, case: Case) -> None:
        token = getattr(case, part)
        token.key = domain.keys[name].private
        if own_jwk:
            token.header["jwk"] = jwk_of(token.key)

    return edit


def root_by_mallory(domain: TrustDomain, case: Case) -> None:
    case.coder.key = domain.keys["mallory"].private


def _root_with_mallorys_kid(domain: TrustDomain, case: Case) -> None:
    case.coder.key = domain.keys["mallory"].private
    case.coder.header["kid"] = domain.jkt("mallory")


def _root_with_mallorys_jwk(domain: TrustDomain, case: Case) -> None:
    case.coder.key = domain.keys["mallory"].private
    case.coder.header["jwk"] = jwk_of(case.coder.key)


def _extra_jwk_member(_: TrustDomain, case: Case) -> None:
    case.access.header["jwk"] = {**case.access.header["jwk"], "use": "sig"}


def _private_jwk(_: TrustDomain, case: Case) -> None:
    secret = b64(case.access.key.private_bytes_raw())
    case.access.header["jwk"] = {**case.access.header["jwk"], "d": secret}


def _symmetric_jwk(_: TrustDomain, case: Case) -> None:
    case.access.header["jwk"] = {"kty": "oct", "k": "c2VjcmV0"}


def _loose_jwk(_: TrustDomain, case: Case) -> None:
    x = case.access.header["jwk"]["x"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    case.access.header["jwk"]["x"] = x[:-1] + alphabet[alphabet.index(x[-1]) + 1]


EDITS: list[tuple[str, Edit, str]] = [
    # Algorithms and types
    ("alg none", _header("access", alg="none"), "algorithm_refused"),
    ("alg None", _header("access", alg="None"), "algorithm_refused"),
    ("alg HS256", _header("access", alg="HS256"), "algorithm_refused"),
    ("alg ES256", _header("coder", alg="ES256"), "algorithm_refused"),
    ("alg in another case", _header("access", alg="eddsa"), "algorithm_refused"),
    ("alg by curve", _header("judge", alg="Ed25519"), "algorithm_refused"),
    ("alg null", _header("access", alg=None), "json_malformed"),
    ("alg a list", _header("access", alg=["EdDSA"]), "header_malformed"),
    ("a grant for an access token", _header("access", typ="cap-grant+jwt"), "type_wrong"),
    ("an access token for a grant", _header("own", typ="cap+jwt"), "type_wrong"),
    ("a service token for an access token", _header("access", typ="svc+jwt"), "type_wrong"),
    ("a plain JWT", _header("access", typ="JWT"), "type_wrong"),
    ("typ with a prefix", _header("access", typ="application/cap+jwt"), "type_wrong"),
    # Headers that ask for something
    ("crit", _header("access", crit=["exp"]), "header_malformed"),
    ("crit, empty", _header("coder", crit=[]), "header_malformed"),
    ("b64 false", _header("access", b64=False, crit=["b64"]), "header_malformed"),
    ("jku", _header("access", jku="https://example.org/keys"), "header_malformed"),
    ("x5u", _header("judge", x5u="https://example.org/cert"), "header_malformed"),
    ("x5c", _header("access", x5c=["AA"]), "header_malformed"),
    ("zip", _header("access", zip="DEF"), "header_malformed"),
    ("cty", _header("access", cty="JWT"), "header_malformed"),
    ("kid that is a path", _header("coder", kid="../../dev/null"), "header_malformed"),
    # Keys
    ("a root token by another key", root_by_mallory, "signature_invalid"),
    ("a root token by an unknown root", _root_with_mallorys_kid, "root_unknown"),
    ("a root token that brings its key", _root_with_mallorys_jwk, "key_unexpected"),
    ("a root token without a key's name", _bare_header("coder"), "key_missing"),
    ("a delegated token by another key", _signed_by("access", "mallory", own_jwk=False), "signature_invalid"),
    ("a delegated token with another jwk", _signed_by("access", "mallory", own_jwk=True), "key_mismatch"),
    ("a delegated grant with another jwk", _signed_by("judge", "mallory", own_jwk=True), "key_mismatch"),
    ("the callee signs for its caller", _signed_by("access", "executor", own_jwk=True), "key_mismatch"),
    ("the caller's caller signs", _signed_by("access", "coder", own_jwk=True), "key_mismatch"),
    ("a delegated token named by the root's kid", _kid_for_jwk("access"), "key_unexpected"),
    ("a delegated token with kid and jwk", _header("access", kid="A" * 43), "key_unexpected"),
    ("a delegated token without a key", _bare_header("access"), "key_missing"),
    ("a jwk with one more member", _extra_jwk_member, "header_malformed"),
    ("a jwk with the private half", _private_jwk, "header_malformed"),
    ("a symmetric jwk", _symmetric_jwk, "header_malformed"),
    ("a jwk of loose base64", _loose_jwk, "base64_malformed"),
    # Claims
    ("aud of another service", _set("access", aud="models", scope="models:chat"), "audience_wrong"),
    ("aud a list", _set("access", aud=["executor", "models"]), "claims_malformed"),
    ("aud a host", _set("access", aud="http://executor:8101"), "claims_malformed"),
    ("an own grant for another service", _set("own", aud="models"), "audience_wrong"),
    ("issued in another's name", _set("access", iss="orchestrator"), "issuer_wrong"),
    ("a grant in another's name", _set("judge", iss="judge"), "issuer_wrong"),
    ("a root grant in another's name", _set("coder", iss="coder"), "issuer_wrong"),
    ("another subject", _set("access", sub="bob"), "subject_differs"),
    ("another subject in the own grant", _set("own", sub="bob"), "subject_differs"),
    ("another subject in a proof", _set("judge", sub="bob"), "subject_differs"),
    ("another credential", _set("access", cred="key-2"), "subject_differs"),
    ("another credential in the own grant", _set("own", cred="key-2"), "subject_differs"),
    ("another tenant", _set("access", tenant="evil"), "subject_differs"),
    ("another tenant in the own grant", _set("own", tenant="evil"), "subject_differs"),
    ("another task", _set("access", task="task-" + "f" * 32), "task_differs"),
    ("another task in the own grant", _set("own", task="task-" + "f" * 32), "task_differs"),
    ("another step", _set("access", step="s2"), "task_differs"),
    ("another attempt", _set("access", attempt=1), "task_differs"),
    ("another attempt in the own grant", _set("own", attempt=1), "task_differs"),
    ("another run", _set("access", run=4), "task_differs"),
    ("another run in the own grant", _set("own", run=4), "task_differs"),
    ("no run", _drop("access", "run"), "task_differs"),
    ("no step", _drop("access", "step"), "claims_malformed"),
    ("no task", _drop("access", "task"), "claims_malformed"),
    ("no expiry", _drop("access", "exp"), "claims_malformed"),
    ("no not-before", _drop("own", "nbf"), "claims_malformed"),
    ("no issue time", _drop("judge", "iat"), "claims_malformed"),
    ("no id", _drop("access", "jti"), "claims_malformed"),
    ("no scope", _drop("access", "scope"), "claims_malformed"),
    ("no confirmation", _drop("judge", "cnf"), "claims_malformed"),
    ("no tree", _drop("judge", "may"), "claims_malformed"),
    ("expiry as text", _set("access", exp=str(NOW + 60)), "claims_malformed"),
    ("expiry true", _set("access", exp=True), "claims_malformed"),
    ("expiry without end", _set("access", exp=1e300), "claims_malformed"),
    ("expiry negative", _set("access", exp=-1), "claims_malformed"),
    ("a claim that is not known", _set("access", admin=True), "claims_malformed"),
    ("a grant's claim in an access token", _set("access", may={"files:*": {}}), "claims_malformed"),
    ("an access token's claim in a grant", _set("own", scope="files:read"), "claims_malformed"),
    ("more in the confirmation", _set("own", cnf={"jkt": "A" * 43, "jwk": {}}), "claims_malformed"),
    ("a null claim", _set("access", call=None), "json_malformed"),
    ("a subject with a line break", _set("access", sub="alice\n"), "claims_malformed"),
    ("a jti with a line break", _set("access", jti="a-executor\n"), "claims_malformed"),
    ("a lone surrogate", _set("access", sub="\ud800"), "claims_malformed"),
    # Scopes and trees
    ("a wider scope", _set("access", scope="executor:*"), "scope_exceeds_parent"),
    ("another operation", _set("access", scope="executor:http"), "scope_exceeds_parent"),
    ("one scope too many", _set("access", scope="executor:run executor:http"), "scope_exceeds_parent"),
    ("a scope from deeper in the tree", _set("access", scope="executor:run files:read"), "scope_foreign"),
    ("a scope of another service", _set("access", scope="executor:run models:chat"), "scope_foreign"),
    ("an empty scope", _set("access", scope=""), "claims_malformed"),
    ("a malformed scope", _set("access", scope="executor:run*"), "claims_malformed"),
    ("two spaces", _set("access", scope="executor:run  executor:run:x"), "claims_malformed"),
    ("scope a list", _set("access", scope=["executor:run"]), "claims_malformed"),
    ("a wider own grant", _set("own", may={"files:*": {}}), "may_exceeds_scope"),
    ("one entry more in the own grant", _set("own", may={"files:read": {}, "models:chat": {}}), "may_exceeds_scope"),
    ("one level more in the own grant", _set("own", may={"files:read": {"a:b": {}}}), "may_exceeds_scope"),
    ("an empty own grant", _set("own", may={}), "may_empty"),
    (
        "a sibling's authority",
        _set("judge", may={"executor:run": {"files:read": {}}, "models:chat": {}}),
        "may_exceeds_parent",
    ),
    ("the parent's whole tree", _set("judge", may={"judge:validate": {"executor:run": {}}}), "may_exceeds_parent"),
    ("a wider proof", _set("judge", may={"executor:*": {"files:read": {}}}), "may_exceeds_parent"),
    ("a deeper proof", _set("judge", may={"executor:run": {"files:read": {"a:b": {}}}}), "may_exceeds_parent"),
    ("a tree that is a list", _set("own", may=["files:read"]), "claims_malformed"),
    ("a tree of text", _set("own", may={"files:read": "*"}), "claims_malformed"),
    # Time
    ("access outlives its grant", _set("access", exp=NOW + 501), "outlives_parent"),
    ("own grant outlives its parent", _set("own", exp=NOW + 501), "outlives_parent"),
    ("proof outlives its parent", _set("judge", exp=NOW + 601), "outlives_parent"),
    ("older than its parent", _set("access", iat=NOW - 31), "older_than_parent"),
    ("a grant of more than an hour", _set("coder", exp=NOW + 3_601), "lives_too_long"),
    ("an access token that has expired", _set("access", exp=NOW - 30), "expired"),
    ("an own grant that has expired", _set("own", exp=NOW - 30), "expired"),
    ("not valid yet", _set("access", nbf=NOW + 30.001), "not_yet_valid"),
    ("from the future", _set("access", iat=NOW + 30.001), "issued_in_future"),
    ("a proof from the future", _set("judge", iat=NOW + 30.001), "issued_in_future"),
    # Links
    ("gnt of another grant", _set("access", gnt="A" * 43), "grant_mismatch"),
    ("gnt missing", _drop("access", "gnt"), "proof_mismatch"),
    ("prf of another grant", _set("access", prf="A" * 43), "proof_mismatch"),
    ("prf missing in the access token", _drop("access", "prf"), "proof_mismatch"),
    ("prf missing in a proof", _drop("judge", "prf"), "part_unused"),
    ("prf of another grant in a proof", _set("judge", prf="A" * 43), "proof_mismatch"),
    ("own grant under another", _set("own", prf="A" * 43), "proof_mismatch"),
    ("own grant under nothing", _drop("own", "prf"), "proof_mismatch"),
    ("prf at the root", _set("coder", prf="A" * 43), "proof_mismatch"),
]


NARROWINGS: list[tuple[str, Edit]] = [
    ("a narrower scope", _set("access", scope="executor:run:x")),
    ("two narrower scopes", _set("access", scope="executor:run:x executor:run:y")),
    ("a narrower own grant", _set("own", may={"files:read:0a": {}})),
    ("narrower proofs", _set("judge", may={"executor:run": {"files:read": {}, "files:read:0a": {}}})),
    ("shorter life", _set("access", exp=NOW + 1)),
    ("as long a life as its grant's", _set("access", exp=NOW + 500)),
    ("expired within the skew", _set("access", exp=NOW - 29.999)),
    ("not valid yet within the skew", _set("access", nbf=NOW + 30)),
    ("from a clock that is ahead", _set("access", iat=NOW + 30)),
    ("from a clock that is behind", _set("access", iat=NOW - 30)),
    ("the digest of the call", _set("access", call="0" * 64)),
    ("times without fractions", _set("access", exp=int(NOW) + 60, nbf=int(NOW), iat=int(NOW))),
    ("a grant of an hour", _set("coder", exp=NOW + 3_600)),
]


SHUFFLES: list[tuple[str, Callable[[list[str]], list[str]], set[str]]] = [
    ("own grant cut", lambda p: p[:3], {"grant_mismatch"}),
    ("last proof cut", lambda p: [p[0], p[1], p[3]], {"proof_mismatch"}),
    ("root proof cut", lambda p: [p[0], p[2], p[3]], {"proof_mismatch"}),
    ("all grants cut", lambda p: p[:1], {"grant_mismatch"}),
    ("proofs swapped", lambda p: [p[0], p[2], p[1], p[3]], {"proof_mismatch"}),
    ("own grant first", lambda p: [p[0], p[3], p[1], p[2]], {"grant_mismatch"}),
    ("access token last", lambda p: [*p[1:], p[0]], {"type_wrong"}),
    ("root proof twice", lambda p: [p[0], p[1], p[1], p[2], p[3]], {"part_unused"}),
    ("own grant twice", lambda p: [*p, p[3]], {"proof_mismatch"}),
    ("access token twice", lambda p: [p[0], *p], {"type_wrong"}),
    ("a part without text", lambda p: [*p, ""], {"bearer_malformed"}),
    ("an empty first part", lambda p: ["", *p], {"bearer_malformed"}),
    ("nine parts", lambda p: [*p, *p, p[0]], {"too_many_parts"}),
]
