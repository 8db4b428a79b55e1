"""Logins of OpenID Connect issuers: what is believed, what it grants, and every way to bend it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octollm.clock import SystemClock
from octollm.contracts.auth import LoginCode
from octollm.errors import OctoError, SettingError
from octollm.rpc.egress import EgressClient, EgressPolicy
from octollm.rpc.external import ExternalClient
from octollm.rpc.transport import listen, serve_app
from octollm.services.orchestrator import oidc as oidc_module
from octollm.services.orchestrator.oidc import (
    GrantRule,
    Issuer,
    OidcClient,
    load_client_secret,
    load_issuers,
    map_claims_to_name,
    map_claims_to_principal,
    map_claims_to_scopes,
)
from octollm.telemetry import Metrics, get_logger

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
NOW = 1_800_000_000


class SettableClock(SystemClock):
    time = float(NOW)
    ahead = 0.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def jwk(key: Any, kid: str, **more: str) -> dict[str, Any]:
    algorithm = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    for kind, made in algorithm.items():
        if isinstance(key, kind):
            return {**json.loads(made.to_jwk(key.public_key())), "kid": kid, "use": "sig", **more}
    raise AssertionError(key)


@dataclass
class Provider:
    """An issuer over real HTTP whose answers a test sets."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    claims_to_be: str = ""
    asked: int = 0
    codes: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    authorized: list[str] = field(default_factory=list[str])
    redeemed: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    status: int = 200
    body: bytes | None = None
    keys_url: str = ""

    async def discovery(self, request: Request) -> Response:
        if self.body is not None:
            return Response(self.body, self.status)
        places = {
            "jwks_uri": self.keys_url or f"{self.url}/keys",
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
        }
        return JSONResponse({"issuer": self.claims_to_be or self.url, **places}, self.status)

    async def token(self, request: Request) -> Response:
        """Redeem a code as RFC 7636 has it: the verifier must hash to the challenge that came with the code."""
        form = dict(parse_qsl((await request.body()).decode()))
        self.redeemed.append(form)
        self.authorized.append(request.headers.get("authorization", ""))
        challenge, token = self.codes.pop(form["code"], ("", ""))
        hashed = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        if not token or hashed != challenge or form["redirect_uri"] != BACK or form["client_id"] != "octollm":
            return JSONResponse({"error": "invalid_grant"}, 400)
        return JSONResponse({"id_token": token, "access_token": "x", "token_type": "Bearer"})

    async def jwks(self, _request: Request) -> Response:
        self.asked += 1
        return JSONResponse({"keys": self.keys})


@dataclass
class OidcKit:
    provider: Provider
    oidc: OidcClient
    issuer: Issuer
    clock: SettableClock

    def claims(self, **more: Any) -> dict[str, Any]:
        claims = {
            "iss": self.provider.url,
            "aud": "octollm",
            "sub": "ada",
            "exp": NOW + 300,
            "iat": NOW,
            "groups": ["staff"],
            **more,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, key: Any = RSA, alg: str = "RS256", header: dict[str, Any] | None = None, **claims: Any) -> str:
        return jwt.encode(self.claims(**claims), key, algorithm=alg, headers={"kid": "rsa", **(header or {})})


@contextlib.asynccontextmanager
async def world_of(**changes: Any) -> AsyncGenerator[OidcKit]:
    clock, provider = SettableClock(), Provider()
    provider.keys = [jwk(RSA, "rsa", alg="RS256"), jwk(EC, "ec", alg="ES256"), jwk(ED, "ed", alg="EdDSA")]
    app = Starlette(
        routes=[
            Route("/.well-known/openid-configuration", provider.discovery),
            Route("/keys", provider.jwks),
            Route("/token", provider.token, methods=["POST"]),
        ]
    )
    bound = listen("127.0.0.1", 0, "issuer")
    provider.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    issuer = Issuer(provider.url, "octollm", (GrantRule("groups", "staff", "user"),), tenant="acme", **changes)
    outside = ExternalClient("orchestrator", provider.url, clock=clock, metrics=Metrics("t"), log=get_logger("t"))
    async with serve_app(app, bound), EgressClient(EgressPolicy.of([provider.url])) as http:
        yield OidcKit(provider, OidcClient([issuer], http, {provider.url: outside}, clock), issuer, clock)


