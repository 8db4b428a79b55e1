"""OpenID Connect: configured issuers, the mapping of their claims to a tenant and scopes, and the client.

The client verifies ID and access tokens of the issuers and exchanges authorization codes for them (OpenID Connect Core
1.0, RFC 7636, RFC 7519).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

import jwt
import msgspec
from msgspec import Meta

from octollm.capability import Principal
from octollm.clock import Clock
from octollm.config import read_secret_file
from octollm.contracts.auth import IssuerView, LoginCode
from octollm.errors import OctoError, SettingError, map_exceptions
from octollm.resilience import Deadline
from octollm.rpc.external import ExternalClient
from octollm.rpc.http_client import HttpClient, HttpResponse

MAX_ISSUERS = 16
RESERVED_TENANTS = frozenset({"local", "system"})
"""Tenants that a claim of an issuer cannot name."""
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_Text = Annotated[str, Meta(min_length=1, max_length=512)]

Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]


class GrantRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Grants ``scope`` to a user whose ``claim`` equals ``value`` or is a list that contains it."""

    claim: _Text
    value: _Text
    scope: _Text


class Issuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A configured issuer. ``audience`` is our client id there.

    Its users belong to ``tenant``, or to the tenant that ``tenant_claim`` names. Users who match no rule of ``grant``
    get no scopes.
    """

    url: Annotated[str, Meta(pattern=r"\Ahttps?://[!-~]{1,500}\Z")]
    audience: _Text
    grant: Annotated[tuple[GrantRule, ...], Meta(min_length=1, max_length=64)]
    tenant: Annotated[str, Meta(pattern=rf"\A{_TENANT.pattern}\Z")] | None = None
    tenant_claim: _Text | None = None
    client_secret_file: _Text | None = None
    """File of our client secret, for issuers that require one to exchange a code."""
    algorithms: tuple[Algorithm, ...] = ("RS256", "PS256", "ES256", "EdDSA")


class _IssuersFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issuer: Annotated[tuple[Issuer, ...], Meta(min_length=1, max_length=MAX_ISSUERS)]


def load_issuers(path: Path) -> tuple[Issuer, ...]:
    """Return the issuers of a TOML file; raise ``setting_invalid`` with the place of a fault."""
    try:
        issuers = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _IssuersFile).issuer
    except OSError as error:
        raise SettingError(f"OCTOLLM_OIDC: {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise SettingError(f"OCTOLLM_OIDC: {path}: {error}") from error
    for issuer in issuers:
        if (issuer.tenant is None) == (issuer.tenant_claim is None):
            raise SettingError(f"OCTOLLM_OIDC: {path}: {issuer.url} needs either tenant or tenant_claim.")
        if issuer.url.startswith("http://") and not _is_loopback_url(issuer.url):
            raise SettingError(f"OCTOLLM_OIDC: {path}: {issuer.url} must be an https URL.")
    if len({issuer.url for issuer in issuers}) != len(issuers):
        raise SettingError(f"OCTOLLM_OIDC: {path}: an issuer is configured twice.")
    return issuers


def load_client_secret(issuer: Issuer) -> str | None:
    """Return our client secret at an issuer, if one is configured; raise ``setting_invalid`` for an invalid file."""
    if issuer.client_secret_file is None:
        return None
    path = Path(issuer.client_secret_file)
    with map_exceptions(SettingError(f"OCTOLLM_OIDC: {path} cannot be read as a secret."), OSError, UnicodeDecodeError):
        secret = read_secret_file(path).decode().strip()
    if not secret or len(secret) > 1024 or not secret.isprintable():
        raise SettingError(f"OCTOLLM_OIDC: {path} does not hold a secret of 1 to 1024 printable characters.")
    return secret


def map_claims_to_scopes(issuer: Issuer, claims: Mapping[str, Any]) -> str:
    """Return the presets and scopes that the claims grant; empty if none."""
    granted = [rule.scope for rule in issuer.grant if _claim_has(claims.get(rule.claim), rule.value)]
    return " ".join(dict.fromkeys(" ".join(granted).split()))


def map_claims_to_principal(issuer: Issuer, claims: Mapping[str, Any]) -> Principal:
    """Return the principal of the claims. Raises ``login_refused`` if they name no valid tenant."""
    tenant = issuer.tenant
    if tenant is None:
        value = claims.get(issuer.tenant_claim or "")
        if not isinstance(value, str) or _TENANT.fullmatch(value) is None or value in RESERVED_TENANTS:
            raise OctoError(f"The login names no tenant in its claim {issuer.tenant_claim}.", code="login_refused")
        tenant = value
    # An issuer's `sub` may be any text, and two issuers may use the same one (OpenID Connect Core section 2).
    parts = (issuer.url, str(claims["sub"]), tenant)
    name = "oidc-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    return Principal(name, name, tenant)


def map_claims_to_name(claims: Mapping[str, Any]) -> str:
    """Return the display name of a user."""
    for claim in ("email", "preferred_username", "name"):
        value = claims.get(claim)
        if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100:
            return value
    return "OpenID Connect"


def _claim_has(claim: object, value: str) -> bool:
    return claim == value or (isinstance(claim, list) and value in claim)


def _is_loopback_url(url: str) -> bool:
    return re.fullmatch(r"http://(?:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]+)?(?:/.*)?", url) is not None


JWKS_TTL_SECONDS = 3600.0
"""Seconds for which an issuer's keys are cached."""
JWKS_REFRESH_INTERVAL = 30.0
"""Minimum seconds between two fetches caused by unknown key ids."""
ISSUER_TIMEOUT = 5.0
MAX_TOKEN_LENGTH = 8_192
MAX_ISSUER_BYTES = 262_144
"""Bytes of a response of an issuer."""
MAX_JWKS_KEYS = 64
CLOCK_SKEW_SECONDS = 30
MAX_TOKEN_AGE_SECONDS = 86_400
"""Tokens issued longer ago are refused, whatever their expiry."""
_JWT_OPTIONS: Any = {
    "require": ["exp", "iat", "iss", "aud", "sub"],
    # Times are checked in _validate_claims, by the injected clock.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}
_TOKEN_TYPES = frozenset({"JWT", "AT+JWT", "APPLICATION/AT+JWT"})


class _ProviderMetadata(msgspec.Struct, frozen=True):
    """The members used of OpenID Connect Discovery 1.0 section 3."""

    issuer: str
    jwks_uri: str
    authorization_endpoint: str = ""
    token_endpoint: str = ""


class _TokenResponse(msgspec.Struct, frozen=True):
    """The members used of a token response (OpenID Connect Core section 3.1.3.3)."""

    id_token: str


class _Jwks(msgspec.Struct, frozen=True):
    keys: list[dict[str, Any]]


@dataclass(slots=True)
class _IssuerCache:
    keys: dict[str, jwt.PyJWK] = field(default_factory=dict[str, jwt.PyJWK])
    metadata: _ProviderMetadata = field(default_factory=lambda: _ProviderMetadata("", ""))
    fetched_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class OidcClient:
    """Verifies ID and access tokens (JWT) of the configured issuers, and of no others."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        http: HttpClient,
        external_clients: Mapping[str, ExternalClient],
        clock: Clock,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """``secrets`` are our client secrets, by issuer URL. ``http`` guards against endpoints that lead inside."""
        self._secrets = dict(secrets or {})
        self._issuers = {issuer.url: issuer for issuer in issuers}
        self._http = http
        self._external_clients = external_clients
        self._clock = clock
        self._cache = {url: _IssuerCache() for url in self._issuers}

    async def verify(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return the issuer of a token, and its claims.

        Raises ``api_key_invalid`` for an invalid token, without a reason, and ``unavailable`` while the issuer's keys
        cannot be fetched.
        """
        with map_exceptions(_invalid_login(), jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError):
            issuer, header = self._parse_unverified(token)
            key = await self._find_key(issuer, header)
            claims = jwt.decode(
                token,
                key=key,
                algorithms=list(issuer.algorithms),
                audience=issuer.audience,
                issuer=issuer.url,
                leeway=CLOCK_SKEW_SECONDS,
                options=_JWT_OPTIONS,
            )
        self._validate_claims(issuer, claims)
        return issuer, claims

    async def exchange_code(self, login: LoginCode) -> tuple[Issuer, Mapping[str, Any]]:
        """Exchange an authorization code and return the login's issuer and claims (RFC 6749 section 4.1.3, RFC 7636).

        Raises ``api_key_invalid`` for an invalid code, verifier or nonce, and ``unavailable`` while the issuer does
        not answer.
        """
        issuer = self._issuers.get(login.issuer)
        if issuer is None:
            raise _invalid_login()
        await self._refresh_if_stale(issuer)
        endpoint = self._cache[issuer.url].metadata.token_endpoint
        if not self._is_trusted_url(issuer, endpoint):
            raise OctoError(f"{issuer.url} names no usable token endpoint.", code="peer_protocol")
        form = {
            "grant_type": "authorization_code",
            "code": login.code,
            "redirect_uri": login.redirect_uri,
            "client_id": issuer.audience,
            "code_verifier": login.verifier,
        }

        async def request_token() -> bytes:
            headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
            if (secret := self._secrets.get(issuer.url)) is not None:
                # RFC 6749 section 2.3.1
                credentials = f"{quote(issuer.audience, safe='')}:{quote(secret, safe='')}"
                headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
            encoded = urlencode(form).encode()
            response = await self._send("POST", endpoint, headers, encoded)
            if response.status >= 500:
                raise OctoError(f"{issuer.url} answers {response.status}.", code="unavailable")
            if response.status != 200 or len(response.body) > MAX_ISSUER_BYTES:
                raise _invalid_login()
            return response.body

        deadline = Deadline.after(self._clock, ISSUER_TIMEOUT)
        # A code is valid once, so the request is never retried.
        body = await self._external_clients[issuer.url].call(
            "code", request_token, deadline, is_repeatable=lambda: False
        )
        try:
            token = msgspec.json.decode(body, type=_TokenResponse).id_token
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _invalid_login() from None
        token_issuer, claims = await self.verify(token)
        nonce = claims.get("nonce")
        # The nonce binds the ID token to this browser's login, so that a stolen code is of no use elsewhere.
        is_match = isinstance(nonce, str) and hmac.compare_digest(nonce.encode(), login.nonce.encode())
        if token_issuer is not issuer or not is_match:
            raise _invalid_login()
        return issuer, claims

    async def list_issuers(self) -> tuple[IssuerView, ...]:
        """Return the issuers that accept browser logins; those that do not answer are left out."""
        views: list[IssuerView] = []
        for issuer in self._issuers.values():
            with contextlib.suppress(OctoError):
                await self._refresh_if_stale(issuer)
                endpoint = self._cache[issuer.url].metadata.authorization_endpoint
                if self._is_trusted_url(issuer, endpoint):
                    views.append(IssuerView(issuer.url, issuer.audience, endpoint))
        return tuple(views)

    async def _refresh_if_stale(self, issuer: Issuer, kid: str | None = None) -> None:
        """Fetch an issuer's metadata and keys if the cache is stale or lacks the key ``kid``."""
        cache = self._cache[issuer.url]
        if self._is_stale(cache, kid):
            # Concurrent logins share one fetch.
            async with cache.lock:
                if self._is_stale(cache, kid):
                    await self._fetch_metadata(issuer, cache)

    def _is_trusted_url(self, issuer: Issuer, url: str) -> bool:
        """Return whether an endpoint that an issuer names is at least as well protected as the issuer's own URL."""
        return url.partition("://")[0] in ("https", issuer.url.partition("://")[0])

    def _parse_unverified(self, token: str) -> tuple[Issuer, Mapping[str, Any]]:
        """Return the claimed issuer of a token, and its header. Nothing is verified yet."""
        if len(token) > MAX_TOKEN_LENGTH or token.count(".") != 2:
            raise _invalid_login()
        # Read unverified only to choose the issuer, whose keys then verify the whole token.
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
        issuer = self._issuers.get(str(claims.get("iss")))
        typ = str(header.get("typ", "JWT")).upper()
        # An extension that `crit` names must be understood or the token refused (RFC 7515 section 4.1.11).
        if issuer is None or "crit" in header or typ not in _TOKEN_TYPES or header.get("alg") not in issuer.algorithms:
            raise _invalid_login()
        return issuer, header

    def _validate_claims(self, issuer: Issuer, claims: Mapping[str, Any]) -> None:
        """Check the times by our clock (RFC 7519 section 4.1), and the audience (OpenID Connect Core 3.1.3.7)."""
        now = self._clock.now()
        times = [claims["exp"], claims["iat"], claims.get("nbf", claims["iat"])]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in times):
            raise _invalid_login()
        exp, iat, nbf = times
        has_other_audiences = not isinstance(claims["aud"], str) and claims["aud"] != [issuer.audience]
        is_valid = (
            now - CLOCK_SKEW_SECONDS < exp
            and iat - CLOCK_SKEW_SECONDS <= now
            and nbf - CLOCK_SKEW_SECONDS <= now
            and now - iat <= MAX_TOKEN_AGE_SECONDS
            and isinstance(claims["sub"], str)
            and 0 < len(claims["sub"]) <= 255
            and claims.get("azp", issuer.audience if not has_other_audiences else None) == issuer.audience
        )
        if not is_valid:
            raise _invalid_login()

    async def _find_key(self, issuer: Issuer, header: Mapping[str, Any]) -> jwt.PyJWK:
        """Return the key that a header names, for the header's algorithm.

        A header without ``kid`` is accepted if exactly one key fits (OpenID Connect Core section 10.1).
        """
        cache = self._cache[issuer.url]
        kid = header.get("kid")
        if kid is not None and (not isinstance(kid, str) or len(kid) > 256):
            raise _invalid_login()
        await self._refresh_if_stale(issuer, kid)
        candidates = [key for key in cache.keys.values() if key.algorithm_name == header["alg"]]
        if kid is not None:
            candidates = [key for key in candidates if key.key_id == kid]
        if len(candidates) != 1:
            raise _invalid_login()
        return candidates[0]

    def _is_stale(self, cache: _IssuerCache, kid: str | None) -> bool:
        age = self._age(cache)
        return age > JWKS_TTL_SECONDS or (kid is not None and kid not in cache.keys and age > JWKS_REFRESH_INTERVAL)

    def _age(self, cache: _IssuerCache) -> float:
        return self._clock.monotonic() - cache.fetched_at

    async def _fetch_metadata(self, issuer: Issuer, cache: _IssuerCache) -> None:
        """Fetch an issuer's metadata and keys; on failure the cached ones stay."""

        async def fetch() -> tuple[_ProviderMetadata, dict[str, jwt.PyJWK]]:
            url = f"{issuer.url.rstrip('/')}/.well-known/openid-configuration"
            metadata = await self._get_json(url, _ProviderMetadata)
            # The two must be the same (OpenID Connect Discovery section 4.3), or one issuer could speak for another.
            if metadata.issuer != issuer.url:
                raise OctoError(f"{issuer.url} names another issuer in its metadata.", code="peer_protocol")
            if not self._is_trusted_url(issuer, metadata.jwks_uri):
                raise OctoError(f"{issuer.url} serves its keys at an untrusted URL.", code="peer_protocol")
            return metadata, _parse_jwks((await self._get_json(metadata.jwks_uri, _Jwks)).keys, issuer)

        deadline = Deadline.after(self._clock, ISSUER_TIMEOUT)
        client = self._external_clients[issuer.url]
        cache.metadata, cache.keys = await client.call("keys", fetch, deadline, is_repeatable=lambda: True)
        cache.fetched_at = self._clock.monotonic()

    async def _get_json(self, url: str, kind: Any) -> Any:
        response = await self._send("GET", url, {"Accept": "application/json"})
        if response.status != 200 or len(response.body) > MAX_ISSUER_BYTES:
            code = "unavailable" if response.status >= 500 else "peer_protocol"
            raise OctoError(f"{url} answers {response.status}.", code=code)
        with map_exceptions(
            OctoError(f"{url} does not answer with the expected JSON.", code="peer_protocol"),
            msgspec.DecodeError,
            UnicodeDecodeError,
        ):
            return msgspec.json.decode(response.body, type=kind)

    async def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> HttpResponse:
        with map_exceptions(_blame_issuer, OctoError):
            return await self._http.send(method, url, headers, body, seconds=ISSUER_TIMEOUT)