@pytest.fixture
async def oidc_kit() -> AsyncGenerator[OidcKit]:
    async with world_of() as found:
        yield found


async def refused(oidc_kit: OidcKit, token: str) -> bool:
    with pytest.raises(OctoError) as caught:
        await oidc_kit.oidc.verify(token)
    return caught.value.code == "api_key_invalid"


@pytest.mark.parametrize(("key", "alg", "kid"), [(RSA, "RS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")])
async def test_a_good_login_is_believed(oidc_kit: OidcKit, key: Any, alg: str, kid: str) -> None:
    issuer, claims = await oidc_kit.oidc.verify(oidc_kit.token(key, alg, {"kid": kid}))
    assert issuer is oidc_kit.issuer
    assert claims["sub"] == "ada"


def by_hmac(secret: bytes) -> Callable[[OidcKit], str]:
    def make(oidc_kit: OidcKit) -> str:
        def b64(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        text = (
            f"{b64(json.dumps({'alg': 'HS256', 'kid': 'rsa'}).encode())}.{b64(json.dumps(oidc_kit.claims()).encode())}"
        )
        return f"{text}.{b64(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"

    return make


PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
BENT: list[tuple[str, Callable[[OidcKit], str]]] = [
    ("another key", lambda w: w.token(OTHER)),
    ("a key that is not there", lambda w: w.token(header={"kid": "other"})),
    ("alg none", lambda w: jwt.encode(w.claims(), None, algorithm="none", headers={"kid": "rsa"})),
    ("HMAC with the public key", by_hmac(PEM)),
    ("another algorithm of the same key", lambda w: w.token(RSA, "PS256")),
    ("an algorithm that is not believed", lambda w: w.token(RSA, "RS512")),
    ("crit", lambda w: w.token(header={"crit": ["x"], "x": 1})),
    ("a capability's type", lambda w: w.token(header={"typ": "cap+jwt"})),
    ("another issuer", lambda w: w.token(iss="https://evil.example")),
    ("no issuer", lambda w: w.token(iss=None)),
    ("another audience", lambda w: w.token(aud="other")),
    ("no audience", lambda w: w.token(aud=None)),
    ("several audiences, for another party", lambda w: w.token(aud=["octollm", "other"], azp="other")),
    ("several audiences, for nobody", lambda w: w.token(aud=["octollm", "other"])),
    ("one audience, for another party", lambda w: w.token(azp="other")),
    ("expired", lambda w: w.token(exp=NOW - 30)),
    ("no expiry", lambda w: w.token(exp=None)),
    ("expiry as text", lambda w: w.token(exp="soon")),
    ("not valid yet", lambda w: w.token(nbf=NOW + 31)),
    ("from the future", lambda w: w.token(iat=NOW + 31)),
    ("from long ago", lambda w: w.token(iat=NOW - 86_401)),
    ("no issue time", lambda w: w.token(iat=None)),
    ("no subject", lambda w: w.token(sub=None)),
    ("an empty subject", lambda w: w.token(sub="")),
    ("an endless subject", lambda w: w.token(sub="x" * 256)),
    ("a changed claim", lambda w: _spliced(w.token(), w.token(sub="eve"))),
    ("too long", lambda w: w.token(padding="x" * 8192)),
    ("two parts", lambda w: w.token().rpartition(".")[0]),
    ("deep nesting", lambda w: "eyJ" + base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.x"),
    ("not JSON", lambda w: "eyJ.eyJ.x"),
]


def _spliced(one: str, other: str) -> str:
    head, _, signature = one.split(".")
    return f"{head}.{other.split('.')[1]}.{signature}"


@pytest.mark.parametrize("make", [row[1] for row in BENT], ids=[row[0] for row in BENT])
async def test_a_bent_login_is_refused_and_its_honest_twin_believed(
    oidc_kit: OidcKit, make: Callable[[OidcKit], str]
) -> None:
    assert await refused(oidc_kit, make(oidc_kit))
    assert await oidc_kit.oidc.verify(oidc_kit.token())


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW - 29},
        {"nbf": NOW + 29},
        {"iat": NOW + 29},
        {"aud": ["octollm"]},
        {"aud": ["octollm", "other"], "azp": "octollm"},
        {"azp": "octollm"},
        {"sub": "x" * 255},
    ],
)
async def test_what_is_just_good_enough_is_believed(oidc_kit: OidcKit, claims: dict[str, Any]) -> None:
    assert await oidc_kit.oidc.verify(oidc_kit.token(**claims))