def _blame_issuer(error: OctoError) -> OctoError | None:
    """Return the error for an endpoint that the egress guard refuses: the issuer named it, not the user."""
    if error.code != "url_refused":
        return None
    return OctoError(f"An issuer names an endpoint that may not be called. {error.detail}", code="peer_protocol")


def _parse_jwks(jwks: Sequence[Mapping[str, Any]], issuer: Issuer) -> dict[str, jwt.PyJWK]:
    """Return the signature keys of accepted algorithms, by key id (RFC 7517 section 4)."""
    keys: dict[str, jwt.PyJWK] = {}
    for jwk in jwks[:MAX_JWKS_KEYS]:
        kid = jwk.get("kid")
        if not isinstance(kid, str) or jwk.get("use", "sig") != "sig" or jwk.get("kty") == "oct":
            # A symmetric key ("oct") here would let anybody who reads the document sign tokens.
            continue
        try:
            key = jwt.PyJWK(dict(jwk), algorithm=_default_algorithm(jwk))
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue  # of an unknown type
        if key.algorithm_name in issuer.algorithms:
            keys[kid] = key
    return keys


def _default_algorithm(jwk: Mapping[str, Any]) -> str | None:
    """Return the usual algorithm of a key's type; ``None`` if the key names one itself."""
    if jwk.get("alg") is not None:
        return None
    return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(jwk.get("kty")))


def _invalid_login() -> OctoError:
    return OctoError("The login is invalid or has expired: log in again.", code="api_key_invalid")