async def test_keys_are_asked_for_once_and_again_for_a_new_one(oidc_kit: OidcKit) -> None:
    for _ in range(3):
        await oidc_kit.oidc.verify(oidc_kit.token())
    assert oidc_kit.provider.asked == 1
    oidc_kit.provider.keys.append(jwk(OTHER, "new", alg="RS256"))
    fresh = oidc_kit.token(OTHER, header={"kid": "new"})
    assert await refused(oidc_kit, fresh), "not for every unknown name at once"
    assert oidc_kit.provider.asked == 1
    oidc_kit.clock.ahead += oidc_module.JWKS_REFRESH_INTERVAL + 1
    assert await oidc_kit.oidc.verify(fresh)
    assert oidc_kit.provider.asked == 2
    oidc_kit.provider.keys = [jwk(OTHER, "new", alg="RS256")]
    oidc_kit.clock.ahead += oidc_module.JWKS_TTL_SECONDS + 1
    assert await oidc_kit.oidc.verify(fresh)
    assert await refused(oidc_kit, oidc_kit.token()), "a key that is gone is believed no more"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"status": 500}, "unavailable"),
        ({"status": 404}, "peer_protocol"),
        ({"body": b"nonsense"}, "peer_protocol"),
        ({"body": b'{"issuer": "x"}'}, "peer_protocol"),
        ({"body": b" " * 300_000}, "peer_protocol"),
        ({"claims_to_be": "https://evil.example"}, "peer_protocol"),
    ],
)
async def test_an_issuer_that_cannot_be_asked_is_named(oidc_kit: OidcKit, change: dict[str, Any], code: str) -> None:
    for name, value in change.items():
        setattr(oidc_kit.provider, name, value)
    with pytest.raises(OctoError) as caught:
        await oidc_kit.oidc.verify(oidc_kit.token())
    assert caught.value.code == code
    assert "127.0.0.1" in caught.value.detail


async def test_keys_of_other_kinds_are_not_used(oidc_kit: OidcKit) -> None:
    secret = {"kty": "oct", "k": base64.urlsafe_b64encode(PEM).decode(), "kid": "oct", "alg": "HS256"}
    oidc_kit.provider.keys = [secret, {"kty": "RSA"}, jwk(RSA, "enc", alg="RS256") | {"use": "enc"}, jwk(RSA, "rsa")]
    assert await oidc_kit.oidc.verify(oidc_kit.token()), "a key without an algorithm is for the usual one"
    assert await refused(oidc_kit, oidc_kit.token(header={"kid": "enc"}))
    assert await refused(oidc_kit, by_hmac(PEM)(oidc_kit))


async def test_without_a_name_there_must_be_one_key_for_the_algorithm(oidc_kit: OidcKit) -> None:
    nameless = jwt.encode(oidc_kit.claims(), RSA, algorithm="RS256")
    assert await oidc_kit.oidc.verify(nameless)
    assert await refused(oidc_kit, jwt.encode(oidc_kit.claims(), OTHER, algorithm="RS256"))
    oidc_kit.provider.keys.append(jwk(OTHER, "second", alg="RS256"))
    oidc_kit.clock.ahead += oidc_module.JWKS_TTL_SECONDS + 1
    assert await refused(oidc_kit, nameless)
    assert await oidc_kit.oidc.verify(oidc_kit.token())


async def test_only_the_configured_algorithms_are_believed() -> None:
    async with world_of(algorithms=("ES256",)) as oidc_kit:
        assert await refused(oidc_kit, oidc_kit.token())
        assert await oidc_kit.oidc.verify(oidc_kit.token(EC, "ES256", {"kid": "ec"}))


# A code with a verifier

BACK = "http://127.0.0.1:8000/"
VERIFIER = "v" * 43
NONCE = "n" * 32


def start_login(oidc_kit: OidcKit, code: str = "code-1", **claims: Any) -> LoginCode:
    """Have the issuer send a browser back with a code, and return what the page makes of it."""
    challenge = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
    oidc_kit.provider.codes[code] = (challenge, oidc_kit.token(**{"nonce": NONCE, **claims}))
    return LoginCode(oidc_kit.provider.url, code, VERIFIER, NONCE, BACK)


async def test_a_code_is_redeemed_once_by_whoever_began_the_login(oidc_kit: OidcKit) -> None:
    login = start_login(oidc_kit)
    issuer, claims = await oidc_kit.oidc.exchange_code(login)
    assert (issuer, claims["sub"]) == (oidc_kit.issuer, "ada")
    assert oidc_kit.provider.redeemed == [
        {
            "grant_type": "authorization_code",
            "code": "code-1",
            "redirect_uri": BACK,
            "client_id": "octollm",
            "code_verifier": VERIFIER,
        }
    ]
    with pytest.raises(OctoError) as caught:
        await oidc_kit.oidc.exchange_code(login)
    assert caught.value.code == "api_key_invalid"


@pytest.mark.parametrize(
    ("change", "claims"),
    [
        ({"verifier": "w" * 43}, {}),
        ({"code": "code-2"}, {}),
        ({"redirect_uri": "http://evil.example/"}, {}),
        ({"issuer": "https://evil.example"}, {}),
        ({"nonce": "m" * 32}, {}),
        ({}, {"nonce": None}),
        ({}, {"nonce": ["n" * 32]}),
        ({}, {"aud": "other"}),
        ({}, {"exp": NOW - 60}),
        ({}, {"iss": "https://evil.example"}),
    ],
)
async def test_a_login_that_somebody_else_began_is_refused(
    oidc_kit: OidcKit, change: dict[str, str], claims: dict[str, Any]
) -> None:
    login = start_login(oidc_kit, **claims)
    with pytest.raises(OctoError) as caught:
        await oidc_kit.oidc.exchange_code(replace(login, **change))
    assert caught.value.code == "api_key_invalid"
    assert await oidc_kit.oidc.exchange_code(start_login(oidc_kit, "code-9"))


async def test_our_secret_is_shown_to_the_issuer_that_gave_it(oidc_kit: OidcKit, tmp_path: Path) -> None:
    assert await oidc_kit.oidc.exchange_code(start_login(oidc_kit))
    assert oidc_kit.provider.authorized == [""]
    (tmp_path / "secret").write_text("s:cret %\n")
    (tmp_path / "secret").chmod(0o600)
    secret = load_client_secret(replace(oidc_kit.issuer, client_secret_file=str(tmp_path / "secret")))
    assert secret == "s:cret %"
    oidc_kit.oidc._secrets[oidc_kit.issuer.url] = secret  # pyright: ignore[reportPrivateUsage]
    assert await oidc_kit.oidc.exchange_code(start_login(oidc_kit))
    shown = base64.b64decode(oidc_kit.provider.authorized[-1].removeprefix("Basic ")).decode()
    assert shown == "octollm:s%3Acret%20%25"
    (tmp_path / "secret").chmod(0o604)
    with pytest.raises(SettingError, match="every user may read it"):
        load_client_secret(replace(oidc_kit.issuer, client_secret_file=str(tmp_path / "secret")))
    with pytest.raises(SettingError, match="cannot be read"):
        load_client_secret(replace(oidc_kit.issuer, client_secret_file=str(tmp_path / "none")))
    assert load_client_secret(oidc_kit.issuer) is None


async def test_where_one_can_log_in_is_told_while_the_issuer_answers(oidc_kit: OidcKit) -> None:
    [view] = await oidc_kit.oidc.list_issuers()
    assert (view.url, view.client_id, view.authorization_endpoint) == (
        oidc_kit.provider.url,
        "octollm",
        f"{oidc_kit.provider.url}/authorize",
    )
    oidc_kit.provider.status = 500
    oidc_kit.clock.ahead += oidc_module.JWKS_TTL_SECONDS + 1
    assert await oidc_kit.oidc.list_issuers() == ()


# What a login grants


ISSUER = Issuer(
    "https://login.example",
    "octollm",
    (
        GrantRule("groups", "staff", "user"),
        GrantRule("groups", "ops", "admin user"),
        GrantRule("sub", "bot", "files:read"),
    ),
    tenant_claim="org",
)


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"groups": ["staff"]}, "user"),
        ({"groups": ["ops", "staff"]}, "user admin"),
        ({"groups": "staff"}, "user"),
        ({"groups": {"staff": True}}, ""),
        ({"groups": ["Staff"]}, ""),
        ({"sub": "bot"}, "files:read"),
        ({}, ""),
    ],
)
def test_claims_grant_by_rules_and_nothing_else(claims: dict[str, Any], scopes: str) -> None:
    assert map_claims_to_scopes(ISSUER, claims) == scopes


def test_users_of_two_issuers_or_tenants_are_never_one() -> None:
    other = replace(ISSUER, url="https://other.example")
    people = {
        map_claims_to_principal(issuer, {"sub": sub, "org": org}).sub
        for issuer in (ISSUER, other)
        for sub in ("ada", "bob")
        for org in ("acme", "globex")
    }
    assert len(people) == 8
    assert all(len(name) == 45 and name.startswith("oidc-") for name in people)


@pytest.mark.parametrize("org", [None, "", "local", "system", "Acme", "a b", ["acme"], "x" * 64, 7])
def test_a_claim_names_no_tenant_but_its_own(org: object) -> None:
    with pytest.raises(OctoError) as caught:
        map_claims_to_principal(ISSUER, {"sub": "ada", "org": org})
    assert caught.value.code == "login_refused"


def test_a_user_has_a_name_for_lists() -> None:
    assert map_claims_to_name({"email": "ada@example.org", "name": "Ada"}) == "ada@example.org"
    assert map_claims_to_name({"name": "Ada\n"}) == "OpenID Connect"


GOOD = """
[[issuer]]
url = "https://login.example"
audience = "octollm"
tenant = "acme"
[[issuer.grant]]
claim = "groups"
value = "staff"
scope = "user"
"""


def test_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "oidc.toml").write_text(GOOD)
    [issuer] = load_issuers(tmp_path / "oidc.toml")
    assert (issuer.url, issuer.tenant, issuer.grant[0].scope) == ("https://login.example", "acme", "user")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "issuer"),
        ("nonsense", "oidc.toml"),
        (GOOD.replace("tenant =", "tennant ="), "tennant"),
        (GOOD.replace('tenant = "acme"\n', ""), "either tenant or tenant_claim"),
        (GOOD.replace('tenant = "acme"', 'tenant = "acme"\ntenant_claim = "org"'), "either tenant or tenant_claim"),
        (GOOD.replace("https", "http"), "https"),
        (GOOD.partition("[[issuer.grant]]")[0], "grant"),
        (GOOD + GOOD, "twice"),
        (GOOD.replace('audience = "octollm"', 'audience = "octollm"\nalgorithms = ["HS256"]'), "HS256"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, detail: str) -> None:
    (tmp_path / "oidc.toml").write_text(text)
    with pytest.raises(SettingError, match="OCTOLLM_OIDC") as caught:
        load_issuers(tmp_path / "oidc.toml")
    assert detail in caught.value.detail
    with pytest.raises(SettingError, match="cannot be read"):
        load_issuers(tmp_path / "none.toml")


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    (tmp_path / "oidc.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    [issuer] = load_issuers(tmp_path / "oidc.toml")
    assert map_claims_to_scopes(issuer, {"groups": ["engineers"]}) == "user"


@pytest.mark.parametrize("inside", ["https://169.254.169.254/keys", "https://127.0.0.1/keys", "https://db.internal/"])
async def test_an_issuer_that_names_keys_inside_is_not_followed(oidc_kit: OidcKit, inside: str) -> None:
    oidc_kit.provider.keys_url = inside
    with pytest.raises(OctoError) as caught:
        await oidc_kit.oidc.verify(oidc_kit.token())
    assert caught.value.code == "peer_protocol"
    assert "refused" in caught.value.detail
